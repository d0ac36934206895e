"""Every form of depth against its oracle on a thousand sequences.

A case is a sequence with hidden states and documents of its own; parameters are drawn anew for each
batch. The layers of one form are one program.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import numpy as np
import pytest
from jaxtyping import Array

import mode
from tests import reference as ref
from tests.helpers import assert_close, hidden_states, oracle_block, packed_info, rng, run
from tests.nn import oracles
from tests.nn.cases import DIM, TOKENS, make_expert, numbers
from tests.routing.draws import assert_assigned


BATCHES, SEQUENCES = 25, 40
CAPACITIES = (0.75, 0.5, 0.25)

# Builds a layer from a key, and its oracle from the layer.
Form = tuple[Callable[[Array], Any], Callable[[Any], oracles.Oracle]]


def make_block(key: Array) -> mode.TransformerBlock:
    return mode.TransformerBlock(DIM, 4, num_kv_heads=2, key=key)


def depths(key: Array) -> mode.MixtureOfDepths:
    keys = jax.random.split(key)
    return mode.MixtureOfDepths(make_block(keys[0]), DIM, 0.5, key=keys[1])


def queries(key: Array) -> mode.MixtureOfQueries:
    keys = jax.random.split(key)
    return mode.MixtureOfQueries(make_block(keys[0]), DIM, 0.5, key=keys[1])


class Apart(eqx.Module):
    """Attention by one router and the feed-forward by another, and the block that they are of."""

    layers: mode.Sequential
    block: mode.TransformerBlock

    def __init__(self, key: Array):
        keys = jax.random.split(key, 3)
        self.block = make_block(keys[0])
        attention, feedforward = self.block.split()
        self.layers = mode.Sequential(
            [
                mode.MixtureOfDepths(attention, DIM, 0.5, key=keys[1]),
                mode.MixtureOfDepths(feedforward, DIM, 0.25, key=keys[2]),
            ]
        )

    def __call__(self, x: Any, info: mode.TokenInfo) -> Any:
        return self.layers(x, info)


def of_apart(layer: Apart) -> oracles.Oracle:
    attention, feedforward = layer.layers.layers
    alone = oracle_block(layer.block, oracles.zeros_of)
    return oracles.in_turn(
        oracles.of_depths(attention, alone, 0.5),
        oracles.of_depths(feedforward, oracles.of_feedforward(layer.block), 0.25),
    )


def recursion(key: Array, share_keys: bool = False) -> mode.Recursion:
    keys = jax.random.split(key)
    options = {"share_keys": share_keys, "router_std": 0.5}
    return mode.Recursion(make_block(keys[0]), DIM, CAPACITIES, key=keys[1], **options)


def by_choice(key: Array, share_keys: bool = False) -> mode.TokenChoiceRecursion:
    keys = jax.random.split(key)
    options = {"capacity_factor": 1.5, "share_keys": share_keys, "router_std": 0.5}
    return mode.TokenChoiceRecursion(make_block(keys[0]), DIM, 3, key=keys[1], **options)


def free_experts(key: Array) -> mode.MixtureOfExperts:
    keys = jax.random.split(key)
    free = {"num_noop": 1, "num_copy": 1, "num_constant": 2}
    options = {**free, "select": mode.TokenChoice(2), "router_std": 1.0}
    layer = mode.MixtureOfExperts(make_expert, DIM, 3, key=keys[0], **options)
    constant = jax.random.normal(keys[1], (2, DIM))
    return eqx.tree_at(lambda m: m.free.constant, layer, constant)


def expert_threshold(key: Array) -> mode.MixtureOfExperts:
    keys = jax.random.split(key)
    select = mode.QuantileThreshold(max_capacity=None)  # as many slots as in training
    options = {"select": select, "gate": mode.SigmoidGate(), "router_std": 1.0}
    layer = mode.MixtureOfExperts(make_expert, DIM, 3, key=keys[0], **options)
    threshold = jax.random.normal(keys[1], (3,))
    return eqx.tree_at(lambda m: m.router.state.threshold, layer, threshold)


FORMS: dict[str, Form] = {
    "mod": (depths, lambda layer: oracles.of_depths(layer, oracle_block(layer.block), 0.5)),
    "queries": (queries, oracles.of_queries),
    "attention and feed-forward apart": (Apart, of_apart),
    "recursion": (recursion, lambda layer: oracles.of_recursion(layer, [9, 6, 3])),
    "recursion, shared keys": (
        lambda key: recursion(key, share_keys=True),
        lambda layer: oracles.of_recursion(layer, [9, 6, 3]),
    ),
    "token choice recursion": (
        by_choice,
        lambda layer: oracles.of_token_choice_recursion(layer, 6),
    ),
    "token choice recursion, shared keys": (
        lambda key: by_choice(key, share_keys=True),
        lambda layer: oracles.of_token_choice_recursion(layer, 6),
    ),
    "free experts": (free_experts, lambda layer: oracles.of_free_experts(layer, 4, k=2)),
    "expert threshold": (expert_threshold, lambda layer: oracles.of_expert_threshold(layer, 4)),
}


def draw_info(draw: np.random.Generator) -> mode.TokenInfo:
    """Two documents, one, or none in each sequence, then padding."""
    cuts = [np.diff([0, *sorted(draw.integers(0, TOKENS + 1, 2))]) for _ in range(SEQUENCES)]
    return packed_info(*[tuple(int(n) for n in cut if n) for cut in cuts], tokens=TOKENS)


@pytest.mark.parametrize("form", FORMS)
def test_a_thousand_cases(form: str) -> None:
    make, oracle_of = FORMS[form]
    build = eqx.filter_jit(make)
    for seed in range(BATCHES):
        layer = build(jax.random.key(seed))
        x, info = hidden_states(seed, SEQUENCES, TOKENS, DIM), draw_info(rng(seed))
        hidden, routings = run(layer, x, info)
        expected, assignments = ref.over_groups(oracle_of(layer), 1, *numbers(x, info))
        for routing, assignment in zip(routings, assignments, strict=True):
            assert_assigned(routing, assignment)
        assert np.any(expected != 0)
        assert_close(hidden, expected, scale=3)
