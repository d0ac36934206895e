"""Staged and integrated MoDE, and their control, against the oracle."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mode
from tests import reference as ref
from tests.helpers import (
    assert_close,
    hidden_states,
    oracle_block,
    oracle_experts,
    oracle_router,
    run,
)
from tests.nn.cases import DIM, INFOS, TOKENS, make_expert, numbers
from tests.routing.draws import assert_assigned


infos = pytest.mark.parametrize("info", INFOS.values(), ids=INFOS)
KEY = jax.random.key(4)


@infos
def test_staged(info: mode.TokenInfo | None) -> None:
    """Depth first; attention and the expert router see the selected tokens, and no others."""
    layer = mode.staged_mode_layer(make_expert, DIM, 4, 3, capacity=0.5, key=KEY)
    x = hidden_states(9, 3, TOKENS, DIM)
    hidden, (depth, experts) = run(layer, x, info)
    block: Any = layer.block
    inner = block.feedforward
    assert (depth.index.shape, experts.index.shape) == ((3, 1, 6), (3, 3, 2))

    def feedforward(x: ref.Floats) -> ref.Floats:
        def choose(scores: ref.Floats, valid: ref.Bools) -> ref.Assignment:
            return ref.expert_choice(scores, valid, 3, 2)

        functions = oracle_experts(inner.experts)
        return ref.mixture_of_experts(x, oracle_router(inner.router), functions, choose)[0]

    def staged(x: Any, valid: Any, positions: Any, segments: Any) -> Any:
        update = oracle_block(block, feedforward)
        router = oracle_router(layer.router)[0]
        return ref.mixture_of_depths(x, router, update, 0.5, "absolute", valid, positions, segments)

    expected, assignment = ref.over_groups(staged, 1, *numbers(x, info))
    assert_assigned(depth, assignment)
    assert_close(hidden, expected)
    np.testing.assert_array_equal(np.asarray(experts.valid), np.asarray(depth.filled[:, 0]))


@infos
@pytest.mark.parametrize("k", [None, 1])
def test_integrated(k: int | None, info: mode.TokenInfo | None) -> None:
    """Attention for every token; the feed-forward for those that an expert selected."""
    select = mode.ExpertChoice() if k is None else mode.TokenChoice(k)
    layer = mode.integrated_mode_layer(make_expert, DIM, 4, 3, 1, select=select, key=KEY)
    x = hidden_states(10, 3, TOKENS, DIM)
    hidden, (routing,) = run(layer, x, info)
    block: Any = layer.block
    experts = block.feedforward
    assert routing.index.shape == (3, 3, 3)

    def choose(scores: ref.Floats, valid: ref.Bools) -> ref.Assignment:
        if k is None:
            return ref.expert_choice(scores, valid, 3, 3)
        return ref.token_choice(scores, valid, 3, 3, k)

    def integrated(x: Any, valid: Any, positions: Any, segments: Any) -> ref.Floats:
        def feedforward(normed: ref.Floats) -> ref.Floats:
            functions, router = oracle_experts(experts.experts), oracle_router(experts.router)
            return ref.mixture_of_experts(normed, router, functions, choose, valid=valid)[0]

        update = oracle_block(block, feedforward)(x, positions, segments)
        return x + np.where(valid[:, None], update, 0)

    assert_close(hidden, ref.over_groups(integrated, 1, *numbers(x, info)))


def test_the_control_costs_what_the_integrated_layer_costs() -> None:
    """By smaller capacity alone: the same slots and FLOPs, no no-ops."""
    integrated = mode.integrated_mode_layer(make_expert, DIM, 2, 3, 1, key=KEY)
    reduced = mode.reduced_capacity_moe(make_expert, DIM, 2, 3, 1, key=KEY)
    like = jax.ShapeDtypeStruct((2, 64, DIM), jnp.float32)
    costs = [mode.count_flops(layer, like) for layer in (integrated, reduced)]
    for part in ("mode.GELUFeedForward", "mode.Attention"):
        assert costs[0].parts[part] == costs[1].parts[part]
    assert costs[0].matmul == pytest.approx(costs[1].matmul, rel=0.02)
    shapes = [jax.eval_shape(layer, like)[1][0] for layer in (integrated, reduced)]
    assert shapes[0].index.shape == shapes[1].index.shape
    assert (shapes[0].logits.shape[-1], shapes[1].logits.shape[-1]) == (4, 3)
