"""A readable passage of a text, and how it is set in lines."""

import dataclasses
import math
from collections.abc import Iterator

import numpy as np
from jaxtyping import Int, Integer

from .data import DOCUMENT_START, Sequences


_BYTES = 420  # of a passage
_TRIES = 400


@dataclasses.dataclass(frozen=True)
class Passage:
    """A piece of text that begins in the file `document`.

    It is the `part` of the tokens of some sequences of one `length`, by number its `rows`, which
    are laid end to end.
    """

    document: str
    rows: tuple[int, ...]
    part: slice
    tokens: Int[np.ndarray, " tokens"]
    length: int

    def cut(self, values: Integer[np.ndarray, "layers sequences tokens"]) -> np.ndarray:
        """Cuts the passage, `[layers, tokens]`, out of values of its sequences."""
        return values.reshape(len(values), -1)[:, self.part]

    def sequence_starts(self) -> list[int]:
        """Lists the tokens that begin a sequence, but for the passage's own first one."""
        return [n for n in range(1, len(self.tokens)) if (self.part.start + n) % self.length == 0]


def find_passage(source: Sequences) -> Passage:
    """Finds whole lines of one document that print, neither mostly blank nor unbroken.

    Takes the first such passage from a third of the text on, or else the one that comes nearest.
    """
    joined = min(len(source), math.ceil(1.3 * _BYTES / source.length))
    count = len(source) - joined + 1
    step = max(1, count // _TRIES)
    order = (*range(count // 3, count, step), *range(0, count // 3, step))
    passages = (_passage_at(source, first, joined) for first in order)
    return max(passages, key=lambda passage: _readability(passage.tokens))


def _passage_at(source: Sequences, first: int, count: int) -> Passage:
    """Cuts the passage that begins with the first whole line of some sequences."""
    documents, length = source.documents, source.length
    begin = first * length
    # The very last token of the text is a target, but no input.
    tokens = documents.tokens[:-1][begin : begin + count * length].astype(np.int64)
    lines = np.flatnonzero(tokens[:-1] == ord("\n")) + 1
    near = lines[lines <= len(tokens) // 4]
    start = int(near[0]) if len(near) and begin not in documents.starts else 0
    part = slice(start, min(start + _BYTES, len(tokens)))
    document = int(np.searchsorted(documents.starts, begin + start, side="right")) - 1
    rows = tuple(range(first, first + count))
    return Passage(documents.names[document], rows, part, tokens[part], length)


def _readability(tokens: Int[np.ndarray, " tokens"]) -> float:
    """Scores a text: 1 for full size, one document and readable characters, less otherwise."""
    inside = tokens[1:]  # a document may start with the passage
    if not len(inside):
        return -math.inf
    text = bytes(inside[inside < DOCUMENT_START].tolist()).decode("utf-8", "replace")
    printed = sum((c.isprintable() and c != "\ufffd") or c in "\n\t" for c in text)
    blank = float(np.isin(inside, list(b" \n\t")).mean())
    shortfalls = (
        1 - len(tokens) / _BYTES,
        float(np.mean(inside == DOCUMENT_START)),
        # A character that is cut off at each end may be missing.
        max(0.0, len(text) - printed - 2) / max(len(text), 1),
        max(0.0, 0.08 - blank, blank - 0.35),
    )
    return 1 - sum(shortfalls)


def lines_of(tokens: Int[np.ndarray, " tokens"], width: int) -> Iterator[slice]:
    """Yields the lines of a text, none longer than `width`; a line ends with its newline.

    >>> import numpy as np
    >>> text = np.frombuffer(b"ab\\ncdefg", np.uint8).astype(np.int64)
    >>> [(line.start, line.stop) for line in lines_of(text, 3)]
    [(0, 3), (3, 6), (6, 8)]
    """
    start = 0
    for stop, token in enumerate(tokens, 1):
        if token == ord("\n") or stop - start == width or stop == len(tokens):
            yield slice(start, stop)
            start = stop


def glyphs(tokens: Int[np.ndarray, " tokens"]) -> list[str]:
    """Returns the character that begins at each byte, and "" at the other bytes of a character.

    What does not print, or is not UTF-8, becomes "\\ufffd".

    >>> import numpy as np
    >>> glyphs(np.frombuffer("aé!".encode(), np.uint8).astype(np.int64))
    ['a', 'é', '', '!']
    """
    # The byte 255 is in no UTF-8 text, so it stands for tokens that are no bytes.
    text = bytes(np.minimum(tokens, 255).tolist()).decode("utf-8", "surrogateescape")
    characters = []
    for character in text:
        size = len(character.encode("utf-8", "surrogateescape"))
        characters += [character if character.isprintable() else "\ufffd", *[""] * (size - 1)]
    return characters
