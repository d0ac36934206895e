"""Attention of many new tokens to a long cache, a block of its slots at a time.

The scores of a piece of a prompt and all slots would take many times the memory of the cache. The
running softmax is that of `_blockwise`. There is no backward pass of its own: nobody trains through
a cache.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..._dtypes import float32_or_wider
from ..._token_info import TokenInfo
from ..._types import KeyRows, Rows, Scores
from ._scoring import RunningSoftmax, Scoring, add_keys, product


_Slots = Float[Array, "batch kv_heads slots head_dim"]


def attend_after_cache(
    scoring: Scoring,
    rows: Rows,
    own_logits: Scores,
    own_values: KeyRows,
    query_info: TokenInfo,
    entries: tuple[_Slots, _Slots],
    cache_info: TokenInfo,
    block_size: int,
) -> Rows:
    """Mixes the values of the new tokens and of a cache of at least `block_size` slots.

    `own_logits` are those of the new tokens with each other. Blocks without a token are skipped.
    """
    num_queries = query_info.positions.shape[-1]
    slots, head_dim, wide = entries[0].shape[2], rows.shape[-1], float32_or_wider(rows.dtype)

    def add_block(state: RunningSoftmax, first: Array) -> tuple[RunningSoftmax, None]:
        # The last block may reach back into the one before it, whose slots it leaves out.
        begin = jnp.minimum(first, slots - block_size)
        slot = begin + jnp.arange(block_size)
        is_new = jnp.broadcast_to(slot >= first, (1, num_queries, block_size))

        def cut(x: Array, axis: int) -> Array:
            return jax.lax.dynamic_slice_in_dim(x, begin, block_size, axis)

        info = jax.tree.map(lambda leaf: cut(leaf, 1), cache_info)

        def attend(state: RunningSoftmax) -> RunningSoftmax:
            keys, values = (cut(entry, 2) for entry in entries)
            products = product("bgqd,bgkd->bgqk", rows, keys.astype(rows.dtype))
            logits = scoring.logits(products, head_dim, query_info, info, is_new)
            return add_keys(state, logits, values.astype(rows.dtype))

        return jax.lax.cond(jnp.any(info.valid), attend, lambda state: state, state), None

    # A new token sees itself, so that the first maximum is of a key that is seen.
    top = jnp.max(own_logits, axis=-1)
    start = (top, jnp.zeros_like(top), jnp.zeros(rows.shape, wide))
    own = add_keys(start, own_logits, own_values.astype(rows.dtype))
    (_, total, out), _ = jax.lax.scan(add_block, own, jnp.arange(0, slots, block_size))
    return out / total[..., None]
