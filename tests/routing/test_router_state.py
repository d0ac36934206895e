"""Router state: `update_router_state` moves it as the oracle does, and nothing else moves it."""

import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array

import mode
from tests import reference as ref
from tests.helpers import assert_close, f64, hidden_states, padded_info, run
from tests.routing.draws import DIM, GATES, draw_routing, make_router, scorer_weight


def fresh(**options: Any) -> mode.Router:
    """A router whose state was never updated."""
    router = make_router(1, **options)
    state = mode.RouterState.initial(router.num_experts, router.num_experts + router.num_noop)
    return eqx.tree_at(lambda r: r.state, router, state)


ROUTERS = {
    "depths": (fresh(num_experts=1, capacity=0.25), "identity"),
    "depths sigmoid": (fresh(num_experts=1, capacity=0.5, gate=mode.SigmoidGate()), "sigmoid"),
    "depths full": (fresh(num_experts=1, capacity=1.0), "identity"),
    "expert choice": (fresh(num_noop=1, gate=mode.SoftmaxGate()), "softmax"),
    "token choice": (
        fresh(num_noop=1, select=mode.TokenChoice(2), gate=mode.SoftmaxGate(), capacity=0.5),
        "softmax",
    ),
}


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("rates", [{}, {"quantile_rate": 0.3, "bias_rate": 0.1}])
def test_several_updates_follow_the_oracle(name: str, rates: dict[str, float]) -> None:
    """Threshold and bias after every one of five steps; a step of padding alone moves nothing."""
    router, gate = ROUTERS[name]
    experts, choices = router.num_experts, router.state.bias.shape[0]
    threshold, bias, updates = np.zeros(experts), np.zeros(choices), 0

    @eqx.filter_jit
    def step(
        router: mode.Router, x: Array, info: mode.TokenInfo
    ) -> tuple[mode.Router, mode.Routing]:
        routing = router(x, info)
        return mode.update_router_state(router, (routing,), **rates), routing

    for number in range(5):
        lengths = (0, 0) if number == 2 else (12, 9 - number)
        info = padded_info(*lengths, tokens=12)
        router, routing = step(router, hidden_states(number, 2, 12, DIM), info)
        logits, valid = f64(routing.logits), np.asarray(info.valid)
        scores = ref.over_groups(
            lambda z, b=bias: ref.selection_scores(z, GATES[gate][1], b), 1, logits
        )
        threshold = ref.running_quantile(
            threshold,
            scores[..., :experts],
            valid,
            router.capacity,
            rates.get("quantile_rate", 0.03),
            updates,
        )
        if name == "token choice":
            rate = rates.get("bias_rate", 0.001)
            bias = ref.balancing_bias(bias, np.asarray(routing.load), rate)
        updates += int(valid.any())
        assert_close(router.state.threshold, threshold)
        assert_close(router.state.bias, bias)
        assert router.state.updates == updates
    assert name != "token choice" or np.abs(bias).max() > 0


@pytest.mark.parametrize("gate", GATES)
def test_the_first_quantile_selects_exactly_the_tokens_of_top_k(gate: str) -> None:
    """One update sets the threshold between the k-th and the next score of the batch."""
    router = fresh(capacity=0.25, gate=GATES[gate][0], predictor=None)
    x, info = hidden_states(10, 16, DIM), mode.TokenInfo.plain((16,))
    routing = router(x, info)
    moved = mode.make_causal(mode.update_router_state(router, (routing,)))
    np.testing.assert_array_equal(moved(x, info).selected, routing.selected)
    assert int(routing.num_filled) == 12


def test_the_bias_evens_out_the_loads_of_token_choice() -> None:
    """From a router that sends nearly all tokens to one expert to one that uses all choices."""
    router = fresh(
        num_noop=1, capacity=1 / 3, select=mode.TokenChoice(1), gate=mode.SoftmaxGate(), std=0.35
    )
    router = eqx.tree_at(scorer_weight, router, scorer_weight(router).at[0, 0].add(2.0))
    x, info = hidden_states(11, 4, 32, DIM).at[..., 0].set(1.0), mode.TokenInfo.plain((4, 32))

    @eqx.filter_jit
    def step(router: mode.Router) -> tuple[mode.Router, Array]:
        routing = router(x, info)
        return mode.update_router_state(router, (routing,), bias_rate=0.05), routing.load

    _, before = step(router)
    after = before
    for _ in range(60):
        router, after = step(router)
    frequencies = [np.asarray(load.sum(0)) / 128 for load in (before, after)]
    assert frequencies[0].max() > 0.6
    assert frequencies[1].max() < 0.35


