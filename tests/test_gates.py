"""Gates against the oracle, and what gradient they give the router."""

from fractions import Fraction
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mode
from tests import reference as ref
from tests.helpers import (
    assert_close,
    f64,
    hidden_states,
    oracle_block,
    oracle_router,
    packed_info,
    rng,
    run,
)


GATES = {
    "raw": (mode.Raw(), "raw", 1.0),
    "sigmoid": (mode.Sigmoid(), "sigmoid", 1.0),
    "twice sigmoid": (mode.Sigmoid(2.0), "sigmoid", 2.0),
    "tanh": (mode.Tanh(), "tanh", 1.0),
    "softmax": (mode.Softmax(), "softmax", 1.0),
    "selected softmax": (mode.SelectedSoftmax(), "selected_softmax", 1.0),
}
gates = pytest.mark.parametrize("gate", GATES)
DEPTH_GATES = ["raw", "sigmoid", "twice sigmoid", "tanh"]


@gates
@pytest.mark.parametrize("noop", [0, 2])
def test_weights_and_scores_equal_the_oracle(gate, noop):
    """Every slot's weight, and what the selector compares, with a bias that no weight may show."""
    gate, name, scale = GATES[gate]
    router = mode.Router(
        8,
        3,
        num_noop=noop,
        fraction=Fraction(1, 3),
        select=mode.ExpertChoice(),
        gate=gate,
        std=1.0,
        key=jax.random.key(0),
    )
    bias = rng(1).normal(size=3 + noop).astype(np.float32)
    router = eqx.tree_at(lambda r: r.state.bias, router, jnp.asarray(bias))
    x = hidden_states(2, 2, 9, 8)
    info = packed_info((5, 3), (2,), tokens=9)
    routing = run(router, x, info)
    scores = router.scores(routing.logits)
    for group in range(2):
        valid = np.asarray(info.valid[group])
        logits = ref.router_logits(f64(x[group]) * valid[:, None], oracle_router(router))
        expected = ref.selection_scores(logits, name, f64(bias))
        assignment = ref.expert_choice(expected, valid, 3, 3)
        np.testing.assert_array_equal(routing.index[group], assignment.index)
        weight = ref.combine_weights(logits, assignment.index, name, scale)
        assert_close(routing.logits[group], logits)
        assert_close(routing.weight[group], weight)
        assert_close(scores[group], expected)


def test_selected_softmax_sums_to_one_over_the_experts_that_took_a_token():
    """And is finite for a token that nobody took."""
    logits = hidden_states(3, 50, 4)
    selected = jnp.asarray(rng(4).random((50, 4)) < 0.4)
    weight = np.asarray(mode.SelectedSoftmax()(logits, selected))
    taken = np.asarray(selected).any(-1)
    assert 0 < taken.sum() < 50
    assert np.isfinite(weight).all()
    assert_close(np.where(selected, weight, 0).sum(-1)[taken], np.ones(taken.sum()))


@gates
def test_scores_never_saturate(gate):
    """Two tokens differ wherever their logits do, far beyond where a sigmoid is 1."""
    logits = jnp.asarray([[60.0], [61.0], [-200.0], [-201.0], [1e4]])
    logits = jnp.concatenate([logits, jnp.zeros_like(logits)], axis=-1)
    scores = np.asarray(GATES[gate][0].scores(logits))[:, 0]
    if gate in ("softmax", "selected softmax"):
        # A probability that rounds to 1 is the most there is; below it all differ.
        assert scores[2] > scores[3] > -np.inf
        assert (scores <= 0).all()
    else:
        assert list(np.argsort(scores)) == [3, 2, 0, 1, 4]


@pytest.mark.parametrize("gate", ["softmax", "selected softmax"])
def test_an_infinite_bias_makes_no_nan(gate):
    """Plus infinity leaves the others no chance, minus infinity has none itself."""
    gate = GATES[gate][0]
    scores = np.asarray(gate.scores(jnp.asarray([[1.0, 2.0, jnp.inf], [1.0, 2.0, -jnp.inf]])))
    assert scores[0].tolist() == [-np.inf, -np.inf, 0]
    assert_close(scores[1], np.array([*(np.array([1, 2]) - ref.logsumexp([1, 2])), -np.inf]))


@gates
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_the_router_computes_in_float32(gate, dtype):
    """Logits and weights of narrow activations are those of the same numbers in float32."""
    router = mode.Router(
        64,
        2,
        fraction=Fraction(1, 2),
        select=mode.ExpertChoice(),
        gate=GATES[gate][0],
        key=jax.random.key(5),
    )
    x = hidden_states(6, 4, 64).astype(dtype)
    info = mode.TokenInfo.plain((4,))
    routing = run(router, x, info)
    assert routing.logits.dtype == routing.weight.dtype == jnp.float32
    assert_close(routing.logits, ref.router_logits(f64(x), oracle_router(router)))


