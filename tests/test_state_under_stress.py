"""Router state survives what steps may bring: few tokens, infinite biases, narrow parameters."""

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest

import mode

from .helpers import assert_close
from .layers import depth, experts, hidden, run, with_bias


KEY = jax.random.key(4)


def updated(layer, x, **rates):
    return mode.update_state(layer, run(layer, x)[1], **rates)


@pytest.mark.parametrize("capacity", [0.25, 0.95])
def test_a_tiny_step_does_not_drown_the_quantile(capacity) -> None:
    """A step of one token is one step: forgotten as fast as any other."""
    layer = depth(KEY, capacity=capacity)
    for _ in range(20):
        layer = updated(layer, hidden())
    tiny = updated(layer, hidden()[:1, :1])
    moved = jnp.abs(tiny.router.state.threshold - layer.router.state.threshold)
    assert (moved <= 0.05 * jnp.abs(run(layer, hidden())[1][0].logits).max()).all()
    for _ in range(20):
        tiny = updated(tiny, hidden())
    _, (routing,) = run(mode.causal(tiny), hidden())
    assert abs(mode.routing_metrics(routing).coverage - capacity) < 0.05


def test_a_share_of_all_lets_every_token_pass() -> None:
    layer = updated(depth(KEY, capacity=1.0), hidden())
    _, (routing,) = run(mode.causal(layer), hidden())
    assert mode.routing_metrics(routing).coverage == 1


@pytest.mark.parametrize("select", [mode.ExpertChoice(), mode.TokenChoice(2)])
@pytest.mark.parametrize("infinite", [jnp.inf, -jnp.inf])
def test_an_infinite_bias_leaves_no_trace(select, infinite) -> None:
    """Biases of invariant 30 are legal; the thresholds outlive them."""
    layer = experts(KEY, num_noop=2, select=select)
    for place in (0, 5):
        biased = with_bias(jnp.zeros(6).at[place].set(infinite), layer)
        for _ in range(2):
            biased = updated(biased, hidden(), bias_rate=0.0)
        healed = updated(with_bias(jnp.zeros(6), biased), hidden())
        assert jnp.isfinite(mode.routers(healed)[0].state.threshold).all()


def test_a_rate_may_be_a_schedule() -> None:
    layer = updated(depth(KEY), hidden())
    _, routings = run(layer, hidden())
    moved = jax.jit(lambda rate: mode.update_state(layer, routings, quantile_rate=rate))(0.5)
    expected = mode.update_state(layer, routings, quantile_rate=0.5)
    assert_close(moved.router.state.threshold, expected.router.state.threshold)


def test_narrow_state_stays_narrow() -> None:
    """A model cast as a whole keeps its structure from step to step, as a scan needs."""
    layer = depth(KEY)
    layer = jax.tree.map(
        lambda leaf: leaf.astype(jnp.bfloat16) if eqx.is_inexact_array(leaf) else leaf, layer
    )
    moved = updated(layer, hidden().astype(jnp.bfloat16))
    assert moved.router.state.threshold.dtype == jnp.bfloat16
    assert jax.tree.structure(moved) == jax.tree.structure(layer)


@pytest.mark.parametrize("limit", [0.01, 0.1, 1.0, None])
def test_a_limit_below_one_slot_still_leaves_one(limit) -> None:
    """`limit` bounds what the rule takes; it is not the experts' capacity factor."""
    layer = updated(experts(KEY), hidden())
    _, (routing,) = run(mode.causal(layer, limit=limit), hidden())
    assert routing.index.shape[-1] >= 1
    one_token = mode.causal(layer)(hidden()[:, :1])[0]
    assert one_token.shape == hidden()[:, :1].shape
