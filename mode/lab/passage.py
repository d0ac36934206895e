"""A piece of text to look at: where it is, and how it is set in lines."""

import dataclasses
import math
from collections.abc import Iterator

import numpy as np
from jaxtyping import Int, Integer

from .data import DOCUMENT_START, Sequences


# Of a passage.
_BYTES = 420
_TRIED = 400


@dataclasses.dataclass(frozen=True)
class Passage:
    """A piece of text in one or more sequences that follow each other.

    **Attributes:**

    - `document`: the file it begins in.
    - `places`: the sequences, by number.
    - `part`: which of their tokens, laid end to end.
    - `tokens`: these tokens.
    - `length`: tokens of a whole sequence: at each multiple, the model begins anew.
    """

    document: str
    places: tuple[int, ...]
    part: slice
    tokens: Int[np.ndarray, " tokens"]
    length: int

    def of(self, rows: Integer[np.ndarray, "layers sequences tokens"]) -> np.ndarray:
        """`[layers, tokens]`: the passage's part of what is known of its sequences."""
        return rows.reshape(len(rows), -1)[:, self.part]

    def begins(self) -> list[int]:
        """The tokens with which a sequence begins, without the passage's own first."""
        places = range(self.part.start + 1, self.part.stop)
        return [place - self.part.start for place in places if place % self.length == 0]


def find_passage(source: Sequences) -> Passage:
    """A readable one: whole lines of one document that print, neither mostly blank nor unbroken.

    The first such from a third of the text on; where there is none, what comes nearest.
    """
    joined = min(len(source), math.ceil(1.3 * _BYTES / source.length))
    count = len(source) - joined + 1
    step = max(1, count // _TRIED)
    order = [*range(count // 3, count, step), *range(0, count // 3, step)]
    best = _begun(source, order[0], joined)
    for first in order:
        if _readable(best.tokens) >= 1:
            break
        passage = _begun(source, first, joined)
        best = max(best, passage, key=lambda one: _readable(one.tokens))
    return best


def _begun(source: Sequences, first: int, count: int) -> Passage:
    """The passage that begins with the first whole line of these sequences."""
    documents, length = source.documents, source.length
    begin = first * length
    # As inputs: the very last token of the text is only ever a target.
    end = min(begin + count * length, len(documents.tokens) - 1)
    tokens = documents.tokens[begin:end].astype(np.int64)
    lines = np.flatnonzero(tokens[:-1] == ord("\n")) + 1
    near = lines[lines <= len(tokens) // 4]
    start = int(near[0]) if len(near) and begin not in documents.starts else 0
    part = slice(start, min(start + _BYTES, len(tokens)))
    document = int(np.searchsorted(documents.starts, begin + start, side="right")) - 1
    places = tuple(range(first, first + count))
    return Passage(documents.names[document], places, part, tokens[part], length)


def _readable(tokens: Int[np.ndarray, " tokens"]) -> float:
    """1 for a text of full size and one document that reads well, less the less it does."""
    inside = tokens[1:]  # a document may start with the passage
    if not len(inside):
        return -math.inf
    text = bytes(inside[inside < DOCUMENT_START].tolist()).decode("utf-8", "replace")
    printed = sum((c.isprintable() and c != "\ufffd") or c in "\n\t" for c in text)
    blank = float(np.isin(inside, list(b" \n\t")).mean())
    whole = float(np.mean(inside != DOCUMENT_START))
    shortfalls = (
        1 - len(tokens) / _BYTES,
        1 - whole,
        # A character cut off at an end, or two, may be missing.
        max(0.0, len(text) - printed - 2) / max(len(text), 1),
        max(0.0, 0.08 - blank, blank - 0.35),
    )
    return 1 - sum(shortfalls)


def lines_of(tokens: Int[np.ndarray, " tokens"], width: int) -> Iterator[slice]:
    """The lines of a text, none longer than `width`; a line end belongs to the line it ends.

    >>> import numpy as np
    >>> text = np.frombuffer(b"ab\\ncdefg", np.uint8).astype(np.int64)
    >>> [(line.start, line.stop) for line in lines_of(text, 3)]
    [(0, 3), (3, 6), (6, 8)]
    """
    start = 0
    for place, token in enumerate(tokens, 1):
        if token == ord("\n") or place - start == width or place == len(tokens):
            yield slice(start, place)
            start = place


def glyphs(tokens: Int[np.ndarray, " tokens"]) -> list[str]:
    """The character that begins at each byte; "" inside one of several bytes.

    What does not print, or is no UTF-8, is "\\ufffd".

    >>> import numpy as np
    >>> glyphs(np.frombuffer("aé!".encode(), np.uint8).astype(np.int64))
    ['a', 'é', '', '!']
    """
    found = []
    while len(found) < len(tokens):
        sizes = range(1, min(4, len(tokens) - len(found)) + 1)
        pieces = (tokens[len(found) : len(found) + size].tolist() for size in sizes)
        character = next((c for c in map(_decoded, pieces) if c is not None), None)
        size = 1 if character is None else len(character.encode())
        found += [character or "\ufffd", *[""] * (size - 1)]
    return found


def _decoded(piece: list[int]) -> str | None:
    if max(piece) >= DOCUMENT_START:
        return None
    try:
        text = bytes(piece).decode()
    except UnicodeDecodeError:
        return None
    return text if len(text) == 1 and text.isprintable() else None
