"""The cache of a block or layer: what it needs from earlier tokens, and how new tokens join it."""

from collections.abc import Callable
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PyTree

from .._dtypes import cast_floating
from .._token_info import TokenInfo
from .._types import Sequences


class Cache(eqx.Module):
    """What one block keeps of the tokens that it processed.

    `extend(x, info, cache)` reads it and returns the entries of the new tokens alone; decoding
    appends them. In an empty cache, before the first token, all but `max_tokens` is `None`. Layers
    that are scanned over share one cache; each of its arrays has a leading axis of layers.

    **Attributes:**

    - `entries`: the tree of arrays that the block returned, `[batch, ..., slots, features]`, of the
        tokens so far, in time order, and then of empty slots.
    - `info`: positions and segments of these tokens, `[batch, slots]`; segment 0 marks an empty
        slot.
    - `length`: `[batch]`, how many tokens there are.
    - `max_tokens`: how many tokens the block will process in all, a Python integer; `None` for a
        whole sequence, after which nothing follows and of which nothing is kept.
    - `dtype`: of an empty cache: what floating entries are kept in; `None` for that of the block.

    This block adds the mean of all tokens so far:

    >>> import equinox as eqx, jax, jax.numpy as jnp, mode
    >>> class Mean(mode.AbstractBlock):
    ...     def extend(self, x, info, cache, *, key=None):
    ...         real = jnp.where(info.valid[..., None], x, 0)
    ...         total, count = jnp.cumsum(real, -2), jnp.cumsum(info.valid, -1)
    ...         if not cache.is_empty:  # known when the program is traced
    ...             earlier = jnp.where(cache.info.valid[..., None], cache.entries, 0)
    ...             total += earlier.sum(-2, keepdims=True)
    ...             count += cache.length[:, None]
    ...         return total / jnp.maximum(count, 1).astype(x.dtype)[..., None], (), real
    >>> make = lambda key: mode.MixtureOfDepths(Mean(), 32, capacity=0.5, key=key)
    >>> model = mode.make_causal(mode.Transformer(256, 32, [make], 2, key=jax.random.key(0)))
    >>> tokens = jax.random.randint(jax.random.key(1), (3, 24), 0, 256)
    >>> mode.testing.assert_decodes(model, tokens)
    """

    entries: PyTree
    info: TokenInfo | None
    length: Int[Array, "*layers_and_batch"] | None
    max_tokens: int | None = eqx.field(static=True)
    dtype: DTypeLike | None = eqx.field(static=True, default=None)

    @staticmethod
    def empty(max_tokens: int | None = None, dtype: DTypeLike | None = None) -> "Cache":
        """A cache before the first token."""
        return Cache(None, None, None, max_tokens, dtype)

    @staticmethod
    def of_tokens(entries: PyTree, info: TokenInfo, max_tokens: int | None) -> "Cache":
        """The entries of some tokens; those of segment 0 are left out when they are appended."""
        # Values are in the entries as the block weighed them; layouts are for whole sequences.
        info = TokenInfo(info.positions, info.segment_ids)
        return Cache(entries, info, jnp.sum(info.valid, axis=-1, dtype=jnp.int32), max_tokens)

    @property
    def is_empty(self) -> bool:
        """Whether the new tokens are the first ones. Known at trace time."""
        return self.info is None

    @property
    def is_kept(self) -> bool:
        """Whether later tokens follow, so that entries are needed. Known at trace time."""
        return self.max_tokens is not None

    def part(self, index: int) -> "Cache":
        """The cache of one of several blocks, whose entries were returned as a tuple."""
        if self.is_empty:
            return self
        return Cache(self.entries[index], self.info, self.length, self.max_tokens)

    def append(self, new: "Cache", after: Float[Array, "batch ..."]) -> "Cache":
        """The cache with the new tokens behind those that it has; those of segment 0 are left out.

        One scatter per array, in place where the cache is donated.

        **Arguments:**

        - `new`: entries of the new tokens, `[*layers, batch, ..., new, features]`.
        - `after`: what was computed from this cache. The write waits for it.
        """
        if self.info is None or self.length is None:
            return new._padded(self.dtype)
        assert new.info is not None
        assert new.length is not None
        valid = new.info.valid
        order = jnp.cumsum(valid, axis=-1, dtype=jnp.int32) - 1
        # Every slot beyond the end is another one, as the indices of the scatter must be unique.
        beyond = self.info.valid.shape[-1] + jnp.arange(valid.shape[-1], dtype=jnp.int32)
        beyond = jnp.broadcast_to(beyond, valid.shape)
        # Adds 0, which XLA cannot know. Its CPU backend orders a write behind a read only where the
        # one depends on the other, and would copy the cache twice in every step to be safe. It
        # removes a `jax.lax.optimization_barrier` before it inserts copies: with one, a step takes
        # three times as long.
        rows = after.reshape(after.shape[0], -1)[:, :1]
        zero = jnp.broadcast_to((jnp.isnan(rows) & (rows == 0)).astype(jnp.int32), valid.shape)
        slots = jnp.where(valid, self.length[..., None] + order, beyond) + zero

        def write(leaf: Array, values: Array, axis: int) -> Array:
            return jax.lax.platform_dependent(
                leaf,
                values.astype(leaf.dtype),
                slots,
                tpu=partial(_write_vectors, axis=axis),
                default=partial(_write_tokens, axis=axis),
            )

        return Cache(
            jax.tree.map(lambda leaf, part: write(leaf, part, -2), self.entries, new.entries),
            jax.tree.map(lambda leaf, part: write(leaf, part, -1), self.info, new.info),
            self.length + new.length,
            self.max_tokens,
        )

    def rewind(self, lengths: Sequences) -> "Cache":
        """The cache without the tokens at positions from `lengths` on."""
        if self.info is None:
            return self
        positions, segment_ids = self.info.positions, self.info.segment_ids
        kept = positions < jnp.broadcast_to(lengths[:, None], positions.shape)
        info = TokenInfo(positions, jnp.where(kept, segment_ids, 0))
        return Cache.of_tokens(self.entries, info, self.max_tokens)

    def _padded(self, dtype: DTypeLike | None) -> "Cache":
        """Makes room for `max_tokens` tokens, of which these are the first, in a dtype."""
        assert self.max_tokens is not None
        slots = self.max_tokens

        def pad(leaf: Array, axis: int) -> Array:
            widths = [(0, 0)] * leaf.ndim
            widths[axis] = (0, slots - leaf.shape[axis])
            return jnp.pad(leaf, widths)

        return Cache(
            jax.tree.map(
                lambda leaf: pad(leaf, -2),
                self.entries if dtype is None else cast_floating(self.entries, dtype),
            ),
            jax.tree.map(lambda leaf: pad(leaf, -1), self.info),
            self.length,
            self.max_tokens,
        )


