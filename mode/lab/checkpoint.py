"""Checkpoints of a run: each is whole or absent, and the newest sound one is found again.

A checkpoint is two files named after its step: the arrays, in NumPy's format, which holds no code,
and a record, written last, with their digest, the run they belong to, and its losses. Arrays
without a record are the rest of a save that was killed. The state is gathered on the host of each
process; the lead writes it.
"""

import io
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar

import jax
import numpy as np
import pydantic
from jaxtyping import PyTree

from .commands import Training
from .devices import by_lead, to_host
from .files import (
    DamagedFile,
    FloatOrNaN,
    Record,
    read_bytes,
    read_record,
    write_record,
    write_stream,
)


class TrainSettings(Record):
    """The settings of a run of `mode-lab train`, and the fingerprint of its text."""

    format = "mode-lab train"
    version = 2

    options: Training
    corpus: str


class AbstractNotes(Record):
    """A checkpoint but for its arrays, whose digest it knows."""

    digest: str = ""


class Notes(AbstractNotes):
    """Those of a run of `mode-lab train`: the settings, and its progress."""

    format = "mode-lab checkpoint"
    version = 2

    settings: TrainSettings
    stream: dict[str, pydantic.JsonValue]
    losses: tuple[FloatOrNaN, ...]


N = TypeVar("N", bound=AbstractNotes)


class Checkpoints(Generic[N]):
    """The checkpoints in a folder, of which the newest `keep` are kept, with notes of one kind."""

    def __init__(self, folder: Path, keep: int, kind: type[N] = Notes):
        if folder.exists() and not folder.is_dir():
            raise DamagedFile(folder, "it is a file, not a folder of checkpoints", "Move it away.")
        self.folder = folder
        self.keep = keep
        self.kind = kind

    @property
    def steps(self) -> list[int]:
        """The steps that have a checkpoint, ascending."""
        return sorted(int(path.stem) for path in self._paths() if path.suffix == ".json")

    def _paths(self) -> list[Path]:
        paths = self.folder.iterdir() if self.folder.exists() else ()
        return [path for path in paths if path.stem.isdecimal()]

    def save(self, step: int, tree: PyTree, notes: N) -> None:
        """Saves the arrays of `tree`, and the notes.

        **Raises:** `OSError` where they cannot be written; earlier checkpoints are as they were.
        """
        arrays, earlier = to_host(_named_arrays(tree)), self.steps

        def write() -> None:
            self.folder.mkdir(exist_ok=True)
            path = self.folder / f"{step}.npz"
            digest = write_stream(path, lambda file: np.savez(file, **arrays))
            write_record(path.with_suffix(".json"), notes.model_copy(update={"digest": digest}))
            # Later steps than this one are of damaged checkpoints.
            kept = [one for one in self.steps if one <= step][-self.keep :]
            for path in self._paths():
                if int(path.stem) not in kept:
                    path.unlink()

        try:
            by_lead(write)
        except OSError as error:
            state = f"The one of step {earlier[-1]} is whole" if earlier else "There is none yet"
            raise OSError(
                f"the checkpoint of step {step} could not be saved: {error} {state}; the same "
                "command goes on from there once there is room."
            ) from error

    def newest(self, like: PyTree, warn: Callable[[str], None]) -> tuple[int, PyTree, N] | None:
        """Restores the newest checkpoint that is sound: its step, the tree and the notes.

        **Arguments:**

        - `like`: a tree whose arrays, or their shapes, are those of the tree that was saved.
        - `warn`: told of each checkpoint that is not used.

        **Returns:** `None` where none was ever finished.

        **Raises:** `ValueError` where all are damaged, or of another tree than `like`.
        """
        errors: list[DamagedFile] = []
        for step in reversed(self.steps):
            path = self.folder / f"{step}.npz"
            try:
                notes = read_record(path.with_suffix(".json"), self.kind)
                arrays = _read_arrays(path, notes.digest)
            except DamagedFile as error:
                errors.append(error)
                continue
            for error in errors:
                warn(f"a checkpoint is not used: {error.path}: {error.what}")
            return step, _fill(like, arrays, path), notes
        if errors:
            reasons = "; ".join(f"{error.path.name}: {error.what}" for error in errors)
            remedy = "Delete the folder to begin again."
            raise DamagedFile(self.folder, f"no checkpoint is sound ({reasons})", remedy)
        return None


def _named_arrays(tree: PyTree) -> dict[str, Any]:
    """The arrays of a tree, or their shapes, by their path in it."""
    leaves = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves if hasattr(leaf, "dtype")}


def _read_arrays(path: Path, digest: str) -> dict[str, np.ndarray]:
    content = read_bytes(path, "", digest=digest)
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            return dict(arrays)
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise DamagedFile(path, f"it holds no arrays ({error})", "") from None


def _fill(like: PyTree, arrays: Mapping[str, np.ndarray], path: Path) -> PyTree:
    """`like` with the arrays of `path` in place of its own, on the same devices."""
    wanted, there = (
        {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in some.items()}
        for some in (_named_arrays(like), arrays)
    )
    for name in sorted(wanted.keys() | there.keys()):
        one, other = there.get(name, "absent"), wanted.get(name, "absent")
        if one != other:
            raise ValueError(f"{path} is of another model: {name} is {one}, not {other}.")

    def place(keys: Any, leaf: Any) -> Any:
        if not hasattr(leaf, "dtype"):
            return leaf
        array = arrays[jax.tree_util.keystr(keys)]
        sharding = getattr(leaf, "sharding", None)
        if sharding is None:
            return jax.numpy.asarray(array)
        return jax.make_array_from_callback(array.shape, sharding, lambda part: array[part])

    return jax.tree.map_with_path(place, like)
