"""Every example runs to its end. (`test_readme.py` runs those that assert something.)"""

from pathlib import Path

import pytest

from tests.examples import CLAIMS, EXAMPLES, run_example


@pytest.mark.parametrize(
    "path", [path for path in EXAMPLES if path not in CLAIMS], ids=lambda path: path.stem
)
def test_example(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_example(path, capsys)


def test_there_are_examples():
    assert len(EXAMPLES) >= 5
