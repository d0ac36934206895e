"""`mode-lab generate`: every arm has a text, or says why it has none."""

from pathlib import Path

import pytest

from mode.lab import run
from tests.lab.helpers import quiet, said
from tests.lab.runs import generated, training, untrained


def test_an_arm_of_whole_sequences_has_no_text(tmp_path: Path, texts: str) -> None:
    console = quiet()
    run.run_training(training(tmp_path / "run", texts, arm="mod-random", steps=2), console)
    assert "generate" not in said(console)
    with pytest.raises(ValueError, match=r"`checkpoint` must be of an arm .*'mod-random'"):
        generated(tmp_path / "run")


@pytest.mark.parametrize("arm", ["dense", "mode-staged"])
def test_every_arm_generates(arm: str, tmp_path: Path, texts: str) -> None:
    text, report = generated(untrained(tmp_path / "run", texts, arm), steps=3)
    assert text
    assert ("nothing is routed" in report) == (arm == "dense")