@pytest.mark.parametrize("gate", DEPTH_GATES)
def test_gradient_of_the_router_by_hand(gate):
    """With L = <g, hidden>: dL/dw = sum over the selected i of <g_i, f_i> gate'(r_i) x_i.

    Nothing comes from skipped tokens, and the choice itself passes none.
    """
    gate, name, scale = GATES[gate]
    block = mode.TransformerBlock(8, 2, key=jax.random.key(7))
    layer = mode.MixtureOfDepths(block, 8, 0.4, gate=gate, key=jax.random.key(8))
    x, g = hidden_states(9, 10, 8), hidden_states(10, 10, 8)

    @eqx.filter_jit
    @eqx.filter_grad
    def gradient(layer):
        return jnp.sum(g * layer(x)[0])

    got = gradient(layer).router.scorer.weight[:, 0]
    logits = ref.router_logits(f64(x), oracle_router(layer.router))
    index = ref.expert_choice(logits, np.ones(10, bool), 1, 4).index
    taken = index[0]
    update = oracle_block(block)(f64(x)[taken], taken, np.ones(4, np.int64))
    up, down = (ref.combine_weights(logits + h, index, name, scale)[0] for h in (1e-6, -1e-6))
    slope = (up - down) / 2e-6
    expected = np.sum(
        (f64(g)[taken] * update).sum(-1, keepdims=True) * slope[:, None] * f64(x)[taken], axis=0
    )
    assert np.abs(expected).max() > 0.1
    assert_close(got, expected, scale=10)


def as_float64(model):
    """Parameters in double precision; router state stays as it is."""
    parameters, rest = eqx.partition(model, mode.trainable(model))
    return eqx.combine(jax.tree.map(lambda p: p.astype(jnp.float64), parameters), rest)


@pytest.mark.parametrize("routed", ["depths", "experts", "tokens"])
def test_gradient_of_a_language_model_loss_by_finite_differences(routed):
    """Every router weight's derivative is the slope of the loss, away from ties."""

    def layer(key):
        block_key, router_key = jax.random.split(key)
        if routed == "depths":
            block = mode.TransformerBlock(8, 2, key=block_key)
            return mode.MixtureOfDepths(block, 8, 0.5, gate=mode.Tanh(), key=router_key)
        select = mode.ExpertChoice() if routed == "experts" else mode.TokenChoice(2)
        experts = mode.MixtureOfExperts(
            lambda key: mode.GELU(8, 8, key=key), 8, 2, num_noop=1, select=select, key=router_key
        )
        return mode.Residual(experts)

    with jax.enable_x64(True):
        make = eqx.filter_jit(partial(mode.Transformer, 11, 8, [layer] * 2, dtype=jnp.float64))
        model = as_float64(make(key=jax.random.key(11)))
        tokens = jnp.asarray(rng(12).integers(0, 11, (2, 9)), jnp.int32)

        def where(model):
            return mode.routers(model)[0].scorer.weight

        @eqx.filter_jit
        def loss(weight):
            logits, routings = eqx.tree_at(where, model, weight)(tokens[:, :-1])
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
            return jnp.mean(losses), routings[0].index

        weight = where(model)
        gradient, index = run(jax.grad(loss, has_aux=True), weight)
        slopes = np.zeros(weight.shape)
        for place in np.ndindex(weight.shape):
            up, up_index = loss(weight.at[place].add(1e-5))
            down, down_index = loss(weight.at[place].add(-1e-5))
            np.testing.assert_array_equal(up_index, index)
            np.testing.assert_array_equal(down_index, index)
            slopes[place] = (up - down) / 2e-5
    assert (np.abs(slopes) > 1e-5).mean() > 0.9
    # The loss, near 2, has 16 digits; its difference over 2e-5 has 11 of them.
    assert_close(np.asarray(gradient), slopes, scale=10)


@pytest.mark.parametrize("select", [mode.ExpertChoice(), mode.TokenChoice(1)])
def test_a_no_op_gets_gradient_by_competition(select):
    """It computes nothing, yet its logit moves the weights of the experts."""
    layer = mode.MixtureOfExperts(
        lambda key: mode.GELU(8, 8, key=key),
        8,
        2,
        num_noop=1,
        select=select,
        key=jax.random.key(13),
    )
    loss = eqx.filter_grad(lambda layer, x: jnp.sum(jnp.sin(layer(x)[0])))
    gradient = run(loss, layer, hidden_states(14, 12, 8))
    assert np.abs(gradient.router.scorer.weight[:, 2]).max() > 1e-4
    assert gradient.router.scorer.weight.shape == (8, 3)


def test_the_selection_bias_and_the_threshold_get_no_gradient():
    """Router state is moved by `update_state` alone."""
    layer = mode.MixtureOfExperts(
        lambda key: mode.GELU(8, 8, key=key),
        8,
        2,
        select=mode.TokenChoice(1),
        key=jax.random.key(15),
    )
    layer = eqx.tree_at(lambda m: m.router.state.bias, layer, jnp.asarray([0.3, -0.2]))
    layer = eqx.tree_at(lambda m: m.router.select, layer, mode.Threshold(mode.ByQuantile()))
    loss = eqx.filter_grad(lambda layer, x: jnp.sum(layer(x)[0]))
    gradient = run(loss, layer, hidden_states(16, 12, 8))
    assert not np.asarray(gradient.router.state.bias).any()
    assert not np.asarray(gradient.router.state.threshold).any()


def test_experts_tell_confident_tokens_apart():
    """Probabilities that round to 1 still compete by their logits, up to a gap of 80."""
    logits = jnp.array([[20.0, 0.0], [30.0, 0.0], [25.0, 0.0], [80.0, 0.0]])
    scores = mode.Softmax().scores(logits)[:, 0]
    assert jnp.argsort(scores).tolist() == [0, 2, 1, 3]
    exact = -np.log1p(np.exp(-np.array([20.0, 30.0, 25.0, 80.0])))
    np.testing.assert_allclose(scores, exact, rtol=1e-5)
