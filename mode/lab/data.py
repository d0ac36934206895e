"""Real text as packed byte sequences: files in, batches out, the same ones for the same seed.

A document is one file: a document-start token and then its bytes. Documents are laid end to end
and cut into sequences, so that no slot is wasted; a sequence numbers its documents from 1
(`TokenInfo` keeps attention inside each). Held-out files are apart from training files, chosen by a
hash of their names: adding a file to a corpus moves no other file to the other side.
"""

import dataclasses
import glob
import hashlib
import os
import sysconfig
from collections.abc import Mapping
from pathlib import Path

import equinox as eqx
import grain
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt16

import mode


DOCUMENT_START = 256
VOCAB = 257
HELD_OUT_SHARE = 0.1
# Tests and installed packages are not the library; `encodings` and `pydoc_data` are generated
# tables, which any model predicts from a few lines.
_SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"} | {
    "lib2to3",
    "encodings",
    "pydoc_data",
}

Sample = dict[str, Int[np.ndarray, "*batch sample"]]


@dataclasses.dataclass(frozen=True)
class Documents:
    """Documents laid end to end.

    **Attributes:**

    - `names`: the file of each document, relative to the corpus.
    - `tokens`: all their tokens, bytes and document starts.
    - `starts`: where in `tokens` each document begins.
    """

    names: tuple[str, ...]
    tokens: UInt16[np.ndarray, " tokens"]
    starts: Int[np.ndarray, " documents"]


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Training and held-out documents, which share no file."""

    train: Documents
    held_out: Documents

    @property
    def fingerprint(self) -> str:
        """Equal for equal names and contents on both sides."""
        digest = hashlib.blake2b(digest_size=8)
        for side in (self.train, self.held_out):
            digest.update("\0".join(side.names).encode("utf-8", "surrogateescape"))
            digest.update(side.tokens.tobytes())
        return digest.hexdigest()


def read_corpus(data: str | None, *, length: int) -> Corpus:
    """Read files and set some of them apart.

    About a tenth of the files is held out: those whose name has a low hash, and then as many more
    as fill one sequence. Of a single file, the last tenth is held out.

    **Arguments:**

    - `data`: a glob, `**` recursive, such as `"texts/**/*.txt"`; `None` is the source of the Python
        standard library.
    - `length`: tokens in one sequence; each side must fill at least one.

    **Raises:** `ValueError` for a glob that matches no file, or files too small for one sequence.
    """
    files = _standard_library() if data is None else _matching(data)
    if len(files) == 1:
        ((name, content),) = files.items()
        cut = len(content) - round(HELD_OUT_SHARE * len(content))
        files = {f"{name} (start)": content[:cut], f"{name} (end)": content[cut:]}
        held_out = {f"{name} (end)"}
    else:
        held_out = _held_out({name: len(content) + 1 for name, content in files.items()}, length)
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
    """All files that a glob matches, none of them set apart.

    **Raises:** `ValueError` for a glob that matches no file.
    """
    return _documents(_matching(data))


def _standard_library() -> dict[str, bytes]:
    root = Path(sysconfig.get_path("stdlib"))
    paths = (path for path in root.rglob("*.py") if path.is_file())
    names = sorted((path.relative_to(root).as_posix(), path) for path in paths)
    return _contents({name: path for name, path in names if _SKIPPED.isdisjoint(name.split("/"))})


def _matching(data: str) -> dict[str, bytes]:
    paths = sorted(path for path in glob.glob(data, recursive=True) if os.path.isfile(path))
    # Names start after the fixed part of the glob: moving the corpus changes no name.
    fixed = Path(*_until_magic(Path(data).parts))
    names = {os.path.relpath(path, fixed): Path(path) for path in paths}
    files = _contents(names)
    if not files:
        raise ValueError(
            f"`data` must match at least one file that is not empty, got {data!r} in "
            f"{os.getcwd()}. Quote the glob, and match files rather than folders: "
            '"texts/**/*.txt".'
        )
    return files


def _until_magic(parts: tuple[str, ...]) -> list[str]:
    fixed = []
    for part in parts[:-1]:
        if glob.has_magic(part):
            break
        fixed.append(part)
    return fixed


def _contents(paths: Mapping[str, Path]) -> dict[str, bytes]:
    contents = {name: path.read_bytes() for name, path in paths.items()}
    return {name: content for name, content in contents.items() if content}


def _held_out(sizes: Mapping[str, int], length: int) -> set[str]:
    """The files of low hash, and as many of the next as fill a sequence; never all of them."""

    def place(name: str) -> float:
        digest = hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest()
        return int.from_bytes(digest, "big") / 2**64

    ranked = sorted(sizes, key=place)
    count = sum(place(name) < HELD_OUT_SHARE for name in ranked)
    while count < len(ranked) and sum(sizes[name] for name in ranked[:count]) <= length:
        count += 1
    return set(ranked[: min(count, len(ranked) - 1)])


def _documents(files: Mapping[str, bytes]) -> Documents:
    start = np.array([DOCUMENT_START], np.uint16)
    pieces = [
        np.concatenate([start, np.frombuffer(content, np.uint8).astype(np.uint16)])
        for content in files.values()
    ]
    sizes = [len(piece) for piece in pieces]
    tokens = np.concatenate([np.zeros(0, np.uint16), *pieces])
    return Documents(tuple(files), tokens, np.cumsum([0, *sizes[:-1]])[: len(sizes)])


class Sequences:
    """Documents cut into sequences: a random access source for grain.

    Sample `i` holds `length + 1` tokens from `i * length` on, as the last target of a sequence is
    the first input of the next: every byte is a target once. The last sample ends in padding.
    """

    def __init__(self, documents: Documents, length: int):
        self.documents = documents
        self.length = length

    def __len__(self) -> int:
        return -(-(len(self.documents.tokens) - 1) // self.length)

    def __getitem__(self, index: int) -> Sample:
        first = index * self.length
        tokens = self.documents.tokens[first : first + self.length + 1].astype(np.int32)
        places = np.arange(first, first + len(tokens))
        document = np.searchsorted(self.documents.starts, places, side="right")
        segment_ids = (document - document[0] + 1).astype(np.int32)
        padding = (0, self.length + 1 - len(tokens))
        return {"tokens": np.pad(tokens, padding), "segment_ids": np.pad(segment_ids, padding)}

    def __repr__(self) -> str:
        return f"Sequences({len(self.documents.names)} documents, length={self.length})"


def batches(
    documents: Documents,
    *,
    length: int,
    batch: int,
    seed: int,
    part: int = 0,
    parts: int = 1,
) -> grain.DatasetIterator[Sample]:
    """An endless, shuffled stream of batches, in another order every epoch.

    **Arguments:**

    - `batch`: sequences in a whole batch.
    - `part`, `parts`: the rows to read, one of so many equal parts of every batch, by number; the
        parts of all numbers are the batch, and no sequence is read in two of them.

    `get_state()` and `set_state(state)` of the result save and restore where it stands, which is
    the same for all parts.
    """
    dataset = grain.MapDataset.source(Sequences(documents, length)).seed(seed)
    dataset = dataset.shuffle().repeat().batch(batch // parts, drop_remainder=True)[part::parts]
    # Read in the calling thread: cutting a batch from memory takes a fraction of a millisecond,
    # less than a queue would, and a small machine has no core to spare for it.
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)))


def held_out_batches(
    documents: Documents, *, length: int, batch: int, sequences: int
) -> list[Sample]:
    """At most `sequences` sequences, evenly spread over the documents, in whole batches."""
    source = Sequences(documents, length)
    count = max(1, min(sequences, len(source)) // batch) * batch
    places = np.linspace(0, len(source) - 1, count).round().astype(int)
    samples = [source[int(place)] for place in places]
    return [
        {name: np.stack([s[name] for s in samples[first : first + batch]]) for name in samples[0]}
        for first in range(0, count, batch)
    ]


class Batch(eqx.Module):
    """Inputs, what they should predict, and which of the predictions count.

    **Attributes:**

    - `inputs`, `targets`: `[batch, tokens]`, shifted by one token.
    - `weights`: `[batch, tokens]`, 1 where the target is in the document of its input, else 0.
    - `info`: positions and documents of the inputs.
    """

    inputs: Int[Array, "batch tokens"]
    targets: Int[Array, "batch tokens"]
    weights: Float[Array, "batch tokens"]
    info: mode.TokenInfo

    @staticmethod
    def of(
        sample: Mapping[str, Int[Array, "batch sample"] | Int[np.ndarray, "batch sample"]],
    ) -> "Batch":
        """From `length + 1` tokens and their segment ids."""
        tokens, segment_ids = jnp.asarray(sample["tokens"]), jnp.asarray(sample["segment_ids"])
        before, after = segment_ids[:, :-1], segment_ids[:, 1:]
        weights = ((before == after) & (after != 0)).astype(jnp.float32)
        return Batch(tokens[:, :-1], tokens[:, 1:], weights, mode.TokenInfo.packed(before))


def shape_of_batch(length: int, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
    """The shape of a sample batch, for what only needs shapes."""
    like = jax.ShapeDtypeStruct((batch, length + 1), jnp.int32)
    return {"tokens": like, "segment_ids": like}
