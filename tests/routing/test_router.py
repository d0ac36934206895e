"""The router and every helper that reads its routings, against the oracle.

For every gate and every selector, with a selection bias, no-ops, a predictor, a threshold and
padding: so that no helper can compare logits where it should compare scores.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mode
from tests import reference as ref
from tests.helpers import assert_close, f64, hidden_states, packed_info
from tests.routing.draws import (
    DIM,
    GATES,
    assert_assigned,
    make_router,
    oracle_logits,
    oracle_predictor,
    oracle_selection,
    predictor_logits,
)


SELECTORS: dict[str, mode.AbstractSelector] = {
    "expert choice": mode.ExpertChoice(),
    "token choice 1": mode.TokenChoice(1),
    "token choice 2": mode.TokenChoice(2),
    "strided": mode.Strided(),
    "quantile": mode.QuantileThreshold(),
    "quantile half": mode.QuantileThreshold(0.5),
    "predictor": mode.PredictorThreshold(None),
    "logit": mode.LogitThreshold(0.25),
}
THRESHOLDS: tuple[mode.AbstractThreshold | None, ...] = (
    None,
    mode.QuantileThreshold(),
    mode.PredictorThreshold(0.5),
    mode.LogitThreshold(None),
)
# Experts and no-ops: a router of depths, and one of experts with no-ops.
WIDTHS = [(1, 0), (3, 2)]


def is_allowed(gate: str, select: str, experts: int, noop: int) -> bool:
    """Not two choices of one, nor a pair of selector and gate that leaves no gradient."""
    enough = select != "token choice 2" or experts + noop > 1
    return enough and (gate, select) != ("selected softmax", "token choice 1")


CASES = [
    (gate, select, *width)
    for gate, select, width in itertools.product(GATES, SELECTORS, WIDTHS)
    if is_allowed(gate, select, *width)
]
TOKENS = 11
INFO = packed_info((6, 4), (5,), tokens=TOKENS)
X = hidden_states(1, 2, TOKENS, DIM)

cases = pytest.mark.parametrize(("gate", "select", "experts", "noop"), CASES)


@functools.cache
def build(gate: str, select: str, experts: int, noop: int) -> mode.Router:
    """The router of a case."""
    return make_router(
        5, num_experts=experts, num_noop=noop, select=SELECTORS[select], gate=GATES[gate][0]
    )


@functools.cache
def routed(gate: str, select: str, experts: int, noop: int) -> mode.Routing:
    """Its routing of `X`."""
    return build(gate, select, experts, noop)(X, INFO)


@cases
def test_every_gate_with_every_selector(gate: str, select: str, experts: int, noop: int) -> None:
    """Logits, scores, slots, load, weights and the predictor's logits."""
    router = build(gate, select, experts, noop)
    _, name, scale = GATES[gate]
    routing = routed(gate, select, experts, noop)
    scores = router.scores(routing.logits)
    for group in range(2):
        valid = np.asarray(INFO.valid[group])
        real = jnp.where(INFO.valid[group][:, None], X[group], 0)
        logits, predictor = oracle_logits(router, real), oracle_predictor(router, f64(real))
        assert_close(routing.logits[group], logits)
        assert_close(predictor_logits(routing)[group], predictor)
        assert_close(scores[group], ref.selection_scores(logits, name, f64(router.state.bias)))
        expected = oracle_selection(router, router.select, name, logits, predictor, valid)
        assert_assigned(jax.tree.map(lambda leaf, g=group: leaf[g], routing), expected)
        weight = ref.combine_weights(logits, expected.index, name, scale)
        assert_close(routing.weight[group], weight)
    np.testing.assert_array_equal(routing.valid, INFO.valid)


@cases
def test_causal_selection_is_what_the_causal_selector_selects(
    gate: str, select: str, experts: int, noop: int
) -> None:
    """Of the recorded logits, and so of the first routed layer of the causal model itself."""
    router = build(gate, select, experts, noop)
    routing = routed(gate, select, experts, noop)
    kept = select in ("token choice 1", "token choice 2", "strided")
    for threshold in THRESHOLDS:
        (mask,) = mode.causal_selection(router, (routing,), threshold=threshold)
        causal = mode.make_causal(router, threshold=threshold)
        np.testing.assert_array_equal(mask, causal(X, INFO).selected)
        for group in range(2):
            expected = oracle_selection(
                router,
                router.select if kept else threshold or mode.PredictorThreshold(),
                GATES[gate][1],
                f64(routing.logits[group]),
                f64(predictor_logits(routing)[group]),
                np.asarray(INFO.valid[group]),
            )
            np.testing.assert_array_equal(mask[group], ref.selected_mask(expected.index, TOKENS))
        assert 0 < int(mask.sum()) < mask.size


