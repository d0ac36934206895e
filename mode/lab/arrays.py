"""Trees of arrays in files: NumPy's format, which holds no code, checked when it is read back."""

import io
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from .files import DamagedFile, read_bytes, write_stream


def named_arrays(tree: PyTree) -> dict[str, Any]:
    """The arrays of a tree, or their shapes, by their path in it."""
    leaves = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves if hasattr(leaf, "dtype")}


def write_arrays(path: Path, arrays: Mapping[str, Any]) -> str:
    """Writes arrays by name, whole or not at all.

    **Returns:** the digest of the file.
    """
    return write_stream(path, lambda file: np.savez(file, **arrays))


def read_arrays(path: Path, remedy: str, digest: str) -> dict[str, np.ndarray]:
    """Reads arrays by name.

    **Raises:** `DamagedFile` where the file is missing or not as it was written.
    """
    content = read_bytes(path, remedy, digest=digest)
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            return dict(arrays)
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise DamagedFile(path, f"it holds no arrays ({error})", remedy) from None


def fill(like: PyTree, arrays: Mapping[str, np.ndarray], path: Path) -> PyTree:
    """`like` with the arrays of `path` in place of its own, on the same devices.

    **Raises:** `ValueError` where names, shapes or types differ.
    """
    wanted = {name: _describe(leaf) for name, leaf in named_arrays(like).items()}
    there = {name: _describe(array) for name, array in arrays.items()}
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


def _describe(leaf: Any) -> str:
    return f"{leaf.dtype}{list(leaf.shape)}"
