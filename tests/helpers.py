"""What several test files share: seeds, tolerances, and small layers to test."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree
from numpy.typing import ArrayLike

import mode
from tests import reference as ref


# Relative and absolute, per dtype of the result: the one place where tolerances are set.
TOLERANCE = {
    "float64": 1e-9,
    "float32": 2e-5,
    "float16": 4e-3,
    "bfloat16": 3e-2,
}


def assert_close(actual: PyTree, expected: PyTree, *, scale: float = 1.0) -> None:
    """Equal shapes, and equal numbers up to what the dtype of `actual` can hold.

    `scale` widens the tolerance for results that are sums of many terms of that size.
    """
    actual_leaves, actual_tree = jax.tree.flatten(actual)
    expected_leaves, expected_tree = jax.tree.flatten(expected)
    assert actual_tree == expected_tree
    for one, other in zip(actual_leaves, expected_leaves, strict=True):
        one, other = np.asarray(one), np.asarray(other)
        assert one.shape == other.shape, (one.shape, other.shape)
        tolerance = scale * TOLERANCE.get(str(one.dtype), 0)
        np.testing.assert_allclose(
            one.astype(np.float64), other.astype(np.float64), rtol=tolerance, atol=tolerance
        )


@eqx.filter_jit
def run(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """`function(*arguments, **options)` compiled, once for all tests that use the same shapes."""
    return function(*arguments, **options)


def rng(seed: int) -> np.random.Generator:
    """Numbers that are the same in every run."""
    return np.random.default_rng(seed)


def f64(values: ArrayLike) -> ref.Floats:
    """What the oracle takes: the numbers of an array, in float64."""
    return np.asarray(values).astype(np.float64)


def hidden_states(seed: int, *shape: int) -> Float[Array, "..."]:
    """Gaussian hidden states in float32."""
    return jnp.asarray(rng(seed).normal(size=shape), jnp.float32)


def padded_info(*lengths: int, tokens: int) -> mode.TokenInfo:
    """`[len(lengths), tokens]`: whole sequences of these lengths, padding behind them."""
    segments = np.arange(tokens) < np.array(lengths)[:, None]
    return mode.TokenInfo.packed(jnp.asarray(segments, jnp.int32))


def packed_info(*documents: tuple[int, ...], tokens: int) -> mode.TokenInfo:
    """`[len(documents), tokens]`: each sequence packs documents of these lengths, then padding."""
    segments = np.zeros((len(documents), tokens), np.int32)
    for row, lengths in zip(segments, documents, strict=True):
        filled = np.repeat(np.arange(1, len(lengths) + 1), lengths)
        row[: len(filled)] = filled
    return mode.TokenInfo.packed(jnp.asarray(segments))


def oracle_router(router: mode.Router) -> ref.Floats:
    """The scorer's weights as the oracle has them, `[choices, dim]`."""
    return f64(router.scorer.weight).T


def oracle_experts(experts: mode.GELU | mode.SwiGLU) -> list[Callable[[ref.Floats], ref.Floats]]:
    """Stacked experts as one function of `[..., dim]` each."""
    count = experts.up.weight.shape[0]
    return [oracle_function(jax.tree.map(lambda leaf, e=e: leaf[e], experts)) for e in range(count)]


def oracle_function(function: mode.GELU | mode.SwiGLU) -> Callable[[ref.Floats], ref.Floats]:
    """A feed-forward with its weights, as a NumPy function of `[..., dim]`."""
    up, down = f64(function.up.weight), f64(function.down.weight)
    if isinstance(function, mode.GELU):
        return lambda x: ref.gelu_feedforward(x, up, down)
    gate = f64(function.gate.weight)
    return lambda x: ref.swiglu_feedforward(x, gate, up, down)


def oracle_block(
    block: mode.TransformerBlock, feedforward: Callable[[ref.Floats], ref.Floats] | None = None
) -> ref.Block:
    """A transformer block with its weights, as the oracle's `(x, positions, segment_ids)`.

    `feedforward` stands in for one that is not position-wise.
    """
    attention = block.attention
    if feedforward is None:
        feedforward = oracle_function(block.feedforward.function)
    heads, kv_heads = attention.num_heads, attention.num_kv_heads
    size = attention.out.weight.shape[0] // heads
    w_q, w_k, w_v = np.split(
        f64(attention.qkv.weight), [heads * size, (heads + kv_heads) * size], 1
    )
    params = ref.BlockParams(
        norm1=f64(block.attention_norm.weight),
        w_q=w_q,
        w_k=w_k,
        w_v=w_v,
        w_o=f64(attention.out.weight),
        norm2=f64(block.feedforward_norm.weight),
        feedforward=feedforward,
        num_heads=heads,
        num_kv_heads=kv_heads,
        theta=attention.rope_theta,
    )
    return lambda x, positions, segments: ref.transformer_block_delta(
        x, params, positions, segments
    )
