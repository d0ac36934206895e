"""Helpers of the tests of `mode-lab`: a console to read, texts, and the class of a byte."""

import io
from pathlib import Path

import numpy as np
from rich.console import Console

from mode.lab.corpus import Documents


# A line of a text, by its number.
LINE = "def f_{0}(x1):  # line {0}, of 12\n    return 'it is' + x1\n"


def quiet() -> Console:
    """Makes a console that shows nothing."""
    return Console(file=io.StringIO(), width=160)


def said(console: Console) -> str:
    """Returns what was printed to a quiet console."""
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def repeating_texts(folder: Path) -> str:
    """Writes twelve small files and returns their glob."""
    for number in range(12):
        line = f"line {number} of a text that repeats itself\n"
        (folder / f"{number}.txt").write_text(line * 30)
    return str(folder / "*.txt")


def documents(*texts: str | bytes) -> Documents:
    """Makes one document of each text."""
    pieces = [
        np.array([256, *(text.encode() if isinstance(text, str) else text)], np.uint16)
        for text in texts
    ]
    starts = np.cumsum([0, *map(len, pieces[:-1])])
    return Documents(tuple(map(str, range(len(texts)))), np.concatenate(pieces), starts)


def slow_class(before: int, token: int) -> str:
    """Finds the class of a byte after another, by Python's own definition of ASCII characters."""

    def in_word(token: int) -> bool:
        return token != 256 and (token > 127 or chr(token).isalpha() or chr(token) == "_")

    if token == 256:
        return "document start"
    if token < 128 and chr(token) in " \t\n\r\v\f":
        return "space"
    if token < 128 and chr(token).isdigit():
        return "digit"
    if not in_word(token):
        return "punctuation"
    inside = in_word(before) or (before < 128 and chr(before).isdigit())
    return "word inside" if inside else "word start"
