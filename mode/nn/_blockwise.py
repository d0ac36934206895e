"""Causal attention block by block: the scores of two blocks of tokens at a time, never all.

Memory grows with the length, and the numbers of one block stay in a processor's cache. The backward
pass recomputes the scores from the result of the forward pass and the logarithm of each row's sum
(arXiv:2205.14135, algorithms 1 and 4). It is written by hand because automatic differentiation of
the loop would store every block of scores, which is the square of the length again. Each loop is
one scan over all pairs of a block of queries and a block of keys that it sees.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from .._token_info import TokenInfo
from .._types import Keys, Queries, QueryIndex, Scores
from ._scoring import MASKED, Scoring, unstack_rows


QueryBlocks = Float[Array, "blocks batch kv_heads rows head_dim"]
KeyBlocks = Float[Array, "key_blocks batch kv_heads size head_dim"]
_Pair = Int[Array, " two"]  # the indices of a block of queries and of a block of keys
_Carry = tuple[Array, Array, Array]  # of a scan over pairs


class _Infos(NamedTuple):
    """What is known of the tokens, block by block. `order` says where queries stand among the keys;
    `None` where they are the same tokens."""

    queries: TokenInfo
    keys: TokenInfo
    order: Int[Array, "blocks batch size"] | None


_Saved = tuple[QueryBlocks, KeyBlocks, KeyBlocks, _Infos, QueryBlocks, Array]


def info_at(info: TokenInfo, index: QueryIndex) -> TokenInfo:
    """Gathers `info` of the tokens at `index`, `[batch, queries]`; beyond the end is padding."""

    def take(leaf: Shaped[Array, "batch tokens"]) -> Shaped[Array, "batch queries"]:
        return jnp.take_along_axis(leaf, index, axis=1, mode="fill", fill_value=0)

    return jax.tree.map(take, info)


def blockwise_attention(
    scoring: Scoring,
    q: Queries,
    k: Keys,
    v: Keys,
    info: TokenInfo,
    block_size: int,
    index: QueryIndex | None = None,
) -> Queries:
    """Computes `CausalAttention` of long sequences. Has no forward-mode derivative."""
    batch, num_queries, heads, head_dim = q.shape

    def blocks(x: Shaped[Array, "batch tokens *rest"]) -> Shaped[Array, "blocks batch size *rest"]:
        tokens = x.shape[1]
        count = -(-tokens // block_size)
        size = -(-tokens // (16 * count)) * 16  # equal blocks need little padding at any length
        padded = jnp.pad(x, [(0, 0), (0, count * size - tokens)] + [(0, 0)] * (x.ndim - 2))
        return padded.reshape(batch, count, size, *x.shape[2:]).swapaxes(0, 1)

    rows = jax.vmap(lambda block: scoring.query_rows(block, k.shape[2]))(blocks(q))
    keys, values = (blocks(x.astype(rows.dtype)).swapaxes(2, 3) for x in (k, v))
    key_infos = jax.tree.map(blocks, info)
    infos = _Infos(key_infos, key_infos, None)
    if index is not None:
        infos = _Infos(jax.tree.map(blocks, info_at(info, index)), key_infos, blocks(index))
    mixed: Array = _attention(scoring, rows, keys, values, infos)
    by_block = jax.vmap(unstack_rows)(mixed, blocks(q))
    return by_block.swapaxes(0, 1).reshape(batch, -1, heads, head_dim)[:, :num_queries]


def _pairs(scoring: Scoring, infos: _Infos) -> Int[Array, "pairs two"]:
    """Blocks of queries and of keys, in order, without those whose keys no query can see."""
    num_queries, num_keys = infos.queries.positions.shape[0], infos.keys.positions.shape[0]
    pairs = [(i, j) for i in range(num_queries) for j in range(num_keys)]
    if infos.order is None:
        size = infos.keys.positions.shape[-1]
        pairs = [(i, j) for i, j in pairs if j <= i]
        if scoring.window is not None:
            # Between tokens of one segment, positions grow at least as fast as the order.
            pairs = [(i, j) for i, j in pairs if (i - j - 1) * size + 1 < scoring.window]
    return jnp.array(pairs, jnp.int32)


def _logits(scoring: Scoring, products: Scores, infos: _Infos, pair: _Pair) -> Scores:
    i, j = pair
    size = products.shape[-1]
    slot = jnp.arange(size, dtype=jnp.int32)
    order = (i * size + slot)[None] if infos.order is None else infos.order[i]
    earlier = order[:, :, None] >= (j * size + slot)[None, None, :]
    queries = jax.tree.map(lambda leaf: leaf[i], infos.queries)
    keys = jax.tree.map(lambda leaf: leaf[j], infos.keys)
    return scoring.logits(products, queries, keys, earlier)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(
    scoring: Scoring, q: QueryBlocks, k: KeyBlocks, v: KeyBlocks, infos: _Infos
) -> QueryBlocks:
    return _forward(scoring, q, k, v, infos)[0]


def _forward(
    scoring: Scoring, q: QueryBlocks, k: KeyBlocks, v: KeyBlocks, infos: _Infos
) -> tuple[QueryBlocks, _Saved]:
    def add(state: _Carry, pair: _Pair) -> tuple[_Carry, None]:
        i, j = pair
        top, total, out = (part[i] for part in state)
        logits = _logits(scoring, jnp.einsum("bgqd,bgkd->bgqk", q[i], k[j]), infos, pair)
        new_top = jnp.maximum(top, jnp.max(logits, axis=-1))
        shrink = jnp.exp(top - new_top)
        weights = jnp.exp(logits - new_top[..., None])
        mixed = jnp.einsum("bgqk,bgkd->bgqd", weights, v[j])
        new = (new_top, total * shrink + jnp.sum(weights, axis=-1), out * shrink[..., None] + mixed)
        top, total, out = (part.at[i].set(block) for part, block in zip(state, new, strict=True))
        return (top, total, out), None

    start = (jnp.full(q.shape[:-1], MASKED, q.dtype), jnp.zeros(q.shape[:-1], q.dtype))
    pairs = _pairs(scoring, infos)
    (top, total, out), _ = jax.lax.scan(add, (*start, jnp.zeros_like(q)), pairs)
    out = out / total[..., None]
    return out, (q, k, v, infos, out, top + jnp.log(total))


def _backward(
    scoring: Scoring, saved: _Saved, d_out: QueryBlocks
) -> tuple[QueryBlocks, KeyBlocks, KeyBlocks, None]:
    q, k, v, infos, out, log_total = saved
    drift = jnp.sum(d_out * out, axis=-1)  # what the softmax's normalisation takes from each row

    def add(gradients: _Carry, pair: _Pair) -> tuple[_Carry, None]:
        i, j = pair
        d_q, d_k, d_v = gradients
        logits, pull_back = jax.vjp(
            lambda products: _logits(scoring, products, infos, pair),
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
    pairs = _pairs(scoring, infos)
    (d_q, d_k, d_v), _ = jax.lax.scan(add, (jnp.zeros_like(q), zeros, zeros), pairs)
    return d_q, d_k.swapaxes(-1, -2), d_v.swapaxes(-1, -2), None


_attention.defvjp(_forward, _backward)
