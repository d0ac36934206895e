"""What gates return at the edges: confident tokens, infinite biases, tokens without a slot."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mode
from tests import reference as ref
from tests.helpers import assert_close, f64, hidden_states, rng
from tests.routing.draws import DIM, GATES, make_router, oracle_logits


gates = pytest.mark.parametrize("gate", GATES)
softmax_gates = pytest.mark.parametrize("gate", ["softmax", "selected softmax"])


@gates
@pytest.mark.parametrize("noop", [0, 2])
def test_scores_equal_the_oracle(gate: str, noop: int) -> None:
    """The scores of a gate by itself, over random logits."""
    logits = 3 * hidden_states(0, 2, 20, 3 + noop)
    scores = GATES[gate][0].scores(logits)
    for group in range(2):
        assert_close(scores[group], ref.selection_scores(f64(logits[group]), GATES[gate][1]))


@gates
def test_weights_equal_the_oracle(gate: str) -> None:
    """The weight of every expert that selected a token."""
    logits = 3 * hidden_states(1, 20, 5)
    selected = rng(2).random((20, 3)) < 0.4
    weights = np.asarray(GATES[gate][0](logits, jnp.asarray(selected)))
    assert weights.shape == (20, 3)
    index = np.full((3, 20), 20)
    for expert in range(3):
        tokens = np.flatnonzero(selected[:, expert])
        index[expert, : len(tokens)] = tokens
    expected = ref.combine_weights(f64(logits), index, GATES[gate][1], GATES[gate][2])
    for expert, slot in zip(*np.nonzero(index < 20), strict=True):
        assert_close(weights[index[expert, slot], expert], np.asarray(expected[expert, slot]))


def test_selected_softmax_sums_to_one_over_the_experts_that_selected_a_token() -> None:
    """And is finite for a token without a slot."""
    logits = hidden_states(3, 50, 4)
    selected = jnp.asarray(rng(4).random((50, 4)) < 0.4)
    weight = np.asarray(mode.SelectedSoftmaxGate()(logits, selected))
    any_slot = np.asarray(selected).any(-1)
    assert 0 < any_slot.sum() < 50
    assert np.isfinite(weight).all()
    assert_close(np.where(selected, weight, 0).sum(-1)[any_slot], np.ones(any_slot.sum()))


@gates
def test_scores_never_saturate(gate: str) -> None:
    """Two tokens differ wherever their logits do, far beyond where a sigmoid is 1."""
    logits = jnp.asarray([[60.0], [61.0], [-200.0], [-201.0], [1e4]])
    logits = jnp.concatenate([logits, jnp.zeros_like(logits)], axis=-1)
    scores = np.asarray(GATES[gate][0].scores(logits))[:, 0]
    if gate in ("softmax", "selected softmax"):
        # A probability that rounds to 1 is the most there is; below it all differ.
        assert scores[2] > scores[3] > -np.inf
        assert (scores <= 0).all()
    elif gate == "absolute":
        assert list(np.argsort(scores)) == [0, 1, 2, 3, 4]
    else:
        assert list(np.argsort(scores)) == [3, 2, 0, 1, 4]


@softmax_gates
def test_confident_tokens_differ(gate: str) -> None:
    """Probabilities that round to 1 still rank by their logits, up to a gap of 80."""
    logits = jnp.array([[20.0, 0.0], [30.0, 0.0], [25.0, 0.0], [80.0, 0.0]])
    scores = GATES[gate][0].scores(logits)[:, 0]
    assert jnp.argsort(scores).tolist() == [0, 2, 1, 3]
    exact = -np.log1p(np.exp(-np.array([20.0, 30.0, 25.0, 80.0])))
    np.testing.assert_allclose(scores, exact, rtol=1e-5)


@softmax_gates
def test_an_infinite_bias_makes_no_nan(gate: str) -> None:
    """Plus infinity lowers the others to minus infinity; minus infinity stays there itself."""
    logits = jnp.asarray([[1.0, 2.0, jnp.inf], [1.0, 2.0, -jnp.inf]])
    scores = np.asarray(GATES[gate][0].scores(logits))
    assert scores[0].tolist() == [-np.inf, -np.inf, 0]
    assert_close(scores[1], np.array([*(np.array([1, 2]) - ref.logsumexp([1, 2])), -np.inf]))


@gates
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_the_router_computes_in_float32(gate: str, dtype: jnp.dtype) -> None:
    """Logits and weights of narrow activations are those of the same numbers in float32."""
    router = make_router(5, num_experts=2, gate=GATES[gate][0])
    x = hidden_states(6, 4, DIM).astype(dtype)
    routing = router(x, mode.TokenInfo.plain((4,)))
    assert routing.logits.dtype == routing.weight.dtype == jnp.float32
    assert routing.predictor is not None
    assert routing.predictor.dtype == jnp.float32
    assert_close(routing.logits, oracle_logits(router, x))


def test_straight_through_weights_are_equal_and_their_gradient_is_that_of_a_sigmoid() -> None:
    """Exactly 1 over the number of experts that selected the token, whatever the logits."""
    logits = 30 * hidden_states(5, 40, 4)
    selected = jnp.asarray(rng(6).random((40, 3)) < 0.6)
    gate = mode.StraightThroughGate()
    weights = np.asarray(gate(logits, selected))
    count = np.maximum(np.asarray(selected).sum(-1, keepdims=True), 1)
    np.testing.assert_array_equal(weights, np.broadcast_to((1 / count).astype(np.float32), (40, 3)))
    assert gate.scores(logits) is logits
    cotangent = hidden_states(7, 40, 3)
    small = logits / 30
    (gradient,) = jax.vjp(lambda z: gate(z, selected), small)[1](cotangent)
    soft = ref.sigmoid(f64(small)[:, :3])
    assert_close(gradient[:, :3], f64(cotangent) * soft * (1 - soft))
    assert not np.asarray(gradient[:, 3]).any()  # of the no-op
