"""Attention scores: scale, soft cap, ALiBi, window and mask, in one place for every form.

Query heads that share a key-value head are stacked as the rows of one matrix, heads of the group
times tokens, so that grouped queries need no copies of keys.
"""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Shaped

from ..._checks import check_count, is_finite
from ..._dtypes import float32_or_wider
from ..._token_info import TokenInfo
from ..._types import Scores


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

    def scale_for(self, head_dim: int) -> float:
        """What products of heads of so many features are multiplied by."""
        return head_dim**-0.5 if self.scale is None else self.scale

    def logits(
        self,
        products: Scores,
        head_dim: int,
        queries: TokenInfo,
        keys: TokenInfo,
        earlier: Mask | None,
    ) -> Scores:
        """Makes logits of the products of queries and keys: `MASKED` where a key is not seen.

        `earlier` says which keys stand no later than a query; `None` where all of them do.
        """
        products = products * self.scale_for(head_dim)
        batch, kv_heads, rows, num_keys = products.shape
        num_queries = queries.positions.shape[-1]
        group = rows // num_queries
        by_head = products.reshape(batch, kv_heads, group, num_queries, num_keys)
        if self.soft_cap is not None:
            by_head = self.soft_cap * jnp.tanh(by_head / self.soft_cap)
        if self.alibi:
            heads = jnp.arange(1, kv_heads * group + 1, dtype=by_head.dtype)
            slopes = jnp.exp2(-8 * heads / (kv_heads * group)).reshape(1, kv_heads, group, 1, 1)
            distance = _distance(queries, keys)[:, None, None].astype(by_head.dtype)
            by_head = by_head - slopes * distance
        visible = self.visible(queries, keys, earlier)
        return jnp.where(visible[:, None, None], by_head, MASKED).reshape(products.shape)

    def visible(
        self, queries: TokenInfo, keys: TokenInfo, earlier: Mask | None
    ) -> Bool[Array, "batch queries keys"]:
        """Says which keys each query sees: of its segment, no later, and inside the window."""
        visible = queries.segment_ids[:, :, None] == keys.segment_ids[:, None, :]
        if earlier is not None:
            visible &= earlier
        if self.window is not None:
            visible &= _distance(queries, keys) < self.window
        return visible


def _distance(queries: TokenInfo, keys: TokenInfo) -> Int[Array, "batch queries keys"]:
    return queries.positions[:, :, None] - keys.positions[:, None, :]


def stack_rows(
    q: Shaped[Array, "batch tokens heads *rest"], kv_heads: int
) -> Shaped[Array, "batch kv_heads rows *rest"]:
    """Stacks the heads that share a key-value head: `[batch, kv_heads, group * tokens, ...]`."""
    batch, tokens, heads, *rest = q.shape
    by_group = q.reshape(batch, tokens, kv_heads, heads // kv_heads, *rest)
    return jnp.moveaxis(by_group, 1, 3).reshape(batch, kv_heads, -1, *rest)


def unstack_rows(
    rows: Shaped[Array, "batch kv_heads rows *rest"], tokens: int
) -> Shaped[Array, "batch tokens heads *rest"]:
    """Undoes `stack_rows` of so many tokens."""
    batch, kv_heads, _, *rest = rows.shape
    by_group = rows.reshape(batch, kv_heads, -1, tokens, *rest)
    return jnp.moveaxis(by_group, 3, 1).reshape(batch, tokens, -1, *rest)


def product(spec: str, *operands: Array) -> Array:
    """Multiplies in the dtype of the operands and adds up in float32 or wider."""
    wide = float32_or_wider(operands[0].dtype)
    return jnp.einsum(spec, *operands, preferred_element_type=wide)


# Of rows of queries: the largest logits so far, the sums of the weights, the mixed values.
RunningSoftmax = tuple[Array, Array, Array]


def add_keys(state: RunningSoftmax, logits: Scores, values: Array) -> RunningSoftmax:
    """Adds a block of keys to softmaxes under way. *Source:* arXiv:2205.14135, algorithm 1."""
    top, total, out = state
    new_top = jnp.maximum(top, jnp.max(logits, axis=-1))
    shrink = jnp.exp(top - new_top)
    weights = jnp.exp(logits - new_top[..., None])
    mixed = product("bgqk,bgkd->bgqd", weights.astype(values.dtype), values)
    return new_top, total * shrink + jnp.sum(weights, axis=-1), out * shrink[..., None] + mixed
