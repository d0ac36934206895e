"""A layer of every kind, and models of them, that several test files put on a mesh."""

from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array, Int, PRNGKeyArray

import mode


DIM, VOCAB, TOKENS, BATCH = 32, 64, 32, 8
KEY = jax.random.key(1)


def expert(key: PRNGKeyArray) -> mode.GELUFeedForward:
    return mode.GELUFeedForward(DIM, key=key)


def block(key: PRNGKeyArray) -> mode.TransformerBlock:
    return mode.TransformerBlock(DIM, 2, key=key)


KINDS: dict[str, Callable[[PRNGKeyArray], Any]] = {
    "dense": lambda key: mode.Residual(block(key)),
    "mod": lambda key: mode.MixtureOfDepths(block(key), DIM, 0.25, key=key),
    "random": lambda key: mode.MixtureOfDepths(
        block(key), DIM, 0.25, select=mode.RandomChoice(), key=key
    ),
    "moe": lambda key: mode.integrated_mode_layer(expert, DIM, 2, 8, 0, key=key),
    "token_choice": lambda key: mode.integrated_mode_layer(
        expert, DIM, 2, 4, 0, select=mode.TokenChoice(2), key=key
    ),
    "staged": lambda key: mode.staged_mode_layer(expert, DIM, 2, 4, capacity=0.5, key=key),
    "integrated": lambda key: mode.integrated_mode_layer(expert, DIM, 2, 4, 2, key=key),
}


def build(*kinds: str, repeats: int = 2) -> mode.Transformer:
    """A model whose period has a layer of each kind."""
    period = [KINDS[kind] for kind in kinds]
    return mode.Transformer(VOCAB, DIM, period, repeats, key=KEY)


def tokens() -> Int[Array, "batch tokens"]:
    return jax.random.randint(KEY, (BATCH, TOKENS), 0, VOCAB)
