"""Checkpoints of a run: each is whole or absent, and the newest sound one is found again.

A checkpoint is a folder of arrays, named after its step, and beside it a record, written last, with
the digests of its files, the run they belong to, and its losses. Arrays without a record are the
rest of a save that was killed.
"""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar

import jax
import numpy as np
import pydantic
from jaxtyping import PyTree

from .array_files import check_files, restore_arrays, save_arrays
from .commands import Training
from .devices import by_lead
from .files import DamagedFile, FloatOrNaN, Record, read_record, write_record


class TrainSettings(Record):
    """The settings of a run of `mode-lab train`, and the fingerprint of its text."""

    format = "mode-lab train"
    version = 2

    options: Training
    corpus: str


class AbstractNotes(Record):
    """A checkpoint but for its arrays: it knows their dtypes and shapes, and digests of files."""

    arrays: Mapping[str, str] = pydantic.Field(default_factory=dict)
    files: Mapping[str, str] = pydantic.Field(default_factory=dict)


class Notes(AbstractNotes):
    """Those of a run of `mode-lab train`: the settings, and its progress."""

    format = "mode-lab checkpoint"
    version = 3

    settings: TrainSettings
    stream: dict[str, pydantic.JsonValue]
    losses: tuple[FloatOrNaN, ...]


N = TypeVar("N", bound=AbstractNotes)


class Checkpoints(Generic[N]):
    """The checkpoints in a folder, of which the newest `keep` are kept, with notes of one kind.

    Where several processes share a run, all of them call its methods, on a file system that they
    share.
    """

    def __init__(self, folder: Path, keep: int, kind: type[N] = Notes):
        if folder.exists() and not folder.is_dir():
            raise DamagedFile(folder, "it is a file, not a folder of checkpoints", "Move it away.")
        self.folder = folder.absolute()
        self.keep = keep
        self.kind = kind

    @property
    def steps(self) -> list[int]:
        """The steps that have a checkpoint, ascending."""
        return sorted(int(path.stem) for path in self._paths() if path.suffix == ".json")

    def _paths(self) -> list[Path]:
        """Folders and records of checkpoints, and what a killed save left of them."""
        paths = self.folder.iterdir() if self.folder.exists() else ()
        return [path for path in paths if path.stem.isdecimal()]

    def _remove(self, unwanted: Callable[[Path], bool]) -> None:
        """Removes some of the paths: records first, as arrays without one are no checkpoint."""
        for path in sorted(self._paths(), key=lambda path: path.suffix != ".json"):
            if not unwanted(path):
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()

    def save(self, step: int, tree: PyTree, notes: N) -> None:
        """Saves the arrays of `tree`, and the notes.

        **Raises:** `OSError` where they cannot be written; earlier checkpoints are as they were.
        """
        earlier, arrays = self.steps, _named_arrays(tree)

        def of_step(path: Path) -> bool:
            return int(path.stem) == step

        def prepare() -> None:
            self.folder.mkdir(exist_ok=True)
            self._remove(of_step)
            needed = sum(array.nbytes for array in arrays.values())
            free = shutil.disk_usage(self.folder).free
            if needed > free:
                raise OSError(f"it takes {needed:,} bytes, and {free:,} are free.")

        def write() -> None:
            record = notes.model_copy(update={"arrays": _described(arrays), "files": files})
            write_record(self.folder / f"{step}.json", record)
            # Later steps than this one are of damaged checkpoints.
            kept = [one for one in self.steps if one <= step][-self.keep :]
            finished = {str(one) for one in kept} | {f"{one}.json" for one in kept}
            self._remove(lambda path: path.name not in finished)

        try:
            by_lead(prepare)
            files = save_arrays(self.folder / str(step), arrays)
            by_lead(write)
        except (OSError, ValueError, RuntimeError) as error:
            by_lead(lambda: self._remove(of_step))
            state = f"The one of step {earlier[-1]} is whole" if earlier else "There is none yet"
            reason = str(error).splitlines()[0]
            raise OSError(
                f"the checkpoint of step {step} could not be saved in {self.folder}: {reason} "
                f"{state}; the same command goes on from there once there is room."
            ) from error

    def newest(self, like: PyTree, warn: Callable[[str], None]) -> tuple[int, PyTree, N] | None:
        """Restores the newest checkpoint that is sound: its step, the tree and the notes.

        **Arguments:**

        - `like`: a tree whose arrays, or their shapes, are those of the tree that was saved. The
            restored ones are sharded as these are, on whatever mesh.
        - `warn`: told of each checkpoint that is not used.

        **Returns:** `None` where none was ever finished.

        **Raises:** `ValueError` where all are damaged, or of another tree than `like`.
        """
        errors: list[DamagedFile] = []
        for step in reversed(self.steps):
            path = self.folder / str(step)
            try:
                notes = read_record(self.folder / f"{step}.json", self.kind)
                check_files(path, notes.files)
            except DamagedFile as error:
                errors.append(error)
                continue
            for error in errors:
                warn(f"a checkpoint is not used: {error.path}: {error.what}")
            return step, _restore(path, like, notes.arrays), notes
        if errors:
            reasons = "; ".join(
                f"{error.path.relative_to(self.folder)}: {error.what}" for error in errors
            )
            remedy = "Delete the folder to begin again."
            raise DamagedFile(self.folder, f"no checkpoint is sound ({reasons})", remedy)
        return None


def _named_arrays(tree: PyTree) -> dict[str, Any]:
    """The arrays of a tree, or their shapes, by their path in it."""
    leaves = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves if hasattr(leaf, "dtype")}


def _described(arrays: Mapping[str, Any]) -> dict[str, str]:
    return {name: f"{np.dtype(x.dtype)}{list(x.shape)}" for name, x in arrays.items()}


def _restore(path: Path, like: PyTree, there: Mapping[str, str]) -> PyTree:
    """`like` with the arrays of a checkpoint in place of its own, sharded as they are."""
    arrays = _named_arrays(like)
    wanted = _described(arrays)
    for name in sorted(wanted.keys() | there.keys()):
        one, other = there.get(name, "absent"), wanted.get(name, "absent")
        if one != other:
            raise ValueError(f"{path} is of another model: {name} is {one}, not {other}.")
    restored = restore_arrays(path, arrays)

    def replace(keys: Any, leaf: Any) -> Any:
        return restored.get(jax.tree_util.keystr(keys), leaf)

    return jax.tree.map_with_path(replace, like)
