"""Modules of a user's own inside layers: they get keys, and keep the dtype of the stream."""

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array, Float, PRNGKeyArray

import mode
from tests.layers import DIM, TOKENS, depth, transformer_block


KEY = jax.random.key(0)
DROPOUT = eqx.nn.Dropout(0.5)


def ones(dtype: Any = jnp.float32) -> Float[Array, "batch tokens dim"]:
    return jnp.ones((2, TOKENS, DIM), dtype)


class Dropping(eqx.Module):
    """An expert whose result a key decides."""

    dropout: eqx.nn.Dropout
    weight: Array

    def __init__(self, key: PRNGKeyArray) -> None:
        self.dropout = DROPOUT
        self.weight = jnp.ones(DIM)

    def __call__(self, vector: Array, *, key: PRNGKeyArray | None = None) -> Array:
        return self.dropout(self.weight * vector, key=key)


def experts(key: PRNGKeyArray) -> mode.Residual:
    return mode.Residual(
        mode.MixtureOfExperts(Dropping, DIM, 4, num_shared=1, router_std=1.0, key=key)
    )


@pytest.mark.parametrize(
    "make",
    [
        lambda key: mode.Residual(mode.Delta(DROPOUT)),
        lambda key: mode.Residual(mode.PositionWise(DROPOUT)),
        experts,
        lambda key: depth(key, lambda _: mode.Delta(DROPOUT), select=mode.RandomChoice()),
        lambda key: mode.stack_layers([experts], 2, key=key),
    ],
    ids=["delta", "position-wise", "experts", "depth", "stack"],
)
def test_a_module_with_dropout_gets_keys(make: Callable[[PRNGKeyArray], Any]) -> None:
    """A key is passed to every module that takes one, a different one to every row."""
    layer = make(KEY)
    run = jax.jit(lambda x, key: layer(x, key=key)[0] - x)
    first, again, other = (run(ones(), jax.random.key(seed)) for seed in (1, 1, 2))
    assert (first == again).all()
    assert (first != other).any()
    assert (first[0] != first[1]).any()
    with pytest.raises((RuntimeError, ValueError), match="key"):
        layer(ones())


def test_a_block_of_a_wider_dtype_keeps_that_of_the_stream() -> None:
    """A block that computes in float32 does not widen a bfloat16 model."""

    def wide(x: Any, info: Any, *, key: Any = None) -> Any:
        return x.astype(jnp.float32) / 2, ()

    for layer in (mode.Residual(wide), depth(KEY, lambda _: wide)):
        for info in (None, mode.TokenInfo.plain((2, TOKENS))):
            hidden, _ = eqx.filter_eval_shape(layer, ones(jnp.bfloat16), info)
            assert hidden.dtype == jnp.bfloat16


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize("number", [np.float32(0.25), np.float64(0.25), Fraction(1, 4)])
def test_numbers_of_any_kind_are_capacities(number: Any) -> None:
    """NumPy's too, in the precision in which they were written."""
    layer = mode.MixtureOfDepths(transformer_block(KEY), DIM, number, key=KEY)
    assert layer.router.capacity == Fraction(1, 4)
    assert mode.token_capacity(1000, np.float32(0.7)) == 700  # pyright: ignore[reportArgumentType]
    assert type(mode.token_capacity(1000, number)) is int


@pytest.mark.usefixtures("without_type_checks")
def test_predictor_and_block_of_a_users_own() -> None:
    """Any callables of the right shapes will do."""

    def block(x: Any, info: Any, *, key: Any = None) -> Any:
        return jnp.where(info.valid[..., None], jnp.tanh(x), 0), ()

    def predictor(x: Any) -> Any:
        return x[..., :1] - 0.5

    layer = mode.MixtureOfDepths(block, DIM, 0.5, predictor=predictor, key=KEY)  # pyright: ignore
    layer = mode.make_causal(layer)
    x = jax.random.normal(KEY, (2, TOKENS, DIM))
    hidden, (routing,) = layer(x)
    selected = np.asarray(x[..., 0] > 0.5)
    assert (routing.selected[..., 0] == selected).all()
    weight = np.abs(routing.logits)
    expected = np.where(selected[..., None], x + weight * np.tanh(x), x)
    np.testing.assert_allclose(hidden, expected, rtol=1e-5, atol=1e-5)
