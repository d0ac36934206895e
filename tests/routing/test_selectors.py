"""Every selector against the oracle, and the counts of a routing."""

from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mode
from tests import reference as ref
from tests.helpers import f64, hidden_states, run
from tests.routing.draws import (
    DIM,
    assert_assigned,
    draw_scores,
    draw_valid,
    make_router,
    oracle_assignment,
    pad_load,
    selector_inputs,
)


# groups, tokens, experts, no-ops, slots
CASES = [
    ((), 1, 1, 0, 1),
    ((), 7, 1, 0, 7),
    ((5,), 16, 1, 0, 2),
    ((5,), 16, 3, 2, 5),
    ((2, 3), 13, 4, 1, 13),
    ((33,), 9, 2, 1, 3),
]
cases = pytest.mark.parametrize(("groups", "tokens", "experts", "noop", "slots"), CASES)


@cases
@pytest.mark.parametrize("kind", ["distinct", "tied", "barred"])
def test_expert_choice(
    kind: str, groups: tuple[int, ...], tokens: int, experts: int, noop: int, slots: int
) -> None:
    """Top tokens per expert; ties, padding and minus infinity as in the oracle."""
    scores = draw_scores(kind, 10, (*groups, tokens, experts + noop))
    valid = draw_valid(11, groups, tokens)
    got = run(mode.ExpertChoice(), selector_inputs(scores, valid, experts, slots))
    choose = partial(ref.expert_choice, num_experts=experts, slots=slots)
    assert_assigned(got, ref.over_groups(choose, len(groups), scores, valid))


@cases
@pytest.mark.parametrize("kind", ["distinct", "tied"])
@pytest.mark.parametrize("k", [1, 2, 99])
def test_token_choice(
    k: int, kind: str, groups: tuple[int, ...], tokens: int, experts: int, noop: int, slots: int
) -> None:
    """Best choices per token, served in time order, dropped where no slot is left."""
    k = min(k, experts + noop)
    scores = draw_scores(kind, 20, (*groups, tokens, experts + noop))
    valid = draw_valid(21, groups, tokens)
    got = run(mode.TokenChoice(k), selector_inputs(scores, valid, experts, slots))
    choose = partial(ref.token_choice, num_experts=experts, slots=slots, k=k)
    assert_assigned(got, ref.over_groups(choose, len(groups), scores, valid))


@cases
def test_strided(groups: tuple[int, ...], tokens: int, experts: int, noop: int, slots: int) -> None:
    """Evenly spaced real tokens, whatever the scores."""
    scores = draw_scores("distinct", 30, (*groups, tokens, experts + noop))
    valid = draw_valid(31, groups, tokens)
    got = run(mode.Strided(), selector_inputs(scores, valid, experts, slots))
    expected = ref.over_groups(lambda v: ref.strided(v, experts, slots), len(groups), valid)
    assert_assigned(got, pad_load(expected, noop))


@cases
@pytest.mark.parametrize(
    "select", [mode.PredictorThreshold(), mode.LogitThreshold(), mode.QuantileThreshold()]
)
def test_threshold(
    select: mode.AbstractThreshold,
    groups: tuple[int, ...],
    tokens: int,
    experts: int,
    noop: int,
    slots: int,
) -> None:
    """Each rule selects the tokens with a positive margin, first come first served."""
    scores = draw_scores("tied", 40, (*groups, tokens, experts + noop))
    logits = draw_scores("tied", 41, scores.shape)
    predictor = draw_scores("tied", 42, (*groups, tokens, experts))
    threshold = draw_scores("tied", 43, (experts,))
    valid = draw_valid(44, groups, tokens)
    inputs = selector_inputs(
        scores,
        valid,
        experts,
        slots,
        logits=jnp.asarray(logits),
        predictor=jnp.asarray(predictor),
        threshold=jnp.asarray(threshold),
    )

    def choose(
        scores: ref.Floats, logits: ref.Floats, predictor: ref.Floats, valid: ref.Bools
    ) -> ref.Assignment:
        return oracle_assignment(select, scores, logits, predictor, f64(threshold), valid, slots)

    expected = ref.over_groups(choose, len(groups), scores, logits, predictor, valid)
    assert_assigned(run(select, inputs), expected)


@cases
def test_random_choice_fills_exactly_its_slots(
    groups: tuple[int, ...], tokens: int, experts: int, noop: int, slots: int
) -> None:
    """min(slots, real tokens) distinct real tokens per expert, in time order."""
    scores = draw_scores("distinct", 50, (*groups, tokens, experts + noop))
    valid = draw_valid(51, groups, tokens)
    inputs = selector_inputs(scores, valid, experts, slots)
    got = run(mode.RandomChoice(), inputs, key=jax.random.key(0))
    index = np.asarray(got.index)
    np.testing.assert_array_equal(index, np.sort(index, axis=-1))
    for group in np.ndindex(*groups):
        for expert in range(experts):
            chosen = index[(*group, expert)]
            chosen = chosen[chosen < tokens]
            assert len(set(chosen)) == len(chosen) == min(slots, valid[group].sum())
            assert valid[group][chosen].all()
            assert got.load[(*group, expert)] == len(chosen)
    assert not np.asarray(got.load)[..., experts:].any()


