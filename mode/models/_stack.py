"""A stack: a few layers, repeated under one scan."""

from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
from jaxtyping import Array, PRNGKeyArray, PyTree

from .._checks import can_be_called, check_count, type_name
from .._token_info import TokenInfo
from .._types import Hidden, Key
from ..nn import (
    AbstractBlock,
    AbstractLayer,
    Cache,
    Caches,
    Layer,
    Routings,
    check_layer,
    run_layers,
)
from ..parallel import all_gather_parameters, role_field, shard_batch


MakeLayer = Callable[[PRNGKeyArray], Layer]
Period = Sequence[MakeLayer]
Extended = tuple[Hidden, Routings, tuple[Any, ...]]


class LayerStack(AbstractLayer):
    """A period of layers, repeated with parameters of their own: one scan over the repeats.

    Compiling takes as long for 48 layers as for 4. The routings come one per router of the period,
    with a leading axis of repeats. `stack_layers` builds one.

    **Attributes:**

    - `repeats`: how often the period is repeated.
    - `layers`: the layers of one period; every array has a leading axis of `repeats`.
    - `remat`: whether the backward pass recomputes each repeat instead of storing its activations.
    """

    repeats: int = eqx.field(static=True)
    layers: tuple[Layer, ...] = role_field("layers", stacked=True)
    remat: bool = eqx.field(static=True, default=False)

    @property
    def depth(self) -> int:
        """Number of layers."""
        return len(self.layers) * self.repeats

    def extend(self, x: Hidden, info: TokenInfo, cache: Caches, *, key: Key = None) -> Extended:
        """Runs all layers in turn. See `AbstractLayer`.

        After earlier tokens, `cache` is a tuple of one cache per layer of the period. Each array of
        a routing or a new cache has a leading axis of repeats.
        """
        arrays, rest = eqx.partition(self.layers, eqx.is_array)
        keys = None if key is None else jax.random.split(key, (self.repeats, len(self.layers)))
        is_kept = not isinstance(cache, Cache) or cache.is_kept
        caches = (cache,) * len(self.layers) if isinstance(cache, Cache) else cache

        def repeat(x: Hidden, one: tuple[PyTree, Any, Any]) -> tuple[Hidden, tuple[Any, Any]]:
            arrays, caches, keys = one
            layers = eqx.combine(all_gather_parameters(arrays), rest)
            x, routings, news = run_layers(layers, x, info, caches, keys)
            # In training nothing is kept: entries must not leave the scan, which would store them.
            return shard_batch(x), (routings, news if is_kept else ())

        if self.remat:
            repeat = jax.checkpoint(repeat, prevent_cse=False)
        x, (routings, news) = jax.lax.scan(
            repeat, x, (arrays, caches, keys), length=self.repeats, unroll=self.repeats == 1
        )
        return x, routings, news


def stack_layers(
    period: Period, repeats: int = 1, *, remat: bool = False, key: PRNGKeyArray
) -> LayerStack:
    """Builds a stack of layers.

    **Arguments:**

    - `period`: functions, each of which builds a layer from a key, from bottom to top. The layers
        that one function builds must have the same structure for every key.
    - `repeats`, `remat`: of `LayerStack`.

    **Raises:** `ValueError` for an empty period, `repeats` below 1, or what builds no layer.

    >>> import jax, jax.numpy as jnp, mode
    >>> dense = lambda key: mode.Residual(mode.TransformerBlock(32, 4, key=key))
    >>> stack = mode.stack_layers([dense], 6, key=jax.random.key(0))
    >>> hidden, routings = stack(jnp.ones((2, 16, 32)))
    >>> hidden.shape, stack.depth
    ((2, 16, 32), 6)
    """
    if not isinstance(period, Sequence) or not period:
        raise ValueError(
            "`period` must be a list of functions, at least one, each of which builds a layer from "
            f"a key, got {period!r}."
        )
    repeats = check_count("repeats", repeats, 1)
    keys = jax.random.split(key, (repeats, len(period)))
    layers = tuple(_build(make, keys[:, index]) for index, make in enumerate(period))
    return LayerStack(repeats, layers, remat)


def _build(make: MakeLayer, keys: Array) -> Layer:
    """Builds a layer for each key, stacked, and checks what builds it."""
    if isinstance(make, AbstractLayer | AbstractBlock) or not can_be_called(make, None):
        raise ValueError(
            "`period` must hold functions, each of which builds a layer from a key, got "
            f"{type_name(make)}. Write `lambda key: Residual(TransformerBlock(..., key=key))`."
        )
    # Under `vmap`, as experts are: the arrays come stacked, everything else comes once.
    layer = eqx.filter_vmap(make)(keys)
    check_layer("period", layer)
    return layer
