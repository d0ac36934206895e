"""Causal attention at original positions, in memory that grows with the length, not its square."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ._linear import float32_or_wider


Attend = Callable[..., Float[Array, "*groups tokens heads head_dim"]]


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
    first, second = x[..., :half].astype(wide), x[..., half:].astype(wide)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


def causal_attention(
    q: Float[Array, "batch tokens heads head_dim"],
    k: Float[Array, "batch tokens kv_heads head_dim"],
    v: Float[Array, "batch tokens kv_heads head_dim"],
    segment_ids: Int[Array, "batch tokens"],
) -> Float[Array, "batch tokens heads head_dim"]:
    batch, tokens, heads, dim = q.shape
    groups = k.shape[2]
    wide = float32_or_wider(q.dtype)
    q = (q.astype(wide) * dim**-0.5).reshape(batch, tokens, groups, -1, dim)
    q = q.transpose(0, 2, 3, 1, 4)
    k, v = (z.astype(wide).transpose(0, 2, 1, 3) for z in (k, v))

    def chunk(qc, kc, vc, sq, sk, start):
        s = jnp.einsum("bgrqd,bgkd->bgrqk", qc, kc)
        order = (start + jnp.arange(qc.shape[3]))[:, None] >= jnp.arange(kc.shape[2])[None]
        ok = order[None] & (sq[:, :, None] == sk[:, None, :])
        s = jnp.where(ok[:, None, None], s, -1e30)
        p = jnp.exp(s - jax.lax.stop_gradient(s.max(-1, keepdims=True)))
        return jnp.einsum("bgrqk,bgkd->bgrqd", p, vc) / p.sum(-1, keepdims=True)

    chunk = jax.checkpoint(chunk, static_argnums=(5,))
    out = []
    for a in range(0, tokens, 128):
        b = min(a + 128, tokens)
        out.append(
            chunk(
                q[..., a:b, :],
                k[..., :b, :],
                v[..., :b, :],
                segment_ids[:, a:b],
                segment_ids[:, :b],
                a,
            )
        )
    o = jnp.concatenate(out, -2)
    return o.transpose(0, 3, 1, 2, 4).reshape(batch, tokens, heads, dim).astype(v.dtype)
