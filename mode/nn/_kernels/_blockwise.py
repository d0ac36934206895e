"""Causal attention block by block: the scores of two blocks of tokens at a time, never all.

Memory grows with the length, and the numbers of one block stay in a processor's cache. The backward
pass recomputes the scores from the logarithm of each row's sum (arXiv:2205.14135, algorithms 1 and
4): automatic differentiation of the loop would store every block of scores, which is the square of
the length again. Each loop is one scan over all pairs of a block of queries and a block of keys
that it sees.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from ..._dtypes import float32_or_wider
from ..._token_info import TokenInfo
from ..._types import QueryIndex, Scores
from ._call import Arrays, Kernel
from ._scoring import MASKED, Scoring, add_keys, product, stack_rows, unstack_rows


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


def info_at(info: TokenInfo, index: QueryIndex) -> TokenInfo:
    """Gathers `info` of the tokens at `index`, `[batch, queries]`; beyond the end is padding."""

    def take(leaf: Shaped[Array, "batch tokens"]) -> Shaped[Array, "batch queries"]:
        return jnp.take_along_axis(leaf, index, axis=1, mode="fill", fill_value=0)

    return info.gather(take)


def blockwise(scoring: Scoring, block_size: int) -> Kernel:
    """The kernel that any platform runs, of every scoring, for `call`.

    It takes `(q, k, v)` and `(positions, segment_ids)`, or, for queries of some of the tokens,
    `(positions, segment_ids, index)`, and saves the logarithms of the rows' sums,
    `[batch, heads, queries]`.
    """
    return Kernel(
        "blockwise",
        functools.partial(_forward, scoring, block_size),
        functools.partial(_backward, scoring, block_size),
    )


def _divide(tokens: int, block_size: int) -> tuple[int, int]:
    """The number of blocks and their size: equal blocks need little padding at any length."""
    count = -(-tokens // block_size)
    return count, -(-tokens // (16 * count)) * 16


def _blocks(
    x: Shaped[Array, "batch tokens *rest"], block_size: int
) -> Shaped[Array, "blocks batch size *rest"]:
    batch, tokens = x.shape[:2]
    count, size = _divide(tokens, block_size)
    padded = jnp.pad(x, [(0, 0), (0, count * size - tokens)] + [(0, 0)] * (x.ndim - 2))
    return padded.reshape(batch, count, size, *x.shape[2:]).swapaxes(0, 1)


class _Divided(NamedTuple):
    """The arrays of a call, in blocks."""

    q: QueryBlocks
    k: KeyBlocks
    v: KeyBlocks
    infos: _Infos

    @staticmethod
    def of(block_size: int, x: Arrays, others: Arrays) -> "_Divided":
        q, k, v = x
        info = TokenInfo(others[0], others[1])
        key_infos = jax.tree.map(lambda leaf: _blocks(leaf, block_size), info)
        infos = _Infos(key_infos, key_infos, None)
        if len(others) == 3:
            index = others[2]
            query_infos = jax.tree.map(lambda leaf: _blocks(leaf, block_size), info_at(info, index))
            infos = _Infos(query_infos, key_infos, _blocks(index, block_size))
        keys, values = (_blocks(part, block_size).swapaxes(2, 3) for part in (k, v))
        return _Divided(_rows(q, k.shape[2], block_size), keys, values, infos)


def _rows(x: Array, kv_heads: int, block_size: int) -> Array:
    """`[batch, queries, heads, ...]` in blocks, the heads of a group stacked."""
    return jax.vmap(functools.partial(stack_rows, kv_heads=kv_heads))(_blocks(x, block_size))


def _unblock(rows: Array, like: Array, block_size: int) -> Array:
    """Undoes `_rows` and `_blocks`: to `[batch, queries, heads, ...]` of so many queries."""
    _, size = _divide(like.shape[1], block_size)
    blocks = jax.vmap(functools.partial(unstack_rows, tokens=size))(rows).swapaxes(0, 1)
    return blocks.reshape(like.shape[0], -1, *blocks.shape[3:])[:, : like.shape[1]]


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


def _logits(
    scoring: Scoring, head_dim: int, products: Scores, infos: _Infos, pair: _Pair
) -> Scores:
    i, j = pair
    size = products.shape[-1]
    slot = jnp.arange(size, dtype=jnp.int32)
    order = (i * size + slot)[None] if infos.order is None else infos.order[i]
    earlier = order[:, :, None] >= (j * size + slot)[None, None, :]
    queries = jax.tree.map(lambda leaf: leaf[i], infos.queries)
    keys = jax.tree.map(lambda leaf: leaf[j], infos.keys)
    return scoring.logits(products, head_dim, queries, keys, earlier)


def _forward(
    scoring: Scoring, block_size: int, x: Arrays, others: Arrays
) -> tuple[Array, Float[Array, "batch heads queries"]]:
    q, k, v, infos = _Divided.of(block_size, x, others)
    head_dim, wide = q.shape[-1], float32_or_wider(q.dtype)

    def add(state: _Carry, pair: _Pair) -> tuple[_Carry, None]:
        i, j = pair
        products = product("bgqd,bgkd->bgqk", q[i], k[j])
        logits = _logits(scoring, head_dim, products, infos, pair)
        top, total, out = state
        new = add_keys((top[i], total[i], out[i]), logits, v[j])
        top, total, out = (part.at[i].set(block) for part, block in zip(state, new, strict=True))
        return (top, total, out), None

    start = (jnp.full(q.shape[:-1], MASKED, wide), jnp.zeros(q.shape[:-1], wide))
    pairs = _pairs(scoring, infos)
    (top, total, out), _ = jax.lax.scan(add, (*start, jnp.zeros(q.shape, wide)), pairs)
    out = _unblock(out / total[..., None], x[0], block_size).astype(x[0].dtype)
    return out, _unblock(top + jnp.log(total), x[0], block_size).swapaxes(1, 2)


def _backward(
    scoring: Scoring,
    block_size: int,
    x: Arrays,
    others: Arrays,
    out: Array,
    log_total: Float[Array, "batch heads queries"],
    d_out: Array,
) -> Arrays:
    q, k, v, infos = _Divided.of(block_size, x, others)
    kv_heads, head_dim, wide = k.shape[2], q.shape[-1], float32_or_wider(q.dtype)
    # What the softmax's normalisation takes from each row.
    drift = jnp.sum(d_out.astype(wide) * out.astype(wide), axis=-1)
    rows = functools.partial(_rows, kv_heads=kv_heads, block_size=block_size)
    drifts, log_totals = rows(drift), rows(log_total.swapaxes(1, 2))
    d_outs = rows(d_out)

    def add(gradients: _Carry, pair: _Pair) -> tuple[_Carry, None]:
        i, j = pair
        d_q, d_k, d_v = gradients
        logits, pull_back = jax.vjp(
            lambda products: _logits(scoring, head_dim, products, infos, pair),
            product("bgqd,bgkd->bgqk", q[i], k[j]),
        )
        weights = jnp.exp(logits - log_totals[i][..., None])
        d_weights = product("bgqd,bgkd->bgqk", d_outs[i], v[j])
        (d_products,) = pull_back(weights * (d_weights - drifts[i][..., None]))
        d_products, weights = d_products.astype(q.dtype), weights.astype(q.dtype)
        return (
            d_q.at[i].add(product("bgqk,bgkd->bgqd", d_products, k[j])),
            # Transposed results: a CPU's matrix product is half as fast the other way round.
            d_k.at[j].add(product("bgqd,bgqk->bgdk", q[i], d_products)),
            d_v.at[j].add(product("bgqd,bgqk->bgdk", d_outs[i], weights)),
        ), None

    zeros = jnp.zeros(k.swapaxes(-1, -2).shape, wide)
    pairs = _pairs(scoring, infos)
    start = (jnp.zeros(q.shape, wide), zeros, zeros)
    (d_q, d_k, d_v), _ = jax.lax.scan(add, start, pairs)
    d_q = _unblock(d_q, x[0], block_size)
    d_k, d_v = (
        part.transpose(1, 0, 4, 2, 3).reshape(part.shape[1], -1, kv_heads, head_dim)
        for part in (d_k, d_v)
    )
    tokens = x[1].shape[1]
    return tuple(
        part.astype(like.dtype)
        for part, like in zip((d_q, d_k[:, :tokens], d_v[:, :tokens]), x, strict=True)
    )
