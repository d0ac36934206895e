"""Attention scores: scale, soft cap, ALiBi, window and mask, in one place for every form.

Query heads that share a key-value head are stacked as the rows of one matrix, heads of the group
times tokens, so that grouped queries need no copies of keys.
"""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool

from .._checks import check_count, is_finite
from .._dtypes import float32_or_wider
from .._token_info import TokenInfo
from .._types import Queries, Rows, Scores


Mask = Bool[Array, "batch_or_one queries keys"]
# Finite, so that a block without a visible key gives exp(0), which is later scaled by exactly 0.
MASKED = -1e30


class Scoring(eqx.Module):
    """From products of queries and keys to the logits of the softmax. See `CausalAttention`."""

    scale: float | None = eqx.field(static=True, default=None)
    soft_cap: float | None = eqx.field(static=True, default=None)
    window: int | None = eqx.field(static=True, default=None)
    alibi: bool = eqx.field(static=True, default=False)

    def __check_init__(self):
        for name, value in (("scale", self.scale), ("soft_cap", self.soft_cap)):
            if value is not None and not (is_finite(value) and value > 0):
                raise ValueError(
                    f"`{name}` of `CausalAttention` must be a finite number above 0 or None, got "
                    f"{value!r}."
                )
        if self.window is not None:
            check_count("window", self.window, 1)

    def query_rows(self, q: Queries, kv_heads: int) -> Rows:
        """Scales queries, in float32 or wider, and stacks heads that share a key-value head."""
        batch, tokens, _, head_dim = q.shape
        scale = head_dim**-0.5 if self.scale is None else self.scale
        scaled = q.astype(float32_or_wider(q.dtype)) * scale
        heads = scaled.reshape(batch, tokens, kv_heads, -1, head_dim)
        return heads.transpose(0, 2, 3, 1, 4).reshape(batch, kv_heads, -1, head_dim)

    def logits(
        self, products: Scores, queries: TokenInfo, keys: TokenInfo, earlier: Mask | None
    ) -> Scores:
        """Makes logits of the products of queries and keys: `MASKED` where a key is not seen.

        `earlier` says which keys stand no later than a query; `None` where all of them do.
        """
        batch, kv_heads, rows, num_keys = products.shape
        num_queries = queries.positions.shape[-1]
        group = rows // num_queries
        by_head = products.reshape(batch, kv_heads, group, num_queries, num_keys)
        if self.soft_cap is not None:
            by_head = self.soft_cap * jnp.tanh(by_head / self.soft_cap)
        distance = queries.positions[:, :, None] - keys.positions[:, None, :]
        if self.alibi:
            heads = jnp.arange(1, kv_heads * group + 1, dtype=by_head.dtype)
            slopes = jnp.exp2(-8 * heads / (kv_heads * group)).reshape(1, kv_heads, group, 1, 1)
            by_head = by_head - slopes * distance[:, None, None].astype(by_head.dtype)
        visible = queries.segment_ids[:, :, None] == keys.segment_ids[:, None, :]
        if earlier is not None:
            visible &= earlier
        if self.window is not None:
            visible &= distance < self.window
        return jnp.where(visible[:, None, None], by_head, MASKED).reshape(products.shape)


def unstack_rows(mixed: Rows, q: Queries) -> Queries:
    """Moves rows back to where the heads of `q` stand, in its dtype."""
    batch, tokens, _, head_dim = q.shape
    heads = mixed.reshape(batch, mixed.shape[1], -1, tokens, head_dim).transpose(0, 3, 1, 2, 4)
    return heads.reshape(q.shape).astype(q.dtype)