def stacked(layers: int, **options: Any) -> tuple[mode.Router, mode.Routing, Array]:
    """Routers as a scan stacks them, with one routing of all."""
    routers = [make_router(seed, **options) for seed in range(layers)]
    router = jax.tree.map(lambda *leaves: jnp.stack(leaves), *routers)
    x, info = hidden_states(12, 2, 10, DIM), padded_info(10, 6, tokens=10)
    routing = eqx.filter_vmap(lambda router: router(x, info))(router)
    return router, routing, info.valid


@pytest.mark.parametrize("gate", ["identity", "softmax"])
def test_every_layer_of_a_scan_has_a_state_of_its_own(gate: str) -> None:
    """Thresholds and causal selections of stacked routers follow the oracle layer by layer."""
    router, routing, valid = stacked(3, gate=GATES[gate][0], predictor=None)
    moved = run(mode.update_router_state, router, (routing,))
    (mask,) = run(mode.causal_selection, router, (routing,))
    assert moved.state.updates.tolist() == [1] * 3
    for layer in range(3):
        bias, threshold = f64(router.state.bias[layer]), f64(router.state.threshold[layer])
        scores = ref.over_groups(
            lambda z, b=bias: ref.selection_scores(z, GATES[gate][1], b),
            1,
            f64(routing.logits[layer]),
        )
        expected = ref.running_quantile(
            threshold, scores, np.asarray(valid), router.capacity, 0.03, 0
        )
        assert_close(moved.state.threshold[layer], expected)
        expected_mask = (scores > threshold) & np.asarray(valid)[..., None]
        np.testing.assert_array_equal(mask[layer], expected_mask)


@eqx.filter_jit
def step(router: mode.Router, x: Array, rates: dict[str, float]) -> mode.Router:
    """The router after one step on the hidden states."""
    routing = router(x, mode.TokenInfo.plain(x.shape[:-1]))
    return mode.update_router_state(router, (routing,), **rates)


def steps(router: mode.Router, x: Array, count: int, **rates: float) -> mode.Router:
    """The router after some steps on the same hidden states."""
    for _ in range(count):
        router = step(router, x, rates)
    return router


@pytest.mark.parametrize("capacity", [0.25, 0.95])
def test_a_tiny_step_does_not_drown_the_quantile(capacity: float) -> None:
    """A step of the fewest tokens is one step: forgotten as fast as any other."""
    x, info = hidden_states(30, 8, 32, DIM), mode.TokenInfo.plain((8, 32))
    router = steps(fresh(num_experts=1, predictor=None, capacity=capacity), x, 20)
    tiny = steps(router, x[:1, : math.ceil(1 / capacity)], 1)
    moved = jnp.abs(tiny.state.threshold - router.state.threshold)
    assert (moved <= 0.05 * jnp.abs(router(x, info).logits).max()).all()
    routing = mode.make_causal(steps(tiny, x, 20))(x, info)
    assert abs(mode.routing_metrics(routing).coverage - capacity) < 0.05


def test_a_capacity_of_one_lets_every_token_pass() -> None:
    """The threshold is the lowest float."""
    x = hidden_states(31, 2, 32, DIM)
    router = steps(fresh(num_experts=1, predictor=None, capacity=1.0), x, 1)
    routing = mode.make_causal(router)(x, mode.TokenInfo.plain((2, 32)))
    assert mode.routing_metrics(routing).coverage == 1


@pytest.mark.parametrize("select", [mode.ExpertChoice(), mode.TokenChoice(2)])
@pytest.mark.parametrize("infinite", [jnp.inf, -jnp.inf])
def test_an_infinite_bias_leaves_no_trace(select: mode.AbstractSelector, infinite: float) -> None:
    """An infinite bias is allowed; the thresholds stay finite."""
    router = fresh(num_noop=2, select=select, gate=mode.SoftmaxGate())
    x = hidden_states(32, 2, 16, DIM)
    for choice in (0, 4):
        bias = jnp.zeros(5).at[choice].set(infinite)
        biased = steps(eqx.tree_at(lambda r: r.state.bias, router, bias), x, 2, bias_rate=0.0)
        healed = steps(eqx.tree_at(lambda r: r.state.bias, biased, jnp.zeros(5)), x, 1)
        assert jnp.isfinite(healed.state.threshold).all()