@pytest.mark.parametrize(("experts", "noop"), WIDTHS)
@pytest.mark.parametrize("gate", GATES)
def test_state_update(gate: str, experts: int, noop: int) -> None:
    """The threshold follows the gate's scores with the bias in them, not the logits."""
    router = build(gate, "expert choice", experts, noop)
    routing = routed(gate, "expert choice", experts, noop)
    moved = mode.update_router_state(router, (routing,))
    bias, valid = f64(router.state.bias), np.asarray(INFO.valid)
    scores = ref.over_groups(
        lambda logits: ref.selection_scores(logits, GATES[gate][1], bias), 1, f64(routing.logits)
    )
    expected = ref.running_quantile(
        f64(router.state.threshold), scores[..., :experts], valid, router.capacity, 0.03, 0
    )
    assert_close(moved.state.threshold, expected)
    assert_close(moved.state.bias, bias)


@cases
def test_losses_and_metrics_of_every_routing(
    gate: str, select: str, experts: int, noop: int
) -> None:
    """They read the logits before the bias, and the selection after it."""
    routing = routed(gate, select, experts, noop)
    logits, predictor = f64(routing.logits), f64(predictor_logits(routing))
    load, valid = np.asarray(routing.load), np.asarray(INFO.valid)
    selected = ref.over_groups(
        lambda index: ref.selected_mask(index, TOKENS), 1, np.asarray(routing.index)
    )
    assert_close(mode.router_z_loss(routing), ref.router_z_loss(logits, valid))
    assert_close(mode.load_balance_loss(routing), ref.load_balance_loss(logits, load, valid))
    assert_close(
        mode.router_bce(routing), ref.selection_bce(logits[..., :experts], selected, valid)
    )
    assert_close(mode.predictor_bce(routing), ref.selection_bce(predictor, selected, valid))
    metrics = mode.routing_metrics(routing)
    assert_close(metrics.coverage, ref.coverage(selected, valid))
    dropped = load[..., :experts].sum() - selected.sum()
    assert_close(metrics.drop_rate, dropped / load.sum())
    accuracy = mode.selection_accuracy(routing, predictor_logits(routing) > 0)
    expected = ref.precision_recall(predictor > 0, selected, valid)
    assert_close((accuracy.precision, accuracy.recall), expected)


@cases
def test_dispatch_and_combine_of_every_routing(
    gate: str, select: str, experts: int, noop: int
) -> None:
    """x plus weight times update, summed over the experts that selected a token."""
    router = build(gate, select, experts, noop)
    _, name, scale = GATES[gate]
    routing = routed(gate, select, experts, noop)
    factor = jnp.arange(1.0, experts + 1)[:, None, None, None]
    hidden = mode.combine(factor * mode.dispatch(X, routing), routing, onto=X)
    for group in range(2):
        index, x = np.asarray(routing.index[group]), f64(X[group])
        logits = oracle_logits(router, jnp.where(INFO.valid[group][:, None], X[group], 0))
        weights = ref.combine_weights(logits, index, name, scale)
        expected = x.copy()
        for expert, slot in np.ndindex(index.shape):
            token = index[expert, slot]
            if token < TOKENS:
                expected[token] += weights[expert, slot] * (expert + 1) * x[token]
        assert_close(hidden[group], expected)


@pytest.mark.parametrize("gate", ["softmax", "selected softmax"])
@pytest.mark.parametrize("select", ["token choice 2", "quantile", "quantile half", "predictor"])
@pytest.mark.parametrize("parts", [[1] * TOKENS, [4, 4, 3]], ids=["single tokens", "chunks"])
def test_parts_of_a_sequence_are_routed_as_the_whole(
    parts: list[int], select: str, gate: str
) -> None:
    """With the slots that earlier parts used, every part gets the slots, loads and weights."""
    router = build(gate, select, 3, 2)
    slots, whole = router.slots(TOKENS), routed(gate, select, 3, 2)
    used = jnp.zeros((2, 3), jnp.int32)
    masks, weights, load = [], [], 0
    for start, width in zip(itertools.accumulate(parts, initial=0), parts, strict=False):
        part = jax.tree.map(lambda leaf, s=start, w=width: leaf[:, s : s + w], INFO)
        routing = router(X[:, start : start + width], part, slots=slots, used=used)
        assert routing.index.shape == (2, 3, min(slots, width))
        used += jnp.sum(routing.filled, axis=-1, dtype=jnp.int32)
        masks.append(routing.selected)
        weights.append(token_weights(routing))
        load += routing.load
    np.testing.assert_array_equal(jnp.concatenate(masks, axis=1), whole.selected)
    assert_close(np.concatenate(weights, axis=1), token_weights(whole))
    np.testing.assert_array_equal(load, whole.load)
    assert (used <= slots).all()


def token_weights(routing: mode.Routing) -> np.ndarray:
    """`[*groups, tokens, experts]`: the weight of each token, 0 where it was not selected."""
    weights = np.zeros(routing.selected.shape, np.float32)
    for *group, expert, slot in np.ndindex(routing.index.shape):
        token = int(routing.index[(*group, expert, slot)])
        if token < routing.num_tokens:
            weights[(*group, token, expert)] = routing.weight[(*group, expert, slot)]
    return weights
