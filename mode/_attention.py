"""Causal attention at original positions, in memory that grows with the length, not its square."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ._blockwise import BLOCK, blockwise_attention
from ._precision import float32_or_wider


Attend = Callable[..., Float[Array, "batch tokens heads head_dim"]]

# Up to one block there is nothing to split, and storing the scores for the backward pass is cheaper
# than computing them again.
_SHORT = BLOCK


def rope(
    x: Float[Array, "*groups tokens heads head_dim"],
    positions: Int[Array, "*groups tokens"],
    theta: float = 10_000.0,
) -> Float[Array, "*groups tokens heads head_dim"]:
    """Rotate each pair `(x[i], x[i + head_dim / 2])` by `positions * theta ** (-2 i / head_dim)`.

    **Arguments:**

    - `x`: queries or keys, `[*groups, tokens, heads, head_dim]`, `head_dim` even.
    - `positions`: `[*groups, tokens]`, original positions: a token that was gathered keeps its own.
    - `theta`: base of the wavelengths.

    *Source:* arXiv:2104.09864, section 3.4.2, equation 34, in the split-halves layout.
    """
    half = x.shape[-1] // 2
    wide = float32_or_wider(x.dtype)
    frequency = theta ** (-jnp.arange(half, dtype=wide) / half)
    angle = positions[..., None, None].astype(wide) * jnp.expand_dims(frequency, range(x.ndim - 1))
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    # One sweep with a roll: joining two rotated halves took three times as long on CPU.
    cos = jnp.concatenate([cos, cos], axis=-1)
    sin = jnp.concatenate([-sin, sin], axis=-1)
    x_wide = x.astype(wide)
    return (x_wide * cos + jnp.roll(x_wide, half, axis=-1) * sin).astype(x.dtype)


def extend_attention(
    q: Float[Array, "batch new heads head_dim"],
    new_kv: tuple[
        Float[Array, "batch kv_heads new head_dim"], Float[Array, "batch kv_heads new head_dim"]
    ],
    segment_ids: Int[Array, "batch new"],
    past_kv: tuple[
        Float[Array, "batch kv_heads slots head_dim"], Float[Array, "batch kv_heads slots head_dim"]
    ],
    past_segment_ids: Int[Array, "batch slots"],
) -> Float[Array, "batch new heads head_dim"]:
    """`causal_attention` of new tokens that follow cached ones: one softmax over both.

    Keys and values lie head by head, as a product with one query reads them; empty slots have
    segment 0.
    """
    new = q.shape[1]
    (k, v), (past_k, past_v) = new_kv, past_kv
    kv_heads = k.shape[1]
    wide = float32_or_wider(q.dtype)
    rows = _stacked(q.astype(wide), kv_heads)
    place = jnp.arange(new)
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    masks = (
        segment_ids[:, :, None] == past_segment_ids[:, None, :],
        same & (place[:, None] >= place[None, :])[None],
    )
    scores = []
    for keys, mask in zip((past_k, k), masks, strict=True):
        # The keys are the product's left side and its result is turned after the mask: few queries
        # on the left, XLA's CPU backend would copy the keys first, and take twice as long.
        product = jnp.einsum("bgkd,bgqd->bgkq", keys.astype(wide), rows)
        per_head = product.reshape(*product.shape[:3], -1, new)
        masked = jnp.where(mask.swapaxes(1, 2)[:, None, :, None], per_head, -jnp.inf)
        scores.append(masked.reshape(product.shape).swapaxes(2, 3))
    # A token always sees itself, so the maximum is finite.
    top = jnp.maximum(*(jnp.max(part, axis=-1, keepdims=True) for part in scores))
    shares = [jnp.exp(part - top) for part in scores]
    total = sum(jnp.sum(share, axis=-1, keepdims=True) for share in shares)
    mixed = [
        jnp.einsum("bgqk,bgkd->bgqd", share, values.astype(wide))
        for share, values in zip(shares, (past_v, v), strict=True)
    ]
    return _unstacked((mixed[0] + mixed[1]) / total, q)


def causal_attention(
    q: Float[Array, "batch tokens heads head_dim"],
    k: Float[Array, "batch tokens kv_heads head_dim"],
    v: Float[Array, "batch tokens kv_heads head_dim"],
    segment_ids: Int[Array, "batch tokens"],
) -> Float[Array, "batch tokens heads head_dim"]:
    """Softmax attention over the same and earlier tokens of the same segment.

    Computed in float32 or wider. Short sequences form all scores at once; longer ones block by
    block, in memory that grows with the length.

    **Arguments:**

    - `q`: `[batch, tokens, heads, head_dim]`, tokens in time order.
    - `k`, `v`: `[batch, tokens, kv_heads, head_dim]`; query head h reads key-value head
        `h // (heads // kv_heads)`.
    - `segment_ids`: `[batch, tokens]`. Padding, segment 0, attends to padding only: finite numbers
        that nobody reads.

    *Source:* arXiv:1706.03762, equation 1; grouped queries, arXiv:2305.13245. *Relative to the
    papers:* the mask follows the order of the tokens, which a gather keeps, and their segments.
    """
    short = q.shape[1] <= _SHORT
    return (plain_attention if short else blockwise_attention)(q, k, v, segment_ids)


def plain_attention(
    q: Float[Array, "batch tokens heads head_dim"],
    k: Float[Array, "batch tokens kv_heads head_dim"],
    v: Float[Array, "batch tokens kv_heads head_dim"],
    segment_ids: Int[Array, "batch tokens"],
) -> Float[Array, "batch tokens heads head_dim"]:
    """As `causal_attention`, forming all scores at once: what the other forms are tested against,
    and the one with a forward-mode derivative at any length."""
    batch, tokens = q.shape[:2]
    kv_heads = k.shape[2]
    wide = float32_or_wider(q.dtype)
    rows = _stacked(q.astype(wide), kv_heads)
    k, v = (part.astype(wide).transpose(0, 2, 1, 3) for part in (k, v))
    scores = jnp.einsum("bgqd,bgkd->bgqk", rows, k)
    per_head = scores.reshape(batch, kv_heads, -1, tokens, tokens)
    place = jnp.arange(tokens)
    earlier = place[:, None] >= place[None, :]
    mask = earlier[None] & (segment_ids[:, :, None] == segment_ids[:, None, :])
    share = jax.nn.softmax(jnp.where(mask[:, None, None], per_head, -jnp.inf), axis=-1)
    mixed = jnp.einsum("bgqk,bgkd->bgqd", share.reshape(scores.shape), v)
    return _unstacked(mixed, q)


def _stacked(
    q: Float[Array, "batch tokens heads head_dim"], kv_heads: int
) -> Float[Array, "batch kv_heads rows head_dim"]:
    """Scaled queries, those of one key-value head stacked as rows: its keys are not repeated."""
    batch, tokens, _, head_dim = q.shape
    rows = (q * head_dim**-0.5).reshape(batch, tokens, kv_heads, -1, head_dim)
    return rows.transpose(0, 2, 3, 1, 4).reshape(batch, kv_heads, -1, head_dim)


def _unstacked(
    mixed: Float[Array, "batch kv_heads rows head_dim"],
    q: Float[Array, "batch tokens heads head_dim"],
) -> Float[Array, "batch tokens heads head_dim"]:
    """Rows back where the heads of `q` stand, in its dtype."""
    batch, tokens, _, head_dim = q.shape
    heads = mixed.reshape(batch, mixed.shape[1], -1, tokens, head_dim).transpose(0, 3, 1, 2, 4)
    return heads.reshape(q.shape).astype(q.dtype)