def _write_tokens(leaf: Array, values: Array, slots: Array, axis: int) -> Array:
    """Writes what all heads have of a token at once."""
    leading = jnp.indices(slots.shape, sparse=True)[:-1]
    rest: list[Any] = [slice(None)] * (leaf.ndim - len(leading))
    rest[axis] = slots
    # Indexed axes come first in the result of such an index, and so in the values.
    values = jnp.moveaxis(values, axis, len(leading))
    return leaf.at[(*leading, *rest)].set(values, mode="drop", unique_indices=True)


def _write_vectors(leaf: Array, values: Array, slots: Array, axis: int) -> Array:
    """The same, one head after the other. A TPU's compiler would turn the whole cache round and
    back in every step to have all heads of a token side by side; XLA's CPU backend takes a third
    longer for a step this way."""
    before = leaf.shape[: leaf.ndim + axis]
    index = jnp.indices((*before, 1), dtype=jnp.int32, sparse=True)[:-1]
    slots = jnp.expand_dims(slots, range(slots.ndim - 1, len(before)))
    return leaf.at[(*index, slots)].set(values, mode="drop", unique_indices=True)


def map_caches(function: Callable[["Cache"], "Cache"], caches: PyTree) -> PyTree:
    """Applies `function` to every cache of a tree."""
    return jax.tree.map(function, caches, is_leaf=lambda node: isinstance(node, Cache))
