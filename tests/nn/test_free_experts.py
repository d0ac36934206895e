"""Copy and constant experts, and a target for the number of real experts per token."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mode
from tests import reference as ref
from tests.helpers import assert_close, hidden_states, packed_info, rng, run
from tests.nn import oracles
from tests.nn.cases import DIM, INFOS, TOKENS, make_experts, numbers
from tests.routing.draws import assert_assigned


infos = pytest.mark.parametrize("info", INFOS.values(), ids=INFOS)


def make_layer(
    num_noop: int = 1, k: int = 2, router_std: float = 1.0, **options: Any
) -> mode.MixtureOfExperts:
    """Three experts, no-ops, a copy and two constants with vectors that are not 0."""
    layer = make_experts(
        num_noop=num_noop,
        num_copy=1,
        num_constant=2,
        select=mode.TokenChoice(k),
        router_std=router_std,
        **options,
    )
    constant = jnp.asarray(rng(9).normal(size=(2, DIM)), jnp.float32)
    return eqx.tree_at(lambda m: m.free.constant, layer, constant)


@infos
@pytest.mark.parametrize("k", [1, 2, 4])
def test_each_choice_adds_what_it_returns(k: int, info: mode.TokenInfo | None) -> None:
    """Times its probability; a no-op adds nothing, and a real expert may have no slot left."""
    layer = make_layer(k=k)
    x = hidden_states(1, 3, TOKENS, DIM)
    update, (routing,) = run(layer, x, info)
    oracle = oracles.of_free_experts(layer, slots=4, k=k)
    expected, (assignment,) = ref.over_groups(oracle, 1, *numbers(x, info))
    assert_assigned(routing, assignment)
    assert_close(update, expected)


def test_they_have_gradients_and_no_slots() -> None:
    layer = make_layer()
    parameters, rest = eqx.partition(layer, mode.is_trainable(layer))

    def loss(parameters: Any) -> Any:
        update, routings = eqx.combine(parameters, rest)(hidden_states(2, 3, TOKENS, DIM))
        assert routings[0].index.shape[-2] == 3
        return jnp.sum(jnp.sin(update))

    gradient = jax.grad(loss)(parameters)
    for leaf in (gradient.free.mix, gradient.free.constant, gradient.router.scorer.weight):
        assert np.all(np.any(np.asarray(leaf).reshape(leaf.shape[0], -1) != 0, axis=1))


def test_they_decode() -> None:
    """A token's free experts depend on itself alone."""

    def make(key: jax.Array) -> mode.Residual:
        def expert(key: jax.Array) -> mode.GELUFeedForward:
            return mode.GELUFeedForward(8, 8, key=key)

        options = {"num_copy": 1, "num_constant": 1, "select": mode.TokenChoice(2)}
        return mode.Residual(mode.MixtureOfExperts(expert, 8, 3, **options, key=key))

    model = mode.make_causal(mode.Transformer(11, 8, [make], key=jax.random.key(0)))
    tokens = jax.random.randint(jax.random.key(1), (2, 9), 0, 11)
    mode.testing.assert_decodes(model, tokens)
    mode.testing.assert_causal(model, tokens)


@pytest.mark.parametrize("target", [0.25, 1.0, 1.75])
@pytest.mark.parametrize("scale", [0.2, 5.0])
def test_the_first_update_reaches_the_number_of_experts_per_token(
    target: float, scale: float
) -> None:
    """Whatever the size of the logits, on the tokens that it saw, padding left out."""
    layer = mode.Residual(
        make_layer(experts_per_token=target, capacity_factor=4.0, router_std=scale)
    )
    x, info = hidden_states(3, 4, 64, DIM), packed_info(*[(40, 20)] * 4, tokens=64)
    _, (before,) = run(layer, x, info)
    layer = mode.update_router_state(layer, (before,), bias_rate=0.0)
    for tokens in (info, mode.TokenInfo.plain((4, 64))):
        _, (routing,) = run(layer, x, tokens)
        near = 0.02 if tokens is info else 0.2
        requested = 2 * (1 - mode.routing_metrics(routing).noop_rate)
        assert requested == pytest.approx(target, abs=near)


@pytest.mark.parametrize("target", [0.0, 2.0])
def test_all_or_none_of_the_experts(target: float) -> None:
    """At the ends of what the choices allow, biases stay finite."""
    layer = mode.Residual(make_layer(experts_per_token=target, capacity_factor=4.0))
    x = hidden_states(3, 4, 64, DIM)
    for _ in range(3):
        _, routings = run(layer, x)
        layer = mode.update_router_state(layer, routings)
    _, (routing,) = run(layer, x)
    assert mode.routing_metrics(routing).compute == pytest.approx(target, abs=0.02)
    assert np.isfinite(mode.routers(layer)[0].state.bias).all()


@pytest.mark.parametrize("target", [0.25, 1.0, 1.75])
def test_the_number_of_experts_per_token_is_steered(target: float) -> None:
    """On inputs that stay, while the experts among each other get balanced."""
    layer = mode.Residual(make_layer(experts_per_token=target, capacity_factor=4.0))
    x = hidden_states(3, 16, 64, DIM)

    @eqx.filter_jit
    def step(layer: mode.Residual) -> tuple[mode.Residual, mode.Routing]:
        _, (routing,) = layer(x)
        return mode.update_router_state(layer, (routing,), bias_rate=0.02), routing

    for _ in range(300):
        layer, _ = step(layer)
    _, routing = step(layer)
    metrics = mode.routing_metrics(routing)
    assert metrics.compute == pytest.approx(target, abs=0.08)
    assert 2 * (1 - metrics.noop_rate) == pytest.approx(target, abs=0.08)
    assert np.ptp(metrics.load[:3]) < 0.08


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({"select": mode.ExpertChoice()}, "must be a `TokenChoice`"),
        ({"gate": mode.SelectedSoftmaxGate()}, "weights over all choices"),
        ({"num_copy": -1}, "`num_copy`"),
        ({"num_constant": -1}, "`num_constant`"),
        ({"experts_per_token": 2.5}, "between 1 and 2"),
        ({"experts_per_token": float("nan")}, "between 1 and 2"),
        ({"experts_per_token": 0.5, "num_copy": 0}, "must be one"),
        ({"experts_per_token": 1.0, "select": mode.ExpertChoice(), "num_copy": 0}, "needs a sel"),
    ],
)
def test_bad_arguments(options: dict[str, Any], rule: str) -> None:
    options = {"num_copy": 1, "select": mode.TokenChoice(2), **options}
    with pytest.raises(ValueError, match=rule):
        make_experts(**options)
