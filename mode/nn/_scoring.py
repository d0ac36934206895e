"""Attention scores: scale, soft cap, ALiBi, window and mask, in one place for every form.

Query heads that share a key-value head are stacked as the rows of one matrix, so that grouped
queries need no copies of keys: `[batch, kv_heads, rows, head_dim]`, rows = heads of the group times
tokens.
"""

import math

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from .._checks import check_count, is_finite
from .._token_info import TokenInfo
from .._types import Queries, Rows, Scores


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

    def scaled(self, q: Queries) -> Queries:
        """Scales the queries."""
        return q * (q.shape[-1] ** -0.5 if self.scale is None else self.scale)

    def logits(
        self,
        products: Scores,
        queries: TokenInfo,
        keys: TokenInfo,
        earlier: Bool[Array, "queries keys"] | None,
        masked: float = -math.inf,
    ) -> Scores:
        """The logits of the softmax; `masked` where a query does not see a key.

        **Arguments:**

        - `products`: of scaled queries and keys.
        - `queries`, `keys`: positions and segments, `[batch, queries]` and `[batch, keys]`.
        - `earlier`: which keys stand no later than a query; `None` where all of them do.
        """
        batch, kv_heads, _, num_keys = products.shape
        num_queries = queries.positions.shape[-1]
        by_head = products.reshape(batch, kv_heads, -1, num_queries, num_keys)
        if self.soft_cap is not None:
            by_head = self.soft_cap * jnp.tanh(by_head / self.soft_cap)
        distance = queries.positions[:, :, None] - keys.positions[:, None, :]
        if self.alibi:
            by_head = by_head - self._alibi(distance, by_head)
        visible = queries.segment_ids[:, :, None] == keys.segment_ids[:, None, :]
        if earlier is not None:
            visible &= earlier[None]
        if self.window is not None:
            visible &= distance < self.window
        return jnp.where(visible[:, None, None], by_head, masked).reshape(products.shape)

    def _alibi(
        self,
        distance: Int[Array, "batch queries keys"],
        by_head: Float[Array, "batch kv_heads group queries keys"],
    ) -> Float[Array, "batch kv_heads group queries keys"]:
        kv_heads, group = by_head.shape[1:3]
        heads = jnp.arange(1, kv_heads * group + 1, dtype=by_head.dtype)
        slopes = jnp.exp2(-8 * heads / (kv_heads * group)).reshape(1, kv_heads, group, 1, 1)
        return slopes * distance[:, None, None].astype(by_head.dtype)


def stack_rows(q: Queries, kv_heads: int) -> Rows:
    """Stacks the heads that share a key-value head."""
    batch, tokens, _, head_dim = q.shape
    rows = q.reshape(batch, tokens, kv_heads, -1, head_dim).transpose(0, 2, 3, 1, 4)
    return rows.reshape(batch, kv_heads, -1, head_dim)


def unstack_rows(mixed: Rows, q: Queries) -> Queries:
    """Moves rows back to where the heads of `q` stand, in its dtype."""
    batch, tokens, _, head_dim = q.shape
    heads = mixed.reshape(batch, mixed.shape[1], -1, tokens, head_dim).transpose(0, 3, 1, 2, 4)
    return heads.reshape(q.shape).astype(q.dtype)
