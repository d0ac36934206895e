"""`MixtureOfDepths` and `Residual` against the oracle, with their weights exported to it."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array, Float, PyTree

import mode
from tests import reference as ref
from tests.helpers import (
    assert_close,
    f64,
    hidden_states,
    oracle_block,
    oracle_function,
    oracle_router,
    rng,
    run,
)
from tests.nn.cases import DIM, INFOS, TOKENS, make_block, numbers
from tests.routing.draws import GATES, assert_assigned


infos = pytest.mark.parametrize("info", INFOS.values(), ids=INFOS)


def make_layer(block: Any, capacity: float = 0.5, **options: Any) -> mode.MixtureOfDepths:
    return mode.MixtureOfDepths(block, DIM, capacity, key=jax.random.key(3), **options)


@infos
def test_a_dense_layer(info: mode.TokenInfo | None) -> None:
    """x + block(x) on real tokens; padding passes by unchanged."""
    block = make_block()
    x = hidden_states(0, 3, TOKENS, DIM)
    hidden, routings = run(mode.Residual(block), x, info)
    assert routings == ()

    def dense(x: Any, valid: Any, positions: Any, segments: Any) -> ref.Floats:
        update = oracle_block(block)(x, positions, segments)
        return x + np.where(valid[:, None], update, 0)

    assert_close(hidden, ref.over_groups(dense, 1, *numbers(x, info)))


@infos
@pytest.mark.parametrize("gate", ["absolute", "identity", "sigmoid", "twice sigmoid", "tanh"])
def test_equation_one(gate: str, info: mode.TokenInfo | None) -> None:
    """With every gate; original positions and segments; padding left out; empty slots no keys."""
    gate_of_layer, name, scale = GATES[gate]
    block = make_block()
    layer = make_layer(block, gate=gate_of_layer)
    x = hidden_states(1, 3, TOKENS, DIM)
    hidden, (routing,) = run(layer, x, info)

    def depths(x: Any, valid: Any, positions: Any, segments: Any) -> Any:
        router = oracle_router(layer.router)[0]
        return ref.mixture_of_depths(
            x, router, oracle_block(block), 0.5, name, valid, positions, segments, scale=scale
        )

    expected, assignment = ref.over_groups(depths, 1, *numbers(x, info))
    assert_assigned(routing, assignment)
    assert_close(hidden, expected)


@pytest.mark.parametrize("capacity", [0.01, 0.3, 1.0])
def test_one_sequence_at_any_capacity(capacity: float) -> None:
    """From a single token to all of them; a bare [tokens, dim] is one group."""
    block = make_block()
    layer = make_layer(block, capacity)
    x = hidden_states(2, 11, DIM)
    hidden, (routing,) = run(layer, x)
    router = oracle_router(layer.router)[0]
    expected, assignment = ref.mixture_of_depths(f64(x), router, oracle_block(block), capacity)
    assert_assigned(routing, assignment)
    assert_close(hidden, expected)


@pytest.mark.parametrize("rule", ["strided", "threshold"])
def test_another_selector(rule: str) -> None:
    """The layer does not care who chose."""
    block = make_block()
    info = INFOS["packed"]
    x = hidden_states(4, 3, TOKENS, DIM)
    select: mode.AbstractSelector
    if rule == "strided":
        select, slots = mode.Strided(), 4
    else:
        select, slots = mode.LogitThreshold(0.25), 3

    def choose(scores: ref.Floats, valid: ref.Bools) -> ref.Assignment:
        if rule == "strided":
            return ref.strided(valid, 1, slots)
        return ref.threshold(scores, valid, slots)

    layer = make_layer(block, 1 / 3, select=select, gate=mode.IdentityGate())
    hidden, (routing,) = run(layer, x, info)
    assert routing.index.shape == (3, 1, slots)

    def depths(x: Any, valid: Any, positions: Any, segments: Any) -> Any:
        return ref.mixture_of_depths(
            x,
            oracle_router(layer.router)[0],
            oracle_block(block),
            1 / 3,
            "raw",
            valid,
            positions,
            segments,
            select=choose,
        )

    expected, assignment = ref.over_groups(depths, 1, *numbers(x, info))
    assert_assigned(routing, assignment)
    assert_close(hidden, expected)


def test_at_full_capacity_and_weight_one_it_is_the_dense_layer() -> None:
    """x + f(x), gradients included."""
    block = make_block()
    x = hidden_states(3, 2, TOKENS, DIM).at[..., 0].set(1.0)
    first = jnp.zeros((DIM, 1)).at[0].set(1.0)
    layer = eqx.tree_at(lambda m: m.router.scorer.weight, make_layer(block, 1.0), first)

    @eqx.filter_jit
    @eqx.filter_value_and_grad
    def loss(model: Any, x: Float[Array, "batch tokens dim"]) -> Array:
        return jnp.sum(jnp.sin(model(x)[0]))

    value, gradient = loss(layer, x)
    expected, dense_gradient = loss(mode.Residual(block), x)
    assert_close(value, expected, scale=10)
    assert_close(jax.tree.leaves(gradient.block), jax.tree.leaves(dense_gradient), scale=10)


def test_the_gradient_reaches_the_router_through_selected_tokens_alone() -> None:
    """And is that of finite differences."""
    layer = make_layer(make_block())
    with jax.enable_x64(True):
        x = jnp.asarray(rng(5).normal(size=(TOKENS, DIM)), jnp.float64)
        wide = jax.tree.map(
            lambda leaf: leaf.astype(jnp.float64) if eqx.is_inexact_array(leaf) else leaf, layer
        )
        selected = wide(x)[1][0].selected

        @jax.jit
        def loss(weight: Array, mask: Array) -> Array:
            routed = eqx.tree_at(lambda m: m.router.scorer.weight, wide, weight)
            return jnp.sum(jnp.where(mask, jnp.sin(routed(x)[0]), 0))

        weight = wide.router.scorer.weight
        gradient = jax.jit(jax.grad(loss))
        assert not np.any(gradient(weight, ~selected))
        towards = jnp.cos(jnp.arange(DIM, dtype=jnp.float64))[:, None]
        exact = jnp.sum(gradient(weight, selected) * towards)
        ahead, behind = (loss(weight + step * towards, selected) for step in (1e-6, -1e-6))
        np.testing.assert_allclose((ahead - behind) / 2e-6, exact, rtol=1e-6)


def test_a_module_with_a_skip_connection_of_its_own() -> None:
    """f(X) = M(X) - X: no residual is counted twice, and the weight scales none."""
    weight = hidden_states(13, DIM, DIM) / 4

    def module(x: Float[Array, "tokens dim"]) -> Float[Array, "tokens dim"]:
        return x + jnp.tanh(jnp.cumsum(x, axis=0) @ weight)

    layer = make_layer(mode.Delta(module))
    x = hidden_states(14, 3, TOKENS, DIM)
    hidden, _ = run(layer, x)

    def depths(x: ref.Floats) -> ref.Floats:
        def update(x: ref.Floats, positions: ref.Ints, segments: ref.Ints) -> ref.Floats:
            return np.tanh(np.cumsum(x, axis=0) @ f64(weight))

        router = oracle_router(layer.router)[0]
        return ref.mixture_of_depths(x, router, update, 0.5, weigh_values=False)[0]

    assert_close(hidden, ref.over_groups(depths, 1, f64(x)))


@pytest.mark.parametrize("make", [mode.GELUFeedForward, mode.SwiGLUFeedForward])
def test_a_function_of_one_token(make: Any) -> None:
    """`PositionWise` applies it to every token."""
    function = make(DIM, 24, key=jax.random.key(6))
    x = hidden_states(15, 2, TOKENS, DIM)
    hidden, routings = run(mode.Residual(mode.PositionWise(function)), x)
    assert routings == ()
    assert_close(hidden, f64(x) + oracle_function(function)(f64(x)))


def test_compiled_flops_scale_with_the_capacity() -> None:
    """Tokens are gathered, not masked: linear maps cost the capacity, scores its square."""
    dim, tokens, key = 64, 256, jax.random.key(0)

    def compiled(layer: PyTree, tokens: int = tokens) -> float:
        x = jax.ShapeDtypeStruct((2, tokens, dim), jnp.float32)
        cost: Any = jax.jit(lambda x: layer(x)[0]).lower(x).compile().cost_analysis()
        return cost["flops"]

    feedforward = mode.PositionWise(mode.GELUFeedForward(dim, key=key))
    attention = mode.Attention(dim, 4, key=key)
    routed = compiled(mode.MixtureOfDepths(feedforward, dim, 0.25, key=key))
    assert routed == pytest.approx(compiled(mode.Residual(feedforward)) / 4, rel=0.05)
    routed = compiled(mode.MixtureOfDepths(attention, dim, 0.25, key=key))
    assert routed == pytest.approx(compiled(mode.Residual(attention), tokens // 4), rel=0.05)
    # Without what is linear, four projections of two sequences, the square of the capacity is left.
    projections = 2 * tokens * 8 * dim * dim
    scores = compiled(mode.Residual(attention)) - projections
    assert (routed - projections / 4) / scores < 0.25 / 2
