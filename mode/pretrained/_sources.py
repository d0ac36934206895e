"""Where each array of a model stands in a file, and how it is read from there, whole or in part."""

import itertools
import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import equinox as eqx
import jax
import numpy as np
from jax.tree_util import keystr, tree_leaves_with_path

from .._dtypes import is_shaped
from ..models import Transformer
from ._config import Config
from ._names import Names


_IN_LAYER = re.compile(r"\.stacks\[(\d+)\]\.layers\[(\d+)\]\.block\.(.+)")


@runtime_checkable
class Tensor(Protocol):
    """A tensor of a file.

    **Attributes:**

    - `shape`: its axes.
    - `kind`: the name of its number format, for errors.
    """

    shape: tuple[int, ...]
    kind: str

    def read(self, rows: slice) -> np.ndarray:
        """Returns some of its rows, as floating-point numbers."""
        ...


class Source(NamedTuple):
    """The tensors that make one array of a model.

    **Attributes:**

    - `shape`: of the array; a stack of layers has them as its first axis.
    - `names`: for each layer, or once, the names of the parts that are joined along the outputs.
    - `sizes`: outputs of each part.
    - `is_stacked`: whether the first axis is one of layers.
    - `is_transposed`: whether the file has `[out, in]` for the `[in, out]` of the model.
    """

    shape: tuple[int, ...]
    names: list[tuple[str, ...]]
    sizes: tuple[int, ...]
    is_stacked: bool
    is_transposed: bool

    @property
    def tensor_size(self) -> int:
        """Numbers in the largest of the tensors."""
        return max(math.prod(self.tensor_shape(part)) for part in range(len(self.sizes)))

    def tensor_shape(self, part: int) -> tuple[int, ...]:
        """The shape of a part in the file."""
        own = self.shape[1:] if self.is_stacked else self.shape
        shape = (*own[:-1], self.sizes[part])
        return shape[::-1] if self.is_transposed else shape


def find_sources(model: Transformer, config: Config, names: Names) -> list[Source]:
    """Returns the source of every array, in the order of `jax.tree.leaves`."""
    starts = list(itertools.accumulate((stack.depth for stack in model.stacks), initial=0))
    sources = []
    for path, leaf in tree_leaves_with_path(eqx.filter(model, is_shaped)):
        inside = _IN_LAYER.fullmatch(keystr(path))
        if inside is None:
            module, suffix = _split(keystr(path)[1:])
            name = f"{names.model[module]}.{suffix}"
            is_transposed = module == "head"
            source = Source(leaf.shape, [(name,)], leaf.shape[-1:], False, is_transposed)
        else:
            stack, place = model.stacks[int(inside[1])], int(inside[2])
            module, suffix = _split(inside[3])
            parts = names.block[module]
            first = starts[int(inside[1])] + place
            step = len(stack.layers)
            numbers = range(first, first + step * stack.repeats, step)
            named = [
                tuple(f"{names.layer.format(n)}{part}.{suffix}" for part in parts) for n in numbers
            ]
            sizes = leaf.shape[-1:]
            if len(parts) == 3:  # queries, keys and values
                heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
                sizes = tuple(number * config.head_dim for number in heads)
            source = Source(leaf.shape, named, sizes, True, names.transposed and leaf.ndim == 3)
        sources.append(source)
    return sources


def _split(path: str) -> tuple[str, str]:
    """Returns the path of a module and the name of its array; a bare array is a weight."""
    module, _, suffix = path.rpartition(".")
    return (module, suffix) if suffix in ("weight", "bias") else (path, "weight")


def check_sources(sources: list[Source], tensors: Mapping[str, Tensor], names: Names) -> None:
    """Refuses a file whose tensors are not those of the model, before anything is read.

    **Raises:** `ValueError` that lists what is missing, left over, or of another shape.
    """
    wanted = {
        name: source.tensor_shape(part)
        for source in sources
        for layer in source.names
        for part, name in enumerate(layer)
    }
    missing = sorted(set(wanted) - set(tensors))
    left = sorted(name for name in set(tensors) - set(wanted) if not name.endswith(names.ignored))
    if missing or left:
        raise ValueError(
            "the tensors of a file must be those of its configuration. Missing: "
            f"{_listed(missing)}. Left over: {_listed(left)}."
        )
    wrong = [
        f"{name} is {list(tensors[name].shape)} instead of {list(shape)}"
        for name, shape in wanted.items()
        if tensors[name].shape != shape
    ]
    if wrong:
        raise ValueError(
            f"the tensors of a file must have the shapes of its configuration: {_listed(wrong)}."
        )


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return (", ".join(names[:8]) or "none") + more


def read_array(
    source: Source, tensors: Mapping[str, Tensor], dtype: Any, index: tuple[slice, ...]
) -> np.ndarray:
    """Reads a part of an array: no more of the file than that part, but for whole rows."""
    slices = [range(size)[one] for size, one in zip(source.shape, index, strict=True)]
    result = _aligned([len(one) for one in slices], np.dtype(dtype))
    layers, own = (slices[0], slices[1:]) if source.is_stacked else (range(1), slices)
    for place, layer in enumerate(layers):
        into = result[place] if source.is_stacked else result
        start = 0
        for name, size in zip(source.names[layer], source.sizes, strict=True):
            # The outputs of this part, counted in the array and in the part.
            first, last = max(own[-1].start, start), min(own[-1].stop, start + size)
            if first < last:
                outputs = slice(first - start, last - start)
                rows = outputs if source.is_transposed or len(own) == 1 else _slice(own[0])
                read = tensors[name].read(rows)
                if source.is_transposed:
                    read = read[:, _slice(own[0])].T
                elif len(own) == 2:
                    read = read[:, outputs]
                into[..., first - own[-1].start : last - own[-1].start] = read
            start += size
    return result


def _aligned(shape: list[int], dtype: np.dtype) -> np.ndarray:
    """Allocates an array that starts at a multiple of 64 bytes: on CPU, JAX does not copy it."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(dtype).reshape(shape)


def write_tensors(source: Source, leaf: jax.Array) -> dict[str, np.ndarray]:
    """Takes an array apart into the tensors of a file."""
    cuts = list(itertools.accumulate(source.sizes))[:-1]
    tensors = {}
    for place, layer in enumerate(source.names):
        own = np.asarray(leaf[place] if source.is_stacked else leaf)
        for name, part in zip(layer, np.split(own, cuts, axis=-1), strict=True):
            tensors[name] = np.ascontiguousarray(part.T if source.is_transposed else part)
    return tensors


def _slice(some: range) -> slice:
    return slice(some.start, some.stop)
