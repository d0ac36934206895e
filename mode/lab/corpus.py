"""Real text: files in, training documents and held-out documents out.

A document is one file: a document-start token and then its bytes. Held-out files are chosen by a
hash of their names, so that adding a file to a corpus moves no other file to the other side. Files
of equal content are on the same side, and no file is read twice, whatever links lead to it.
"""

import dataclasses
import fnmatch
import glob
import hashlib
import os
import sysconfig
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int, UInt
from numpy.typing import DTypeLike


DOCUMENT_START = 256
HELD_OUT_FRACTION = 0.1
# Tests and installed packages are not the library; `encodings` and `pydoc_data` are generated
# tables, which any model predicts from a few lines.
_SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
_SKIPPED |= {"lib2to3", "encodings", "pydoc_data"}


@dataclasses.dataclass(frozen=True)
class Documents:
    """Documents laid end to end: the file of each, relative to the corpus, all their tokens, and
    where in these each document begins."""

    names: tuple[str, ...]
    tokens: UInt[np.ndarray, " tokens"]
    starts: Int[np.ndarray, " documents"]


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Training and held-out documents, which have no file and no content in common."""

    train: Documents
    held_out: Documents

    def __str__(self) -> str:
        """The number of files, for people."""
        files = f"{len(self.train.names)} files to train on ({len(self.train.tokens):,} bytes)"
        return f"{files}, {len(self.held_out.names)} held out"

    @property
    def fingerprint(self) -> str:
        """Equal for equal names and contents on both sides."""
        digest = hashlib.blake2b(digest_size=8)
        for side in (self.train, self.held_out):
            digest.update("\0".join(side.names).encode("utf-8", "surrogateescape"))
            digest.update(side.tokens.tobytes())
        return digest.hexdigest()


def read_corpus(data: str | None, *, length: int) -> Corpus:
    """Reads files and holds about a tenth of them out.

    Those are held out whose name has a low hash, and then as many more as fill one sequence; of a
    single file, its last tenth. `data` is a glob, `**` recursive, such as `"texts/**/*.txt"`;
    `None` is the source of the Python standard library.

    **Raises:** `ValueError` for a glob that matches no file, or files that do not fill one sequence
    of `length` tokens on each side.
    """
    files = _standard_library() if data is None else _matching(data)
    if len(files) == 1:
        ((name, content),) = files.items()
        cut = len(content) - round(HELD_OUT_FRACTION * len(content))
        files = {f"{name} (start)": content[:cut], f"{name} (end)": content[cut:]}
        held_out = {f"{name} (end)"}
    else:
        # The standard library repeats two files of less than 100 bytes. To group them would give it
        # another fingerprint than that of the published runs.
        held_out = _held_out(files, length, by_content=data is not None)
    train = _documents({name: files[name] for name in files if name not in held_out})
    rest = _documents({name: files[name] for name in files if name in held_out})
    for side, documents in (("training", train), ("held-out", rest)):
        if len(documents.tokens) <= length:
            raise ValueError(
                f"`data` must fill at least one sequence of length={length} on both sides, which "
                f"takes {length + 1} tokens (a byte is one, and so is the start of a file), got "
                f"{len(documents.tokens)} on the {side} side from {len(files)} files of "
                f"{sum(map(len, files.values()))} bytes. Give more text or a smaller `length`."
            )
    return Corpus(train, rest)


def read_documents(data: str) -> Documents:
    """Reads all files that a glob matches, and holds none of them out.

    **Raises:** `ValueError` for a glob that matches no file.
    """
    return _documents(_matching(data))


def _standard_library() -> dict[str, bytes]:
    root = Path(sysconfig.get_path("stdlib"))
    paths = (path for path in root.rglob("*.py") if path.is_file())
    names = sorted((path.relative_to(root).as_posix(), path) for path in paths)
    return _contents({name: path for name, path in names if _SKIPPED.isdisjoint(name.split("/"))})


def _matching(data: str) -> dict[str, bytes]:
    """The files that are not empty, by their names after the fixed part of the glob: moving the
    corpus changes no name."""
    path = Path(data).expanduser()
    parts = path.parts
    if path.is_file():  # a name, even if it looks like a glob
        paths = {path.name: path}
    else:
        count = next((n for n, part in enumerate(parts) if glob.has_magic(part)), len(parts) - 1)
        pattern = parts[count:]
        below = _files(Path(*parts[:count]), None if "**" in pattern else len(pattern))
        paths = {"/".join(names): file for names, file in below if _matches(names, pattern)}
    files = _contents(dict(sorted(paths.items(), key=lambda item: str(item[1]))))
    if not files:
        raise ValueError(
            f"`data` must match at least one file that is not empty, got {data!r} in "
            f"{os.getcwd()}. Quote the glob, and match files rather than folders: "
            '"texts/**/*.txt".'
        )
    return files


def _files(root: Path, deepest: int | None) -> Iterator[tuple[tuple[str, ...], Path]]:
    """Every file below a folder once, by the parts of its name. Links are followed last: a file
    that has a name of its own keeps it."""
    folders: list[tuple[tuple[str, ...], Path]] = [((), root)]
    links, seen = [], set()
    while folders or links:
        names, path = folders.pop() if folders else links.pop(0)
        real = os.path.realpath(path)
        if real in seen:
            continue
        seen.add(real)
        if not path.is_dir():
            if path.is_file():
                yield names, path
        elif deepest is None or len(names) < deepest:
            for entry in sorted(path.iterdir()):
                (links if entry.is_symlink() else folders).append(((*names, entry.name), entry))


def _matches(names: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether the parts of a file's name match those of a glob, by the rules of `glob`."""
    if not pattern or not names:
        return not pattern and not names
    first, rest = pattern[0], pattern[1:]
    if first == "**" and _matches(names, rest or "*"):
        return True
    if names[0].startswith(".") and not first.startswith("."):
        return False
    if first == "**":
        return _matches(names[1:], pattern)
    return fnmatch.fnmatchcase(names[0], first) and _matches(names[1:], rest)


