"""`MixtureOfExperts` against the oracle, with its weights exported to it."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array

import mode
from tests import reference as ref
from tests.helpers import (
    assert_close,
    f64,
    hidden_states,
    oracle_experts,
    oracle_router,
    padded_info,
    rng,
    run,
)
from tests.nn.cases import DIM, INFOS, TOKENS, make_block, make_experts, numbers
from tests.routing.draws import GATES, assert_assigned


INF = float("inf")


@pytest.mark.parametrize(
    ("gate", "k"),
    [
        (gate, k)
        for gate in GATES
        for k in (None, 1, 2)
        if gate != "twice sigmoid" and (gate, k) != ("selected softmax", 1)
    ],
)
def test_every_gate_with_expert_and_token_choice(gate: str, k: int | None) -> None:
    """No-ops, a selection bias that changes the choice and not the weight, padding and drops."""
    gate_of_layer, name, scale = GATES[gate]
    select = mode.ExpertChoice() if k is None else mode.TokenChoice(k)
    layer = make_experts(
        select=select, gate=gate_of_layer, num_noop=2, capacity_factor=1.0, router_std=1.0
    )
    bias = rng(5).normal(size=5).astype(np.float32)
    layer = eqx.tree_at(lambda m: m.router.state.bias, layer, jnp.asarray(bias))
    info = INFOS["padded"]
    x = hidden_states(6, 3, TOKENS, DIM)
    update, (routing,) = run(layer, x, info)

    def choose(scores: ref.Floats, valid: ref.Bools) -> ref.Assignment:
        if k is None:
            return ref.expert_choice(scores, valid, 3, 4)
        return ref.token_choice(scores, valid, 3, 4, k)

    def experts(x: Any, valid: Any) -> Any:
        return ref.mixture_of_experts(
            x,
            oracle_router(layer.router),
            oracle_experts(layer.experts),
            choose,
            name,
            valid,
            bias=f64(bias),
            scale=scale,
        )

    expected, assignment = ref.over_groups(experts, 1, *numbers(x, info)[:2])
    assert_assigned(routing, assignment)
    assert_close(update, expected)


def test_shared_experts_see_every_token_with_weight_one() -> None:
    """The routed sum plus what each shared expert returns; none for padding."""

    def make(key: Array) -> mode.SwiGLUFeedForward:
        return mode.SwiGLUFeedForward(DIM, 24, key=key)

    layer = make_experts(make=make, num_shared=2, num_experts=4, capacity_factor=0.5)
    info = padded_info(12, 5, tokens=TOKENS)
    x = hidden_states(7, 2, TOKENS, DIM)
    update, _ = run(layer, x, info)

    def experts(x: Any, valid: Any) -> ref.Floats:
        def choose(scores: ref.Floats, valid: ref.Bools) -> ref.Assignment:
            return ref.expert_choice(scores, valid, 4, 1)

        functions = oracle_experts(layer.experts)
        router = oracle_router(layer.router)
        routed, _ = ref.mixture_of_experts(x, router, functions, choose, valid=valid)
        shared = sum(shared(x) for shared in oracle_experts(layer.shared))
        return routed + np.where(valid[:, None], shared, 0)

    assert_close(update, ref.over_groups(experts, 1, *numbers(x, info)[:2]))


def test_a_single_expert_at_capacity_one_is_its_feedforward() -> None:
    """The softmax over one choice gives every token the weight 1."""
    layer = make_experts(num_experts=1)
    x = hidden_states(8, 2, TOKENS, DIM)
    update, (routing,) = run(layer, x)
    assert np.all(routing.weight == 1)
    assert_close(update, oracle_experts(layer.experts)[0](f64(x)))


def biased(layer: mode.MixtureOfExperts, bias: list[float]) -> mode.MixtureOfExperts:
    return eqx.tree_at(lambda m: m.router.state.bias, layer, jnp.array(bias))


@pytest.mark.parametrize("select", [mode.ExpertChoice(), mode.TokenChoice(1)])
def test_a_no_op_that_always_wins_leaves_attention_alone(select: mode.AbstractSelector) -> None:
    """With a bias of plus infinity no expert selects a token, and none is dropped."""
    experts = make_experts(num_noop=1, select=select)
    layer = mode.Residual(make_block(biased(experts, [0.0, 0.0, 0.0, INF])))
    x = hidden_states(11, 2, TOKENS, DIM)
    hidden, (routing,) = run(layer, x)
    assert routing.num_filled.tolist() == routing.num_dropped.tolist() == [0, 0]
    block: Any = layer.block
    attended, _ = run(block.attention, block.attention_norm(x))
    assert_close(hidden, x + attended)


@pytest.mark.parametrize("select", [mode.ExpertChoice(), mode.TokenChoice(1)])
def test_a_no_op_that_never_wins_is_as_if_it_were_not_there(select: mode.AbstractSelector) -> None:
    """With a bias of minus infinity the assignment is that of the experts alone, and gradients
    are finite."""
    layer = biased(make_experts(num_noop=1, select=select), [0.0, 0.0, 0.0, -INF])
    x = hidden_states(11, 2, TOKENS, DIM)
    scorer: Any = layer.router.scorer
    plain = eqx.tree_at(
        lambda m: m.router.scorer.weight, make_experts(select=select), scorer.weight[:, :3]
    )
    _, (routing,) = run(layer, x)
    _, (expected,) = run(plain, x)
    np.testing.assert_array_equal(routing.index, expected.index)
    assert routing.num_noop.tolist() == [0, 0]

    @eqx.filter_jit
    @eqx.filter_grad
    def gradient(layer: mode.MixtureOfExperts) -> Array:
        return jnp.sum(jnp.sin(layer(x)[0]))

    for leaf in jax.tree.leaves(eqx.filter(gradient(layer), eqx.is_array)):
        assert np.isfinite(leaf).all()


def count_parameters(tree: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(eqx.filter(tree, eqx.is_inexact_array)))


def test_a_no_op_is_nothing() -> None:
    """No parameters but a row of the router, no FLOPs; a token that chose it keeps its bits, even
    those of -0.0."""
    plain, with_noop = (make_experts(num_noop=n, select=mode.TokenChoice(1)) for n in (0, 2))
    assert count_parameters(plain.experts) == count_parameters(with_noop.experts)
    assert count_parameters(with_noop.router.scorer) == DIM * 5
    shape = jax.ShapeDtypeStruct((2, TOKENS, DIM), jnp.float32)
    costs = [
        mode.count_flops(mode.Residual(layer), shape).parts["mode.GELUFeedForward"]
        for layer in (plain, with_noop)
    ]
    assert costs[0] == costs[1]
    layer = mode.Residual(biased(with_noop, [0.0, 0.0, 0.0, 100.0, 100.0]))
    x = jnp.full((2, TOKENS, DIM), -0.0)
    hidden, (routing,) = layer(x)  # not compiled: XLA drops the addition of 0 that this is about
    assert routing.num_noop.tolist() == [TOKENS, TOKENS]
    assert np.all(np.signbit(hidden))


def test_what_an_expert_makes_of_an_empty_slot_is_not_read() -> None:
    """Not a product with a weight of 0: 0 * NaN is NaN."""

    class Inverse(eqx.Module):
        scale: Array

        def __call__(self, vector: Array) -> Array:
            return self.scale / vector

    layer = make_experts(
        make=lambda key: Inverse(jnp.ones(())), select=mode.TokenChoice(1), capacity_factor=2.0
    )
    update, (routing,) = run(layer, 1 + jnp.abs(hidden_states(16, 2, TOKENS, DIM)))
    assert not np.all(routing.filled)
    assert np.all(np.isfinite(update))
