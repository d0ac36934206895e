"""Seeds, tolerances, small inputs, bad numbers, and the weights of layers for the oracle."""

import re
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array, Float, PyTree
from numpy.typing import ArrayLike

import mode
from tests import reference as ref


# Relative and absolute, per dtype of the result. No other file sets a tolerance.
TOLERANCE = {"float64": 1e-9, "float32": 2e-5, "float16": 4e-3, "bfloat16": 3e-2}


def assert_close(actual: PyTree, expected: PyTree, *, scale: float = 1.0) -> None:
    """Equal shapes, and equal numbers up to what the dtype of `actual` can hold.

    `scale` widens the tolerance for results that are sums of many terms of that size.
    """
    actual_leaves, actual_tree = jax.tree.flatten(actual)
    expected_leaves, expected_tree = jax.tree.flatten(expected)
    assert actual_tree == expected_tree
    for leaf, target in zip(actual_leaves, expected_leaves, strict=True):
        leaf, target = np.asarray(leaf), np.asarray(target)
        assert leaf.shape == target.shape, (leaf.shape, target.shape)
        tolerance = scale * TOLERANCE.get(str(leaf.dtype), 0)
        np.testing.assert_allclose(
            leaf.astype(np.float64), target.astype(np.float64), rtol=tolerance, atol=tolerance
        )


@eqx.filter_jit
def run(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """`function(*arguments, **options)` compiled, once for all tests that use the same shapes."""
    return function(*arguments, **options)


def rng(seed: int) -> np.random.Generator:
    """Numbers that are the same in every run."""
    return np.random.default_rng(seed)


def f64(values: ArrayLike) -> ref.Floats:
    """The numbers of an array in float64, as the oracle reads them."""
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
    """The scorer's weights, transposed to `[choices, dim]`."""
    assert isinstance(router.scorer, mode.Linear)
    return f64(router.scorer.weight).T


def oracle_experts(experts: object) -> list[Callable[[ref.Floats], ref.Floats]]:
    """Stacked feed-forwards as one function of `[..., dim]` each."""
    assert isinstance(experts, mode.GELUFeedForward | mode.SwiGLUFeedForward)
    count = experts.up.weight.shape[0]
    return [oracle_function(jax.tree.map(lambda leaf, e=e: leaf[e], experts)) for e in range(count)]


def oracle_function(
    function: mode.GELUFeedForward | mode.SwiGLUFeedForward,
) -> Callable[[ref.Floats], ref.Floats]:
    """A feed-forward with its weights, as a NumPy function of `[..., dim]`."""
    up, down = f64(function.up.weight), f64(function.down.weight)
    if isinstance(function, mode.GELUFeedForward):
        return lambda x: ref.gelu_feedforward(x, up, down)
    gate = f64(function.gate.weight)
    return lambda x: ref.swiglu_feedforward(x, gate, up, down)


def oracle_projections(attention: mode.Attention) -> list[ref.Floats]:
    """The weights of queries, keys and values, each `[dim, heads * head_dim]`."""
    size = attention.out.weight.shape[0] // attention.num_heads
    ends = [attention.num_heads * size, (attention.num_heads + attention.num_kv_heads) * size]
    return np.split(f64(attention.qkv.weight), ends, axis=1)


def oracle_options(attend: Callable[..., Any]) -> ref.AttentionOptions:
    """What a `CausalAttention` does to its scores."""
    assert isinstance(attend, mode.CausalAttention)
    scoring = attend.scoring
    return ref.AttentionOptions(scoring.scale, scoring.soft_cap, scoring.window, scoring.alibi)


def oracle_block(
    block: mode.TransformerBlock, feedforward: Callable[[ref.Floats], ref.Floats] | None = None
) -> ref.Block:
    """A transformer block with its weights, as the oracle's `(x, positions, segment_ids, weights)`,
    and its `keys_of` and `index`.

    `feedforward` replaces one that is not position-wise.
    """
    attention = block.attention
    if feedforward is None:
        assert isinstance(block.feedforward, mode.PositionWise)
        function = block.feedforward.function
        assert isinstance(function, mode.GELUFeedForward | mode.SwiGLUFeedForward)
        feedforward = oracle_function(function)
    w_q, w_k, w_v = oracle_projections(attention)
    params = ref.BlockParams(
        norm1=f64(block.attention_norm.weight),
        w_q=w_q,
        w_k=w_k,
        w_v=w_v,
        w_o=f64(attention.out.weight),
        norm2=f64(block.feedforward_norm.weight),
        feedforward=feedforward,
        num_heads=attention.num_heads,
        num_kv_heads=attention.num_kv_heads,
        theta=attention.rope_theta,
        options=oracle_options(attention.attend),
    )

    def run(
        x: ref.Floats, positions: Any, segments: Any, weights: Any = None, **keys: Any
    ) -> ref.Floats:
        return ref.transformer_block_delta(x, params, positions, segments, weights, **keys)

    return run


# A parameter, a call with a value for it, values out of its range, and the words of the rule.
Number = tuple[str, Callable[[Any], Any], list[Any], str]


def each_number(numbers: Sequence[Number]) -> pytest.MarkDecorator:
    """Makes a test of every value that is out of its range."""
    cases = [(name, call, value, rule) for name, call, values, rule in numbers for value in values]
    return pytest.mark.parametrize(("name", "call", "value", "rule"), cases)


def assert_number_is_refused(name: str, call: Callable[[Any], Any], value: Any, rule: str) -> None:
    """Checks that the error names the argument, its range and the value."""
    with pytest.raises(ValueError, match=rf"^`{name}`.*{rule}.*got {re.escape(repr(value))}"):
        eqx.filter_eval_shape(lambda: call(value))
