"""Fixtures of the tests of `mode-lab`: texts, and a run on them, made once."""

from pathlib import Path

import pytest

from mode.lab import run
from tests.lab.helpers import quiet, repeating_texts
from tests.lab.runs import training


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Small files, by their glob."""
    return repeating_texts(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory, texts: str) -> Path:
    """A run that nobody interrupted. A test that changes it copies it first."""
    out = tmp_path_factory.mktemp("whole") / "run"
    run.run_training(training(out, texts), quiet())
    return out
