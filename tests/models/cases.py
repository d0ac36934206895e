"""Small layers, and the layers of a model one by one."""

from typing import Any

import equinox as eqx
import jax
from jaxtyping import PRNGKeyArray

import mode
from tests.layers import DIM, TOKENS, VOCAB, Blend, depth, expert


KEY = jax.random.key(8)
IDS = jax.random.randint(KEY, (2, TOKENS), 0, VOCAB)


def dense(key: PRNGKeyArray) -> mode.Residual:
    return mode.Residual(Blend(key))


def routed(key: PRNGKeyArray) -> mode.MixtureOfDepths:
    return depth(key)


def half(key: PRNGKeyArray) -> mode.MixtureOfDepths:
    return depth(key, capacity=0.5)


def mixed(key: PRNGKeyArray) -> mode.Residual:
    return mode.integrated_mode_layer(expert, DIM, 2, 3, 1, key=key)


def model(*period: Any, repeats: int = 1, **options: Any) -> mode.Transformer:
    return mode.Transformer(VOCAB, DIM, period or None, repeats, key=KEY, **options)


def layers_in_order(model: mode.Transformer) -> list[Any]:
    """All layers from bottom to top, each with its own parameters."""
    layers = []
    for stack in model.stacks:
        arrays, rest = eqx.partition(stack.layers, eqx.is_array)
        for repeat in range(stack.repeats):
            one = jax.tree.map(lambda leaf, at=repeat: leaf[at], arrays)
            layers.extend(eqx.combine(one, rest))
    return layers