def test_random_choice_is_uniform_over_real_tokens_and_ignores_the_scores() -> None:
    """Over 4,000 draws each real token is selected at the rate of slots to real tokens."""
    valid = jnp.array([True] * 6 + [False, True, True])
    inputs = selector_inputs(1e6 * np.arange(9.0)[:, None], valid, 1, 2)
    draws = jax.random.split(jax.random.key(1), 4000)
    index = jax.jit(jax.vmap(lambda key: mode.RandomChoice()(inputs, key=key).index))(draws)
    rate = np.bincount(np.asarray(index).ravel(), minlength=9) / 4000
    assert rate[6] == 0
    # Four standard deviations of a frequency of 1/4 among 4,000.
    assert np.abs(rate[np.asarray(valid)] - 0.25).max() < 4 * np.sqrt(0.25 * 0.75 / 4000)


def test_random_choice_draws_anew_for_every_key_expert_and_group() -> None:
    """The same key gives the same tokens; another key, expert or group gives others."""
    inputs = selector_inputs(np.zeros((2, 64, 2)), np.ones((2, 64), bool), 2, 16)
    select = jax.jit(lambda key: mode.RandomChoice()(inputs, key=key).index)
    first, again, third = (np.asarray(select(jax.random.key(seed))) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    rows = {tuple(row) for index in (first, third) for row in index.reshape(-1, 16)}
    assert len(rows) == 8


@pytest.mark.parametrize("slots", [1, 3, 8])
def test_equal_scores_select_the_earliest_tokens(slots: int) -> None:
    """With equal scores exactly the first `slots` real tokens are selected."""
    valid = np.array([[True] * 8, [False, True] * 4])
    got = mode.ExpertChoice()(selector_inputs(np.full((2, 8, 2), 0.25), valid, 2, slots))
    for group, real in enumerate([list(range(8)), [1, 3, 5, 7]]):
        row = (real + [8] * 8)[:slots]
        assert got.index[group].tolist() == [row, row]


def test_infinities_among_the_scores() -> None:
    """Plus infinity wins; minus infinity is never selected, even where slots stay empty."""
    scores = np.array([[0.0], [-np.inf], [np.inf], [-3e38], [1.0]])
    for slots, expected in ((1, [2]), (3, [0, 2, 4]), (5, [0, 2, 3, 4, 5])):
        got = mode.ExpertChoice()(selector_inputs(scores, np.ones(5, bool), 1, slots))
        assert got.index.tolist() == [expected]


def test_token_choice_never_requests_a_choice_at_minus_infinity() -> None:
    """A barred choice is requested by no token, even if `k` leaves nothing else to request."""
    scores = np.array([[0.0, -np.inf, 1.0], [-np.inf, -np.inf, 0.0]])
    got = mode.TokenChoice(2)(selector_inputs(scores, np.ones(2, bool), 2, 2))
    assert got.index.tolist() == [[0, 2], [2, 2]]
    assert got.load.tolist() == [1, 0, 2]


def test_token_choice_serves_in_time_order_and_not_by_rank() -> None:
    """An earlier token's second choice keeps its slot from a later token's first choice."""
    scores = np.array([[2.0, 1.0, 0.0], [0.0, 9.0, 1.0]])
    got = mode.TokenChoice(2)(selector_inputs(scores, np.ones(2, bool), 3, 1))
    assert got.index.tolist() == [[0], [0], [1]]
    assert got.load.tolist() == [1, 2, 1]


@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("capacity", [1 / 6, 1.0])
def test_token_choice_accounts_for_every_assignment(k: int, capacity: float) -> None:
    """filled + no-op + dropped + k x padding = k x tokens in every group."""
    select, gate = mode.TokenChoice(k), mode.SoftmaxGate()
    router = make_router(0, num_noop=2, capacity=capacity, select=select, gate=gate)
    valid = draw_valid(60, (4,), 20)
    info = mode.TokenInfo.packed(jnp.asarray(valid, jnp.int32))
    routing = run(router, hidden_states(61, 4, 20, DIM), info)
    total = routing.num_filled + routing.num_noop + routing.num_dropped + k * routing.num_padding
    assert total.tolist() == [k * 20] * 4
    assert routing.num_padding.tolist() == (~valid).sum(-1).tolist()
    for group in range(4):
        scores = ref.selection_scores(f64(routing.logits[group]), "softmax", f64(router.state.bias))
        expected = ref.token_choice(scores, valid[group], 3, routing.index.shape[-1], k)
        filled = (expected.index < 20).sum()
        assert routing.num_filled[group] == filled
        assert routing.num_noop[group] == expected.load[3:].sum()
        assert routing.num_dropped[group] == expected.load[:3].sum() - filled
    assert int(routing.num_noop.sum()) > 0
    assert (int(routing.num_dropped.sum()) > 0) == (capacity < 1)


def test_a_threshold_counts_the_tokens_it_drops() -> None:
    """Beyond the slots a token is dropped and counted, and the earlier ones keep theirs."""
    logits = jnp.array([[1.0], [1.0], [-1.0], [2.0], [9.0]])
    got = mode.LogitThreshold()(selector_inputs(logits, np.ones(5, bool), 1, 2))
    assert got.index.tolist() == [[0, 1]]
    assert got.load.tolist() == [4]


@pytest.mark.parametrize(
    "threshold", [mode.LogitThreshold, mode.PredictorThreshold, mode.QuantileThreshold]
)
@pytest.mark.parametrize(("max_capacity", "slots"), [(1.0, 10), (0.5, 5), (0.01, 1), (None, 3)])
def test_max_capacity_sets_the_slots(
    threshold: type[mode.AbstractThreshold], max_capacity: float | None, slots: int
) -> None:
    """It is a fraction of the group's tokens; None is the router's own capacity."""
    router = make_router(1, capacity=3 / 10, select=threshold(max_capacity))
    assert router.slots(10) == slots
    info = mode.TokenInfo.plain((10,))
    assert eqx.filter_eval_shape(router, jnp.ones((10, DIM)), info).index.shape == (3, slots)
