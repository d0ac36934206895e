"""What tests of `mode-lab` share: a console that is read, and a text."""

import io
from pathlib import Path

from rich.console import Console


def quiet() -> Console:
    """Nobody sees it."""
    return Console(file=io.StringIO(), width=160)


def said(console: Console) -> str:
    """What a quiet console was told."""
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def repeating_texts(folder: Path) -> str:
    """Twelve small files, as a glob."""
    for number in range(12):
        line = f"line {number} of a text that repeats itself\n"
        (folder / f"{number}.txt").write_text(line * 30)
    return str(folder / "*.txt")