def test_a_rate_may_be_a_schedule() -> None:
    """A traced rate gives what the same number gives."""
    router = make_router(33)
    routing = router(hidden_states(34, 8, DIM), mode.TokenInfo.plain((8,)))
    router = mode.update_router_state(router, (routing,))

    def update(rate: Array | float) -> Array:
        return mode.update_router_state(router, (routing,), quantile_rate=rate).state.threshold

    assert_close(jax.jit(update)(jnp.asarray(0.7)), update(0.7))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_state_below_float32_is_refused(dtype: Any) -> None:
    """A mean that moves by 0.03 of what is missing sticks at 1.0 where 0.95 was meant."""
    router = make_router(35)
    cast = jax.tree.map(
        lambda leaf: leaf.astype(dtype) if eqx.is_inexact_array(leaf) else leaf, router
    )
    x = hidden_states(36, 8, DIM).astype(dtype)
    with pytest.raises(ValueError, match=r"router state must be float32, got .*float16"):
        steps(cast, x, 1)
    trains = mode.is_trainable(router)
    cast = jax.tree.map(
        lambda leaf, is_parameter: leaf.astype(dtype) if is_parameter else leaf, router, trains
    )
    assert steps(cast, x, 1).state.threshold.dtype == jnp.float32


@pytest.mark.parametrize(
    ("tokens", "capacity"), [(1, 0.125), (2, 0.125), (4, 0.125), (7, 0.125), (1, 0.5), (15, 1 / 16)]
)
def test_a_step_of_too_few_tokens_is_refused(tokens: int, capacity: float) -> None:
    """Of fewer than 1 / capacity tokens the best is far from the quantile, at any number of steps.

    Other inputs of the kind: padding (below), groups, layers that are scanned over (a step counts
    the tokens of one layer), `TokenChoice`, which needs no threshold.
    """
    router, x = fresh(num_experts=1, predictor=None, capacity=capacity), hidden_states(30, 20, DIM)
    with pytest.raises(ValueError, match="`routings` must be of at least"):
        steps(router, x[:tokens], 1)
    chooses = fresh(num_noop=1, select=mode.TokenChoice(1), gate=mode.SoftmaxGate())
    assert steps(chooses, x[:1], 1).state.updates.tolist() == 0


@pytest.mark.parametrize(("tokens", "capacity"), [(8, 0.125), (10, 0.125), (4, 0.25), (20, 0.0625)])
def test_the_quantile_of_few_tokens_is_right(tokens: int, capacity: float) -> None:
    """After 400 steps of so few, the part of new scores above the threshold is the capacity."""
    router = fresh(num_experts=1, predictor=None, capacity=capacity)
    x = jax.random.normal(jax.random.key(1), (400, tokens, DIM))
    last, _ = jax.lax.scan(lambda r, rows: (step(r, rows, {}), None), router, x)
    assert last.state.updates == 400
    scores = last(jax.random.normal(jax.random.key(2), (4096, DIM)), mode.TokenInfo.plain((4096,)))
    above = jnp.mean(scores.logits > last.state.threshold[0])
    assert abs(above - capacity) < 0.06  # it was 0.25 to 0.54 of too few


def test_steps_of_too_few_real_tokens_change_nothing() -> None:
    """Seven real tokens of twelve, at a capacity of an eighth."""
    router = steps(
        fresh(num_experts=1, predictor=None, capacity=0.125), hidden_states(3, 12, DIM), 1
    )
    for real, moves in ((7, False), (8, True)):
        routing = router(hidden_states(4, 1, 12, DIM), padded_info(real, tokens=12))
        moved = mode.update_router_state(router, (routing,)).state
        assert bool(moved.threshold != router.state.threshold) == moves
        assert moved.updates - router.state.updates == int(moves)


def test_state_counts_no_padding() -> None:
    """Poisoned padding leaves the thresholds as they are without it."""
    router, routing = make_router(37, num_noop=1), draw_routing(38, 3, noop=1)
    noise = jnp.where(routing.valid[..., None], 0, 100.0)
    poisoned = eqx.tree_at(lambda r: r.logits, routing, routing.logits + noise)
    clean, other = (
        mode.update_router_state(router, (r,)).state.threshold for r in (routing, poisoned)
    )
    np.testing.assert_array_equal(clean, other)
