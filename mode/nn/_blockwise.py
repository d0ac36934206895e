"""Causal attention block by block: the scores of two blocks of tokens at a time, never all.

Memory grows with the length, and the numbers of one block stay in a processor's cache. The backward
pass recomputes the scores from the result of the forward pass and the logarithm of each row's sum
(arXiv:2205.14135, algorithms 1 and 4). It is written by hand because automatic differentiation of
the loop would store every block of scores, which is the square of the length again.

Blocks lie as `[block, batch, kv_heads, rows, head_dim]`. Each loop is one scan over all pairs of a
block of queries and a block of keys that it sees, so that its length is known.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from .._dtypes import float32_or_wider
from .._token_info import TokenInfo
from .._types import Keys, Queries
from ._scoring import Scoring


# Finite, so that a block without a visible key gives exp(0), which is later scaled by exactly 0.
_MASKED = -1e30

QueryBlocks = Float[Array, "blocks batch kv_heads rows head_dim"]
KeyBlocks = Float[Array, "blocks batch kv_heads size head_dim"]
_Carry = tuple[Array, Array, Array]  # of a scan over pairs of blocks


def blockwise_attention(
    scoring: Scoring, q: Queries, k: Keys, v: Keys, info: TokenInfo, block_size: int
) -> Queries:
    """Computes `CausalAttention` of long sequences. Has no forward-mode derivative."""
    batch, tokens, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    wide = float32_or_wider(q.dtype)
    num_blocks = -(-tokens // block_size)
    size = -(-tokens // (16 * num_blocks)) * 16  # equal blocks need little padding at any length
    pad = num_blocks * size - tokens

    def blocks(x: Float[Array, "batch tokens x_heads head_dim"]) -> KeyBlocks:
        padded = jnp.pad(x.astype(wide), [(0, 0), (0, pad), (0, 0), (0, 0)])
        return padded.reshape(batch, num_blocks, size, -1, head_dim).transpose(1, 0, 3, 2, 4)

    def id_blocks(ids: Int[Array, "batch tokens"]) -> Int[Array, "blocks batch size"]:
        padded = jnp.pad(ids, [(0, 0), (0, pad)])
        return padded.reshape(batch, num_blocks, size).swapaxes(0, 1)

    # The heads of a group lie one behind the other: stacking them as rows is a reshape.
    queries = blocks(scoring.scaled(q.astype(wide)))
    queries = queries.reshape(num_blocks, batch, kv_heads, -1, head_dim)
    infos: TokenInfo = jax.tree.map(id_blocks, info)
    out: Array = _attention(scoring, queries, blocks(k), blocks(v), infos)
    by_head = out.reshape(num_blocks, batch, heads, size, head_dim)
    merged = by_head.transpose(1, 0, 3, 2, 4).reshape(batch, -1, heads, head_dim)
    return merged[:, :tokens].astype(q.dtype)


def _pairs(scoring: Scoring, num_blocks: int, size: int) -> Int[Array, "pairs two"]:
    """Blocks of queries and of keys, in order, without those that lie outside the window."""
    pairs = [
        (i, j)
        for i in range(num_blocks)
        for j in range(i + 1)
        # Between tokens of one segment, positions grow at least as fast as the order.
        if scoring.window is None or (i - j - 1) * size + 1 < scoring.window
    ]
    return jnp.array(pairs, jnp.int32)


def _logits(
    scoring: Scoring,
    products: Float[Array, "batch kv_heads rows size"],
    infos: TokenInfo,
    i: Int[Array, ""],
    j: Int[Array, ""],
) -> Float[Array, "batch kv_heads rows size"]:
    size = products.shape[-1]
    order = jnp.arange(size, dtype=jnp.int32)
    earlier: Bool[Array, "size size"] = (i * size + order)[:, None] >= (j * size + order)[None, :]
    queries, keys = (jax.tree.map(lambda leaf, b=b: leaf[b], infos) for b in (i, j))
    return scoring.logits(products, queries, keys, earlier, _MASKED)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(
    scoring: Scoring, q: QueryBlocks, k: KeyBlocks, v: KeyBlocks, infos: TokenInfo
) -> QueryBlocks:
    return _forward(scoring, q, k, v, infos)[0]


def _forward(
    scoring: Scoring, q: QueryBlocks, k: KeyBlocks, v: KeyBlocks, infos: TokenInfo
) -> tuple[QueryBlocks, tuple[QueryBlocks, KeyBlocks, KeyBlocks, TokenInfo, QueryBlocks, Array]]:
    def add(state: _Carry, pair: Int[Array, " two"]) -> tuple[_Carry, None]:
        i, j = pair
        top, total, out = (part[i] for part in state)
        logits = _logits(scoring, jnp.einsum("bgqd,bgkd->bgqk", q[i], k[j]), infos, i, j)
        new_top = jnp.maximum(top, jnp.max(logits, axis=-1))
        shrink = jnp.exp(top - new_top)
        weights = jnp.exp(logits - new_top[..., None])
        mixed = jnp.einsum("bgqk,bgkd->bgqd", weights, v[j])
        new = (new_top, total * shrink + jnp.sum(weights, axis=-1), out * shrink[..., None] + mixed)
        top, total, out = (part.at[i].set(block) for part, block in zip(state, new, strict=True))
        return (top, total, out), None

    start = (jnp.full(q.shape[:-1], _MASKED, q.dtype), jnp.zeros(q.shape[:-1], q.dtype))
    pairs = _pairs(scoring, q.shape[0], k.shape[-2])
    (top, total, out), _ = jax.lax.scan(add, (*start, jnp.zeros_like(q)), pairs)
    out = out / total[..., None]
    return out, (q, k, v, infos, out, top + jnp.log(total))


def _backward(
    scoring: Scoring,
    saved: tuple[QueryBlocks, KeyBlocks, KeyBlocks, TokenInfo, QueryBlocks, Array],
    d_out: QueryBlocks,
) -> tuple[QueryBlocks, KeyBlocks, KeyBlocks, None]:
    q, k, v, infos, out, log_total = saved
    drift = jnp.sum(d_out * out, axis=-1)  # what the softmax's normalisation takes from each row

    def add(gradients: _Carry, pair: Int[Array, " two"]) -> tuple[_Carry, None]:
        i, j = pair
        d_q, d_k, d_v = gradients
        logits, pull_back = jax.vjp(
            lambda products: _logits(scoring, products, infos, i, j),
            jnp.einsum("bgqd,bgkd->bgqk", q[i], k[j]),
        )
        weights = jnp.exp(logits - log_total[i][..., None])
        d_weights = jnp.einsum("bgqd,bgkd->bgqk", d_out[i], v[j])
        (d_products,) = pull_back(weights * (d_weights - drift[i][..., None]))
        return (
            d_q.at[i].add(jnp.einsum("bgqk,bgkd->bgqd", d_products, k[j])),
            # Transposed results: a CPU's matrix product is half as fast the other way round.
            d_k.at[j].add(jnp.einsum("bgqd,bgqk->bgdk", q[i], d_products)),
            d_v.at[j].add(jnp.einsum("bgqd,bgqk->bgdk", d_out[i], weights)),
        ), None

    zeros = jnp.zeros_like(k.swapaxes(-1, -2))
    pairs = _pairs(scoring, q.shape[0], k.shape[-2])
    (d_q, d_k, d_v), _ = jax.lax.scan(add, (jnp.zeros_like(q), zeros, zeros), pairs)
    return d_q, d_k.swapaxes(-1, -2), d_v.swapaxes(-1, -2), None


_attention.defvjp(_forward, _backward)
