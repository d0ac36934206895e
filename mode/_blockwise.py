"""Causal attention block by block: the scores of two blocks of tokens at a time, never all.

Memory grows with the length, and the numbers of one block stay in a processor's cache. The backward
pass recomputes the scores from what the forward pass keeps, its result and the logarithm of each
row's sum (arXiv:2205.14135, algorithms 1 and 4). Written by hand because automatic differentiation
of the loops would store every block of scores, which is the square of the length again.

Blocks lie as `[block, batch, kv_heads, rows, head_dim]`. The query heads that share a key-value
head are stacked in the rows, so that grouped queries cost no copies of keys.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ._flops import repeats_of
from ._precision import float32_or_wider


# XLA's CPU backend runs the products of a batch one after another and spreads a single one over the
# cores only where it is large: at 4096 tokens on two cores, blocks of 128 and 256 took 1.5 times as
# long as blocks of 512. (On a single core 128, which fits the second-level cache, is the best.)
BLOCK = 512
MASKED = -1e30  # finite, so that a block without a single key gives exp(0), later scaled by exact 0

Queries = Float[Array, "blocks batch kv_heads rows head_dim"]
Keys = Float[Array, "blocks batch kv_heads size head_dim"]
Segments = Int[Array, "blocks batch size"]


def blockwise_attention(
    q: Float[Array, "batch tokens heads head_dim"],
    k: Float[Array, "batch tokens kv_heads head_dim"],
    v: Float[Array, "batch tokens kv_heads head_dim"],
    segment_ids: Int[Array, "batch tokens"],
) -> Float[Array, "batch tokens heads head_dim"]:
    """As `causal_attention`, for long sequences. Has no forward-mode derivative."""
    batch, tokens, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    wide = float32_or_wider(q.dtype)
    num_blocks = -(-tokens // BLOCK)
    size = -(-tokens // (16 * num_blocks)) * 16  # equal blocks need little padding at any length
    pad = num_blocks * size - tokens

    def split(x: Float[Array, "batch tokens x_heads head_dim"], dtype: jnp.dtype) -> Queries:
        padded = jnp.pad(x.astype(dtype), [(0, 0), (0, pad), (0, 0), (0, 0)])
        parts = padded.reshape(batch, num_blocks, size, kv_heads, -1, head_dim)
        stacked = parts.transpose(1, 0, 3, 4, 2, 5)
        return stacked.reshape(num_blocks, batch, kv_heads, -1, head_dim)

    segments = jnp.pad(segment_ids, [(0, 0), (0, pad)]).reshape(batch, num_blocks, size)
    out = _attention(
        split(q, wide) * head_dim**-0.5, split(k, wide), split(v, wide), segments.swapaxes(0, 1)
    )
    parts = out.reshape(num_blocks, batch, kv_heads, heads // kv_heads, size, head_dim)
    merged = parts.transpose(1, 0, 4, 2, 3, 5).reshape(batch, -1, heads, head_dim)
    return merged[:, :tokens].astype(q.dtype)


def _mask(query: Array, key: Array, i: Array, j: Array) -> Bool[Array, "batch size size"]:
    """Who may see whom between query block `i` and key block `j`, given their segments."""
    size = query.shape[-1]
    place = jnp.arange(size, dtype=jnp.int32)
    earlier = (i * size + place)[:, None] >= (j * size + place)[None, :]
    return earlier[None] & (query[:, :, None] == key[:, None, :])


def _scores(
    q: Float[Array, "batch kv_heads rows head_dim"],
    k: Float[Array, "batch kv_heads size head_dim"],
    mask: Bool[Array, "batch size size"],
) -> Float[Array, "batch kv_heads rows size"]:
    scores = jnp.einsum("bgqd,bgkd->bgqk", q, k)
    per_head = scores.reshape(*scores.shape[:2], -1, *mask.shape[1:])
    return jnp.where(mask[:, None, None], per_head, MASKED).reshape(scores.shape)


@jax.custom_vjp
def _attention(q: Queries, k: Keys, v: Keys, segments: Segments) -> Queries:
    return _forward(q, k, v, segments)[0]


def _forward(q: Queries, k: Keys, v: Keys, segments: Segments) -> tuple[Queries, tuple[Array, ...]]:
    num_blocks, *rest, head_dim = q.shape

    def query_block(i: Int[Array, ""]) -> tuple[Array, Array]:
        query, query_segments = q[i], segments[i]

        def key_block(j: Int[Array, ""], carry: tuple[Array, ...]) -> tuple[Array, ...]:
            top, total, out = carry
            scores = _scores(query, k[j], _mask(query_segments, segments[j], i, j))
            new_top = jnp.maximum(top, jnp.max(scores, axis=-1))
            shrink = jnp.exp(top - new_top)
            share = jnp.exp(scores - new_top[..., None])
            mixed = jnp.einsum("bgqk,bgkd->bgqd", share, v[j])
            return (
                new_top,
                total * shrink + jnp.sum(share, axis=-1),
                out * shrink[..., None] + mixed,
            )

        start = (
            jnp.full(rest, MASKED, q.dtype),
            jnp.zeros(rest, q.dtype),
            jnp.zeros((*rest, head_dim), q.dtype),
        )
        with repeats_of(num_blocks + 1, 2):
            top, total, out = jax.lax.fori_loop(0, i + 1, key_block, start)
        return out / total[..., None], top + jnp.log(total)

    out, log_total = jax.lax.map(query_block, jnp.arange(num_blocks, dtype=jnp.int32))
    return out, (q, k, v, segments, out, log_total)


def _backward(saved: tuple[Array, ...], d_out: Queries) -> tuple[Queries, Keys, Keys, None]:
    q, k, v, segments, out, log_total = saved
    num_blocks = q.shape[0]
    drift = jnp.sum(d_out * out, axis=-1)  # what the softmax's normalisation takes from each row

    def key_block(d_q: Queries, j: Int[Array, ""]) -> tuple[Queries, tuple[Array, Array]]:
        key, value, key_segments = k[j], v[j], segments[j]

        def query_block(i: Int[Array, ""], carry: tuple[Array, ...]) -> tuple[Array, ...]:
            d_q, d_k, d_v = carry
            scores = _scores(q[i], key, _mask(segments[i], key_segments, i, j))
            share = jnp.exp(scores - log_total[i][..., None])
            d_share = jnp.einsum("bgqd,bgkd->bgqk", d_out[i], value)
            d_scores = share * (d_share - drift[i][..., None])
            return (
                d_q.at[i].add(jnp.einsum("bgqk,bgkd->bgqd", d_scores, key)),
                # Transposed results: a CPU's matrix product is half as fast the other way round.
                d_k + jnp.einsum("bgqd,bgqk->bgdk", q[i], d_scores),
                d_v + jnp.einsum("bgqd,bgqk->bgdk", d_out[i], share),
            )

        zeros = jnp.zeros_like(key.swapaxes(-1, -2))
        with repeats_of(num_blocks + 1, 2):
            d_q, d_k, d_v = jax.lax.fori_loop(j, num_blocks, query_block, (d_q, zeros, zeros))
        return d_q, (d_k.swapaxes(-1, -2), d_v.swapaxes(-1, -2))

    blocks = jnp.arange(num_blocks, dtype=jnp.int32)
    d_q, (d_k, d_v) = jax.lax.scan(key_block, jnp.zeros_like(q), blocks)
    return d_q, d_k, d_v, None


_attention.defvjp(_forward, _backward)