def _contents(paths: Mapping[str, Path]) -> dict[str, bytes]:
    contents = {name: path.read_bytes() for name, path in paths.items()}
    return {name: content for name, content in contents.items() if content}


def _held_out(files: Mapping[str, bytes], length: int, *, by_content: bool) -> set[str]:
    """The files of low hash, and as many of the next as fill a sequence; never all of them."""
    first: dict[bytes, str] = {}
    groups: dict[str, list[str]] = {}  # files of equal content, by the first of them
    for name, content in files.items():
        leader = first.setdefault(content, name) if by_content else name
        groups.setdefault(leader, []).append(name)

    def place(name: str) -> float:
        digest = hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest()
        return int.from_bytes(digest, "big") / 2**64

    ranked = sorted(groups, key=place)
    sizes = [len(groups[name]) * (len(files[name]) + 1) for name in ranked]
    count = sum(place(name) < HELD_OUT_FRACTION for name in ranked)
    while count < len(ranked) and sum(sizes[:count]) <= length:
        count += 1
    return {name for leader in ranked[: min(count, len(ranked) - 1)] for name in groups[leader]}


def _documents(files: Mapping[str, bytes]) -> Documents:
    start = np.array([DOCUMENT_START], np.uint16)
    pieces = [
        np.concatenate([start, np.frombuffer(content, np.uint8).astype(np.uint16)])
        for content in files.values()
    ]
    return end_to_end(files, pieces, np.uint16)


def end_to_end(
    names: Iterable[str], pieces: Sequence[UInt[np.ndarray, " _"]], dtype: DTypeLike
) -> Documents:
    """Lays the tokens of documents end to end."""
    starts = np.cumsum([0, *map(len, pieces)])[: len(pieces)]
    return Documents(tuple(names), np.concatenate([np.zeros(0, dtype), *pieces]), starts)
