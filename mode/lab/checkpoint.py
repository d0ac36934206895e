"""Checkpoints of a run: each is whole or absent, and the newest sound one is found again.

Orbax writes and reads them: arrays and JSON, in files that hold no code. It writes beside the place
and moves; an interrupted save leaves nothing that looks like a checkpoint. What it does not see is
damage that came later: digests of the files, written last, do.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jaxtyping import PyTree

from .devices import by_lead
from .files import differences, write_json


Named = dict[str, Any]
_DIGESTS = "digests.json"
_UNFINISHED = "it was not finished"


class Checkpoints:
    """The checkpoints in a folder, one for each of some steps.

    **Arguments:**

    - `folder`: made where it does not exist.
    - `keep`: how many to keep, the newest; older ones are deleted once a newer one is whole.
    """

    def __init__(self, folder: Path, keep: int):
        self.folder = folder.absolute()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, create=True, enable_async_checkpointing=False
        )
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    @property
    def steps(self) -> list[int]:
        """The steps there are checkpoints of, ascending."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, tree: PyTree, notes: dict[str, Any]) -> None:
        """Keep the arrays of `tree`, and `notes`, anything that JSON can hold.

        **Raises:** `OSError` where it cannot be written; earlier checkpoints are as they were.
        """
        arrays = _named(tree)
        about = {"shapes": _shapes(arrays), "notes": notes}
        args = ocp.args.Composite(
            arrays=ocp.args.StandardSave(arrays), about=ocp.args.JsonSave(about)
        )
        whole = self.folder / str(step)
        earlier = self.steps
        try:
            self._manager.save(step, args=args, force=True)
            by_lead(lambda: write_json(whole / _DIGESTS, _digests(whole)))
        # What a full disk raises is up to the writer of the file that met it.
        except Exception as error:
            kept = f"The one of step {earlier[-1]} is whole" if earlier else "There is none yet"
            reason = str(error).strip().split("\n")[0]
            raise OSError(
                f"the checkpoint of step {step} could not be saved in {self.folder}: {reason}. "
                f"{kept}; the same command goes on from there once there is room."
            ) from error

    def newest(
        self, like: PyTree, warn: Callable[[str], None], *, set_aside: bool = False
    ) -> tuple[int, PyTree, dict[str, Any]] | None:
        """The newest checkpoint that is sound: its step, the tree and the notes.

        **Arguments:**

        - `like`: a tree whose arrays, or their shapes, are those of the tree that was saved.
        - `warn`: told of each damaged checkpoint.
        - `set_aside`: whether damaged ones are renamed, so that a run can save in their place.

        **Returns:** `None` where there never was one.

        **Raises:** `ValueError` for checkpoints of another tree than `like`, and where all are
        damaged.
        """
        sound = by_lead(lambda: self._newest_sound(warn, set_aside))
        self._manager.reload()  # what the lead has set aside is gone for all
        return None if sound is None else (sound, *self._restore(sound, like))

    def _newest_sound(self, warn: Callable[[str], None], set_aside: bool) -> int | None:
        unsound: dict[int, str] = {}
        sound = None
        for step in reversed(self.steps):
            wrong = _wrong(self.folder / str(step))
            if wrong is None:
                sound = step
                break
            unsound[step] = wrong
        if sound is None and any(wrong != _UNFINISHED for wrong in unsound.values()):
            listed = "\n".join(f"  step {step}: {wrong}" for step, wrong in unsound.items())
            raise ValueError(
                f"no checkpoint in {self.folder} is sound:\n{listed}\nDelete the folder to begin "
                "again."
            )
        for step, wrong in unsound.items():
            where = self._set_aside(step) if set_aside else self.folder / str(step)
            warn(f"the checkpoint of step {step} is not used: {where} ({wrong})")
        return sound

    def _set_aside(self, step: int) -> Path:
        names = (f"{step}.damaged{suffix}" for suffix in ("", *range(2, 1000)))
        aside = next(path for path in map(self.folder.joinpath, names) if not path.exists())
        (self.folder / str(step)).rename(aside)
        return aside

    def _restore(self, step: int, like: PyTree) -> tuple[PyTree, dict[str, Any]]:
        args = ocp.args.Composite(about=ocp.args.JsonRestore())
        about = self._manager.restore(step, args=args)["about"]
        wanted = _named(like)
        _check_shapes(self.folder, step, about["shapes"], _shapes(wanted))
        structs = {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
            for name, leaf in wanted.items()
        }
        args = ocp.args.Composite(arrays=ocp.args.StandardRestore(structs))
        return _filled(like, self._manager.restore(step, args=args)["arrays"]), about["notes"]


def _digests(folder: Path) -> dict[str, str]:
    """Of every file in a checkpoint but that of the digests."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != _DIGESTS)
    digests = {}
    for path in files:
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "blake2b").hexdigest()
        digests[path.relative_to(folder).as_posix()] = digest
    return digests


def _wrong(folder: Path) -> str | None:
    """What is wrong with the files of a checkpoint."""
    try:
        saved = json.loads((folder / _DIGESTS).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return _UNFINISHED
    except ValueError:
        return f"{_DIGESTS} is not as it was saved"
    found = _digests(folder)
    for name in sorted(saved.keys() | found.keys()):
        if name not in found:
            return f"{name} is missing"
        if saved.get(name) != found[name]:
            return f"{name} is not as it was saved"
    return None


def _named(tree: PyTree) -> Named:
    """The arrays of a tree by their path in it; a key as the numbers it is made of."""
    leaves = jax.tree.leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path): _data(leaf) for path, leaf in leaves if hasattr(leaf, "dtype")
    }


def _data(leaf: Any) -> Any:
    if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return leaf
    if isinstance(leaf, jax.ShapeDtypeStruct):
        data = eqx.filter_eval_shape(jax.random.key_data, leaf)
        return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=leaf.sharding)
    return jax.random.key_data(leaf)


def _filled(like: PyTree, arrays: Named) -> PyTree:
    """`like` with the named arrays in their places."""

    def fill(path: Any, leaf: Any) -> Any:
        array = arrays.get(jax.tree_util.keystr(path))
        if array is not None and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(array)
        return leaf if array is None else array

    return jax.tree.map_with_path(fill, like)


def _shapes(arrays: Named) -> dict[str, str]:
    return {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in arrays.items()}


def _check_shapes(folder: Path, step: int, got: dict[str, str], wanted: dict[str, str]) -> None:
    found = differences(got, wanted, "expected")
    if found:
        raise ValueError(
            f"the checkpoint of step {step} in {folder} is of another model:\n"
            + "\n".join(found[:20])
        )
