"""Inputs that no layer takes: hidden states of another shape or dtype, info of other tokens."""

import functools
import re
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from jaxtyping import Array

import mode
from tests.layers import DIM, VOCAB, depth, experts, transformer_block


pytestmark = pytest.mark.usefixtures("without_type_checks")

KEY = jax.random.key(0)


def x(*shape: int, dtype: Any = jnp.float32) -> Array:
    return jnp.ones(shape, dtype)


@functools.cache
def layers() -> dict[str, Any]:
    return {
        "dense": mode.Residual(transformer_block(KEY)),
        "mod": depth(KEY, transformer_block),
        "moe": experts(KEY),
        "block": transformer_block(KEY),
        "experts": experts(KEY).block,
        "model": mode.mod_transformer(VOCAB, DIM, 2, 2, key=KEY),
    }


@pytest.mark.parametrize("name", ["dense", "mod", "moe", "block", "experts"])
@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (x(DIM), r"`x` must have the axes \[\*groups, tokens, dim\], got shape \(16,\)"),
        (x(2, 0, DIM), r"`x` must hold at least one token, got shape \(2, 0, 16\)"),
        (x(0, 8, DIM), r"`x` must hold at least one token, got shape \(0, 8, 16\)"),
        (x(2, 8, 12), r"`x` must have 16 features .*`dim=16`, got shape \(2, 8, 12\)"),
        (x(2, 8, DIM, dtype=jnp.int32), r"`x` must be of a floating dtype, got int32"),
        (x(2, 8, DIM, dtype=bool), r"`x` must be of a floating dtype, got bool"),
    ],
    ids=["rank", "no tokens", "no groups", "dim", "integers", "booleans"],
)
def test_hidden_states_that_no_layer_takes(name: str, bad: Array, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        eqx.filter_eval_shape(layers()[name], bad)


@pytest.mark.parametrize("name", ["dense", "mod", "moe", "block", "experts", "model"])
@pytest.mark.parametrize("shape", [(8,), (2, 9), (3, 8)])
def test_info_of_other_tokens(name: str, shape: tuple[int, ...]) -> None:
    tokens = jnp.zeros((2, 8), int) if name == "model" else x(2, 8, DIM)
    words = rf"`info` must have the shape .*\(2, 8\), got {re.escape(str(shape))}"
    with pytest.raises(ValueError, match=words):
        eqx.filter_eval_shape(layers()[name], tokens, mode.TokenInfo.plain(shape))
