"""The gradient of a router: through the weights of the selected tokens, and nowhere else."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array

import mode
from tests import reference as ref
from tests.helpers import assert_close, f64, hidden_states, run
from tests.routing.draws import DIM, GATES, make_router, oracle_logits, scorer_weight


def update(x: Array) -> Array:
    """What stands for the experts: a function of `[..., slots, dim]` that mixes tokens."""
    return jnp.sin(2 * x) + 0.5 * jnp.cumsum(x, axis=-2)


def layer(router: mode.Router, x: Array, info: mode.TokenInfo | None = None) -> Array:
    """x plus the weighted updates of the tokens that the router selects."""
    routing = router(x, mode.TokenInfo.plain(x.shape[:-1]) if info is None else info)
    return mode.combine(update(mode.dispatch(x, routing)), routing, onto=x)


@pytest.mark.parametrize("gate", ["identity", "sigmoid", "twice sigmoid", "tanh"])
def test_gradient_of_a_router_by_hand(gate: str) -> None:
    """With L = <g, hidden>: dL/dw = sum over the selected i of <g_i, f_i> gate'(r_i) x_i.

    Skipped tokens add nothing, and the selection itself passes no gradient.
    """
    strategy, name, scale = GATES[gate]
    router = make_router(8, num_experts=1, gate=strategy, capacity=0.4)
    x, g = hidden_states(9, 10, DIM), hidden_states(10, 10, DIM)
    gradient = run(eqx.filter_grad(lambda router: jnp.sum(g * layer(router, x))), router)
    logits = oracle_logits(router, x)
    index = ref.expert_choice(logits + f64(router.state.bias), np.ones(10, bool), 1, 4).index
    chosen = index[0]
    updates = f64(update(x[chosen]))
    up, down = (ref.combine_weights(logits + h, index, name, scale)[0] for h in (1e-6, -1e-6))
    slope = (up - down) / 2e-6
    expected = np.sum(
        (f64(g)[chosen] * updates).sum(-1, keepdims=True) * slope[:, None] * f64(x)[chosen], axis=0
    )
    assert np.abs(expected).max() > 0.1
    assert_close(gradient.scorer.weight[:, 0], expected, scale=10)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize(
    "select", [mode.ExpertChoice(), mode.TokenChoice(2), mode.QuantileThreshold()], ids=str
)
def test_gradient_by_finite_differences(select: mode.AbstractSelector, gate: str) -> None:
    """Every weight's derivative is the slope of the loss of two routers, away from ties."""
    with jax.enable_x64(True):
        options = {"num_noop": 1, "capacity": 2 / 3, "select": select, "gate": GATES[gate][0]}
        # Low enough for tokens with several experts: a single one has a softmax of 1.
        routers = [
            eqx.tree_at(
                lambda r: r.state.threshold,
                make_router(seed, num_experts=2, std=0.3, **options),
                jnp.full(2, -1.5, jnp.float32),
            )
            for seed in (11, 12)
        ]
        x = jnp.asarray(hidden_states(13, 2, 9, DIM), jnp.float64)
        parameters, rest = eqx.partition(routers, mode.is_trainable(routers))
        parameters = jax.tree.map(lambda p: p.astype(jnp.float64), parameters)

        def where(parameters: list[mode.Router]) -> Array:
            return scorer_weight(parameters[0])

        @eqx.filter_jit
        def loss(weight: Array) -> tuple[Array, list[Array]]:
            hidden, indices = x, []
            for router in eqx.combine(eqx.tree_at(where, parameters, weight), rest):
                indices.append(router(hidden, mode.TokenInfo.plain((2, 9))).index)
                hidden = layer(router, hidden)
            return jnp.mean(jnp.sin(hidden / 4)), indices

        weight = where(parameters)
        gradient, indices = jax.grad(loss, has_aux=True)(weight)
        slopes = np.zeros(weight.shape)
        for entry in np.ndindex(weight.shape):
            up, up_indices = loss(weight.at[entry].add(1e-5))
            down, down_indices = loss(weight.at[entry].add(-1e-5))
            assert eqx.tree_equal(up_indices, indices, down_indices)
            slopes[entry] = (up - down) / 2e-5
    assert np.abs(slopes).max() > 1e-4
    # The loss, near 1, has 16 digits; its difference over 2e-5 has 11 of them.
    assert_close(np.asarray(gradient), slopes, scale=10)


@pytest.mark.parametrize("select", [mode.ExpertChoice(), mode.TokenChoice(1)], ids=str)
def test_a_no_op_gets_gradient_by_competition(select: mode.AbstractSelector) -> None:
    """It computes nothing, yet its logit moves the weights of the experts."""
    router = make_router(
        13, num_experts=2, num_noop=1, capacity=1.0, select=select, gate=mode.SoftmaxGate()
    )
    x = hidden_states(14, 12, DIM)
    gradient = run(eqx.filter_grad(lambda router: jnp.sum(jnp.sin(layer(router, x)))), router)
    assert np.abs(gradient.scorer.weight[:, 2]).max() > 1e-4


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize(
    "select",
    [
        mode.ExpertChoice(),
        mode.TokenChoice(2),
        mode.QuantileThreshold(),
        mode.PredictorThreshold(),
        mode.LogitThreshold(),
    ],
    ids=str,
)
def test_state_and_predictor_get_no_gradient(select: mode.AbstractSelector, gate: str) -> None:
    """The bias and the threshold move by `update_router_state`, the predictor by its own loss."""
    router = make_router(15, capacity=1.0, select=select, gate=GATES[gate][0])
    # Low enough for tokens with several experts: a single one has a softmax of 1.
    router = eqx.tree_at(lambda r: r.state.threshold, router, jnp.full(3, -3.0))
    x = hidden_states(16, 12, DIM)
    gradient = run(eqx.filter_grad(lambda router: jnp.sum(jnp.sin(layer(router, x)))), router)
    for leaf in jax.tree.leaves((gradient.state, gradient.predictor)):
        assert not np.asarray(leaf).any()
    assert np.asarray(gradient.scorer.weight).any()


@pytest.mark.parametrize(
    ("loss", "reached"),
    [
        (mode.router_bce, {"scorer", "x"}),
        (mode.router_z_loss, {"scorer", "x"}),
        (mode.router_l1_loss, {"scorer", "x"}),
        (mode.load_balance_loss, {"scorer", "x"}),
        (mode.predictor_bce, {"predictor"}),
    ],
)
def test_where_the_gradient_of_a_loss_ends(
    loss: Callable[[mode.Routing], Array], reached: set[str]
) -> None:
    """The router's losses move router and hidden states; the predictor's moves the predictor."""
    router = make_router(17, gate=mode.SoftmaxGate())
    info = mode.TokenInfo.plain((2, 16))

    def objective(both: tuple[mode.Router, Array]) -> Array:
        router, x = both
        return loss(router(x, info))

    gradient, x = run(eqx.filter_grad(objective), (router, hidden_states(18, 2, 16, DIM)))
    parts = {"scorer": gradient.scorer, "predictor": gradient.predictor, "x": x}
    moved = {
        name
        for name, part in parts.items()
        if any(np.asarray(leaf).any() for leaf in jax.tree.leaves(part))
    }
    assert moved == reached
