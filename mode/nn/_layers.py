"""Layers without a router: one block for every token, once or in a loop, and layers in turn."""

from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from .._checks import check_count, type_name
from .._token_info import TokenInfo
from .._types import Hidden, Key
from ..routing import Routings
from ._cache import Cache
from ._contracts import (
    AbstractLayer,
    Block,
    Caches,
    Layer,
    LayerResult,
    check_block,
    check_layer,
    run_block,
)
from ._rounds import check_round_block


class Residual(AbstractLayer):
    r"""A block applied to every token: $x + f(x)$. The dense layer.

    Padding passes by unchanged, and the block sees zeros in its place, so that no number in the
    padding can reach a real token or a gradient.

    **Arguments:**

    - `block`: any block.

    **Raises:** `ValueError` for what is no block; at the call, for one whose result is not an
    update of the shape of `x` and a tuple of routings.

    >>> import jax, jax.numpy as jnp, mode
    >>> block = mode.TransformerBlock(32, num_heads=4, key=jax.random.key(0))
    >>> hidden, routings = mode.Residual(block)(jnp.ones((4, 64, 32)))
    >>> hidden.shape, routings
    ((4, 64, 32), ())
    """

    block: Block

    def __check_init__(self):
        check_block("block", self.block)

    def extend(self, x: Hidden, info: TokenInfo, cache: Caches, *, key: Key = None) -> LayerResult:
        """Maps hidden states, `[*groups, tokens, dim]`, to hidden states. See `AbstractLayer`."""
        assert isinstance(cache, Cache)
        with jax.named_scope("mode.Residual"):
            real = info.valid[..., None]
            inputs = jnp.where(real, x, 0)
            update, routings, entries = run_block("block", self.block, inputs, info, cache, key)
            hidden = jnp.where(real, x + update.astype(x.dtype), x)
            return hidden, routings, Cache.of_tokens(entries, info, cache.max_tokens)


class Sequential(AbstractLayer):
    """Layers in turn, as one layer.

    For a transformer block whose attention and feed-forward are routed apart:
    `TransformerBlock.split` shows it. Layers that repeat compile faster as a `LayerStack`.

    **Arguments:**

    - `layers`: a list of layers, at least one.

    **Raises:** `ValueError` for an empty list, or what is no layer.

    **Returns**, when called: hidden states, and the routings of all layers in order.
    """

    layers: tuple[Layer, ...]

    def __init__(self, layers: Sequence[Layer]):
        if not (isinstance(layers, Sequence) and layers):
            raise ValueError(
                f"`layers` must be a list of layers, at least one, got {type_name(layers)}."
            )
        for layer in layers:
            check_layer("layers", layer, "hold")
        self.layers = tuple(layers)

    def extend(self, x: Hidden, info: TokenInfo, cache: Caches, *, key: Key = None) -> LayerResult:
        """Runs the layers in turn. See `AbstractLayer`. The cache is a tuple of theirs."""
        keys = None if key is None else jax.random.split(key, len(self.layers))
        caches = (cache,) * len(self.layers) if isinstance(cache, Cache) else cache
        return run_layers(self.layers, x, info, caches, keys)


class Loop(AbstractLayer):
    r"""Applies one block to every token several times: $x \leftarrow x + f(x)$, `repeats` times.

    The layer without a router that `Recursion` is to be compared with. Each round has keys of its
    own.

    **Arguments:**

    - `block`: any block without routers of its own.
    - `repeats`: number of rounds.

    **Raises:** `ValueError` for what is no such block, or `repeats` below 1.

    >>> import jax, jax.numpy as jnp, mode
    >>> block = mode.TransformerBlock(32, num_heads=4, key=jax.random.key(0))
    >>> hidden, routings = mode.Loop(block, repeats=3)(jnp.ones((4, 64, 32)))
    >>> hidden.shape, routings
    ((4, 64, 32), ())

    *Source:* arXiv:1807.03819, section 2.
    """

    block: Block
    repeats: int = eqx.field(static=True)

    def __check_init__(self):
        check_block("block", self.block)
        check_round_block("Loop", self.block)
        check_count("repeats", self.repeats, 1)

    def extend(self, x: Hidden, info: TokenInfo, cache: Caches, *, key: Key = None) -> LayerResult:
        """Runs all rounds. See `AbstractLayer`. The cache is a tuple of one for each round."""
        keys = None if key is None else jax.random.split(key, self.repeats)
        caches = (cache,) * self.repeats if isinstance(cache, Cache) else cache
        return run_layers([Residual(self.block)] * self.repeats, x, info, caches, keys)


def run_layers(
    layers: Sequence[Layer], x: Hidden, info: TokenInfo, caches: tuple[Any, ...], keys: Any
) -> tuple[Hidden, Routings, tuple[Any, ...]]:
    """Runs layers in turn, each with its cache and its key; `keys` may be `None`."""
    keys = [None] * len(layers) if keys is None else keys
    routings: Routings = ()
    news: tuple[Any, ...] = ()
    for layer, cache, key in zip(layers, caches, keys, strict=True):
        if isinstance(layer, AbstractLayer):
            x, routed, new = layer.extend(x, info, cache, key=key)
        elif isinstance(cache, Cache) and not cache.is_kept:
            x, routed = layer(x, info, key=key)
            new = ()
        else:
            raise ValueError(
                f"`model` must be able to decode, but its layer `{type(layer).__name__}` is no "
                "`AbstractLayer` with a method `extend`. Build it from `Residual` and "
                "`MixtureOfDepths`, around blocks of your own."
            )
        routings += routed
        news += (new,)
    return x, routings, news
