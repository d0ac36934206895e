"""Checkpoints of a run: each is whole or absent, and the newest sound one is found again.

Orbax writes and reads them: arrays and JSON, in files that hold no code. It writes beside the place
and moves; an interrupted save leaves nothing that looks like a checkpoint. What it does not see is
damage that came later, to the bits of an array: a checksum does.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jaxtyping import Array, PyTree, UInt32


Named = dict[str, Any]


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
        """Keep the arrays of `tree`, and `notes`, anything that JSON can hold."""
        arrays = _named(tree)
        about = {"shapes": _shapes(arrays), "checksums": _checksums(arrays), "notes": notes}
        self._manager.save(
            step,
            args=ocp.args.Composite(
                arrays=ocp.args.StandardSave(arrays), about=ocp.args.JsonSave(about)
            ),
            force=True,
        )

    def newest(
        self, like: PyTree, warn: Callable[[str], None]
    ) -> tuple[int, PyTree, dict[str, Any]] | None:
        """The newest checkpoint that is sound: its step, the tree and the notes.

        **Arguments:**

        - `like`: a tree whose arrays, or their shapes, are those of the tree that was saved.
        - `warn`: told of each damaged checkpoint, which is put aside under another name.

        **Returns:** `None` where there never was one.

        **Raises:** `ValueError` for checkpoints of another tree than `like`, and where all are
        damaged.
        """
        damaged = []
        for step in reversed(self.steps):
            try:
                arrays, notes = self._restore(step, like)
            # What a damaged file raises is up to its format.
            except Exception as error:
                if isinstance(error, _OtherTree):
                    raise ValueError(str(error)) from None
                damaged.append(self.folder / str(step))
                aside = damaged[-1].with_name(f"{step}.damaged")
                damaged[-1].rename(aside)
                self._manager.reload()
                reason = str(error).strip().split("\n")[0] or type(error).__name__
                warn(f"the checkpoint of step {step} is damaged and now {aside}: {reason}")
                continue
            return step, _filled(like, arrays), notes
        if damaged:
            raise ValueError(
                f"no checkpoint in {self.folder} is sound. Delete the folder to begin again."
            )
        return None

    def _restore(self, step: int, like: PyTree) -> tuple[Named, dict[str, Any]]:
        about = self._manager.restore(step, args=ocp.args.Composite(about=ocp.args.JsonRestore()))
        about = about["about"]
        wanted = _named(like)
        _check_shapes(self.folder, step, about["shapes"], _shapes(wanted))
        structs = {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
            for name, leaf in wanted.items()
        }
        restored = self._manager.restore(
            step, args=ocp.args.Composite(arrays=ocp.args.StandardRestore(structs))
        )
        arrays = restored["arrays"]
        found = _checksums(arrays)
        wrong = [name for name, number in about["checksums"].items() if found[name] != number]
        if wrong:
            raise OSError(f"the bits of {wrong[0]} are not those that were saved")
        return arrays, about["notes"]


class _OtherTree(Exception):
    """The checkpoint is sound, but not of this tree."""


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
        return eqx.filter_eval_shape(jax.random.key_data, leaf)
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
    differences = [
        f"  {name}: {got.get(name, 'absent')} there, {wanted.get(name, 'absent')} expected"
        for name in sorted(got.keys() | wanted.keys())
        if got.get(name) != wanted.get(name)
    ]
    if differences:
        raise _OtherTree(
            f"the checkpoint of step {step} in {folder} is of another model:\n"
            + "\n".join(differences[:20])
        )


@jax.jit
def _sums(arrays: Named) -> dict[str, UInt32[Array, ""]]:
    """Of the bits of each array, each weighed by its place: on any number of devices the same."""

    def total(leaf: Array) -> UInt32[Array, ""]:
        leaf = leaf.astype(jnp.uint8) if leaf.dtype == jnp.bool_ else leaf
        width = min(4, leaf.dtype.itemsize)
        kind = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[width]
        bits = jax.lax.bitcast_convert_type(leaf, kind).reshape(-1).astype(jnp.uint32)
        place = jnp.arange(bits.size, dtype=jnp.uint32)
        return jnp.sum(bits * (2 * place + 1), dtype=jnp.uint32)

    return {name: total(leaf) for name, leaf in arrays.items()}


def _checksums(arrays: Named) -> dict[str, int]:
    return {name: int(number) for name, number in jax.device_get(_sums(arrays)).items()}
