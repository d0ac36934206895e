"""Every selector against the oracle, and the counts kept apart."""

from fractions import Fraction
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mode
from tests import reference as ref
from tests.helpers import assert_close, f64, hidden_states, oracle_router, rng, run


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


def draw_valid(seed, groups, tokens):
    """Padding anywhere; the last group of several has nothing else."""
    valid = rng(seed).random((*groups, tokens)) < 0.7
    if groups:
        valid[(-1,) * len(groups)] = False
    return valid


def request(scores, valid, experts, slots, **fields):
    """A request of which a selector that reads `scores` needs no more."""
    scores = jnp.asarray(scores, jnp.float32)
    given = {"logits": scores, "predictor": None, "threshold": jnp.zeros(experts), **fields}
    return mode.Request(scores=scores, valid=jnp.asarray(valid), slots=slots, **given)


def same(selection, assignment):
    """The selection is the oracle's, number by number, in int32."""
    assert selection.index.dtype == selection.load.dtype == jnp.int32
    np.testing.assert_array_equal(selection.index, assignment.index)
    np.testing.assert_array_equal(selection.load, assignment.load)


def with_noop(assignment, noop):
    """The oracle's load for rules that know of no no-ops."""
    width = [(0, 0)] * (assignment.load.ndim - 1) + [(0, noop)]
    return ref.Assignment(assignment.index, np.pad(assignment.load, width))


def draw_scores(kind, seed, shape):
    """Distinct scores, scores with many ties, or ties and tokens that may not be taken."""
    if kind == "distinct":
        return rng(seed).normal(size=shape).astype(np.float32)
    scores = rng(seed).integers(-1, 2, shape).astype(np.float32)
    if kind == "barred":
        scores[rng(seed + 1).random(shape) < 0.4] = -np.inf
    return scores


@cases
@pytest.mark.parametrize("kind", ["distinct", "tied", "barred"])
def test_expert_choice(kind, groups, tokens, experts, noop, slots):
    """Top tokens per expert; ties, padding and minus infinity as the oracle has them."""
    scores = draw_scores(kind, 10, (*groups, tokens, experts + noop))
    valid = draw_valid(11, groups, tokens)
    got = run(mode.ExpertChoice(), request(scores, valid, experts, slots))
    take = partial(ref.expert_choice, num_experts=experts, capacity=slots)
    same(got, ref.over_groups(take, len(groups), scores, valid))


@cases
@pytest.mark.parametrize("kind", ["distinct", "tied"])
@pytest.mark.parametrize("k", [1, 2, "all"])
def test_token_choice(k, kind, groups, tokens, experts, noop, slots):
    """Best choices per token, served in time order, dropped where full."""
    k = experts + noop if k == "all" else min(k, experts + noop)
    scores = draw_scores(kind, 20, (*groups, tokens, experts + noop))
    valid = draw_valid(21, groups, tokens)
    got = run(mode.TokenChoice(k), request(scores, valid, experts, slots))
    take = partial(ref.token_choice, num_experts=experts, capacity=slots, k=k)
    same(got, ref.over_groups(take, len(groups), scores, valid))


@cases
def test_strided(groups, tokens, experts, noop, slots):
    """Evenly spaced real tokens, whatever the scores."""
    scores = draw_scores("distinct", 30, (*groups, tokens, experts + noop))
    valid = draw_valid(31, groups, tokens)
    got = run(mode.Strided(), request(scores, valid, experts, slots))
    expected = ref.over_groups(lambda v: ref.strided(v, experts, slots), len(groups), valid)
    same(got, with_noop(expected, noop))


@cases
@pytest.mark.parametrize("rule", ["predictor", "logit", "quantile"])
def test_threshold(rule, groups, tokens, experts, noop, slots):
    """Each rule takes the tokens above its threshold, first come first served."""
    shape = (*groups, tokens, experts)
    scores = draw_scores("tied", 40, (*groups, tokens, experts + noop))
    logits = draw_scores("tied", 41, scores.shape)
    predictor = draw_scores("tied", 42, shape)
    quantile = draw_scores("tied", 43, (experts,))
    valid = draw_valid(44, groups, tokens)
    asked = request(
        scores,
        valid,
        experts,
        slots,
        logits=jnp.asarray(logits),
        predictor=jnp.asarray(predictor),
        threshold=jnp.asarray(quantile),
    )
    by, margin = {
        "predictor": (mode.ByPredictor(), predictor),
        "logit": (mode.ByLogit(), logits[..., :experts]),
        "quantile": (mode.ByQuantile(), scores[..., :experts] - quantile),
    }[rule]
    got = run(mode.Threshold(by), asked)
    take = partial(ref.threshold, slots=slots)
    same(got, with_noop(ref.over_groups(take, len(groups), margin, valid), noop))


@cases
def test_random_choice_fills_exactly_its_slots(groups, tokens, experts, noop, slots):
    """min(capacity, real tokens) distinct real tokens per expert, in time order."""
    scores = draw_scores("distinct", 50, (*groups, tokens, experts + noop))
    valid = draw_valid(51, groups, tokens)
    asked = request(scores, valid, experts, slots)
    got = run(mode.RandomChoice(), asked, key=jax.random.key(0))
    index = np.asarray(got.index)
    np.testing.assert_array_equal(index, np.sort(index, axis=-1))
    for group in np.ndindex(*groups):
        for expert in range(experts):
            taken = index[(*group, expert)]
            taken = taken[taken < tokens]
            assert len(set(taken)) == len(taken) == min(slots, valid[group].sum())
            assert valid[group][taken].all()
    assert not np.asarray(got.load)[..., experts:].any()


def test_random_choice_is_uniform_over_real_tokens_and_ignores_the_scores():
    """Over 4,000 draws each real token is taken at the rate of slots to real tokens."""
    valid = jnp.array([True] * 6 + [False, True, True])
    asked = request(1e6 * np.arange(9.0)[:, None], valid, 1, 2)
    draws = jax.random.split(jax.random.key(1), 4000)
    index = jax.jit(jax.vmap(lambda key: mode.RandomChoice()(asked, key=key).index))(draws)
    rate = np.bincount(np.asarray(index).ravel(), minlength=9) / 4000
    assert rate[6] == 0
    # Four standard deviations of a share of 1/4 among 4,000.
    assert np.abs(rate[np.asarray(valid)] - 0.25).max() < 4 * np.sqrt(0.25 * 0.75 / 4000)


def test_random_choice_draws_anew_for_every_key_expert_and_group():
    """The same key gives the same tokens; another key, expert or group gives others."""
    asked = request(np.zeros((2, 64, 2)), np.ones((2, 64), bool), 2, 16)
    select = jax.jit(lambda key: mode.RandomChoice()(asked, key=key).index)
    one, again, other = (np.asarray(select(jax.random.key(seed))) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    rows = {tuple(row) for index in (one, other) for row in index.reshape(-1, 16)}
    assert len(rows) == 8


@pytest.mark.parametrize("slots", [1, 3, 8])
def test_equal_scores_take_the_earliest_tokens(slots):
    """With all scores equal exactly the first `slots` real tokens are taken, no more, no fewer."""
    valid = np.array([[True] * 8, [False, True] * 4])
    got = mode.ExpertChoice()(request(np.full((2, 8, 2), 0.25), valid, 2, slots))
    for group, real in enumerate([list(range(8)), [1, 3, 5, 7]]):
        row = (real + [8] * 8)[:slots]
        assert got.index[group].tolist() == [row, row]


def test_infinities_among_the_scores():
    """Plus infinity wins, minus infinity is never taken, and a full capacity leaves it out too."""
    scores = np.array([[0.0], [-np.inf], [np.inf], [-3e38], [1.0]])
    for slots, expected in ((1, [2]), (3, [0, 2, 4]), (5, [0, 2, 3, 4, 5])):
        got = mode.ExpertChoice()(request(scores, np.ones(5, bool), 1, slots))
        assert got.index.tolist() == [expected]


def test_token_choice_never_asks_for_a_choice_at_minus_infinity():
    """A barred choice is asked for by nobody, even where `k` leaves nothing else to ask for."""
    scores = np.array([[0.0, -np.inf, 1.0], [-np.inf, -np.inf, 0.0]])
    got = mode.TokenChoice(2)(request(scores, np.ones(2, bool), 2, 2))
    assert got.index.tolist() == [[0, 2], [2, 2]]
    assert got.load.tolist() == [1, 0, 2]


def test_token_choice_serves_in_time_order_and_not_by_rank():
    """An earlier token's second choice keeps its slot from a later token's first choice."""
    scores = np.array([[2.0, 1.0, 0.0], [0.0, 9.0, 1.0]])
    got = mode.TokenChoice(2)(request(scores, np.ones(2, bool), 3, 1))
    assert got.index.tolist() == [[0], [0], [1]]
    assert got.load.tolist() == [1, 2, 1]


def make_router(key, select, fraction):
    """Three experts and two no-ops on eight features."""
    gate = mode.Softmax()
    return mode.Router(8, 3, num_noop=2, fraction=fraction, select=select, gate=gate, key=key)


@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("fraction", [Fraction(1, 6), Fraction(1)])
def test_token_choice_accounts_for_every_assignment(k, fraction):
    """filled + no-op + dropped + k x padding = k x tokens in every group, each as it should be."""
    router = make_router(jax.random.key(0), mode.TokenChoice(k), fraction)
    valid = draw_valid(60, (4,), 20)
    info = mode.TokenInfo.packed(jnp.asarray(valid, jnp.int32))
    routing = run(router, hidden_states(61, 4, 20, 8), info)
    total = routing.num_filled + routing.num_noop + routing.num_dropped + k * routing.num_padding
    assert total.tolist() == [k * 20] * 4
    assert routing.num_padding.tolist() == (~valid).sum(-1).tolist()
    for group in range(4):
        logits, slots = f64(routing.logits[group]), routing.index.shape[-1]
        expected = ref.token_choice(logits, valid[group], 3, slots, k)
        filled = (expected.index < 20).sum()
        assert routing.num_filled[group] == filled
        assert routing.num_noop[group] == expected.load[3:].sum()
        assert routing.num_dropped[group] == expected.load[:3].sum() - filled
    assert int(routing.num_noop.sum()) > 0
    assert (int(routing.num_dropped.sum()) > 0) == (fraction < 1)


def test_threshold_counts_whom_it_turned_away():
    """Beyond the limit a token is dropped and counted, and the earlier ones stay."""
    logits = jnp.array([[1.0], [1.0], [-1.0], [2.0], [9.0]])
    got = mode.Threshold(mode.ByLogit())(request(logits, np.ones(5, bool), 1, 2))
    assert got.index.tolist() == [[0, 1]]
    assert got.load.tolist() == [4]


@pytest.mark.parametrize(("limit", "slots"), [(1.0, 10), (0.5, 5), (0.01, 1), (None, 3)])
def test_threshold_limit_sets_the_slots(limit, slots):
    """A limit is a share of the group's tokens; None is the router's own capacity."""
    select = mode.Threshold(mode.ByLogit(), limit)
    router = make_router(jax.random.key(1), select, Fraction(3, 10))
    info = mode.TokenInfo.plain((10,))
    assert eqx.filter_eval_shape(router, jnp.ones((10, 8)), info).index.shape == (3, slots)


@pytest.mark.parametrize(
    "select", [mode.ExpertChoice(), mode.TokenChoice(2), mode.RandomChoice(), mode.Strided()]
)
def test_replay_repeats_the_assignments_with_live_weights(select):
    """Another router under `Replay` fills the recorded slots with weights of its own."""
    keys = jax.random.split(jax.random.key(0), 3)
    one, other = (make_router(key, select, Fraction(1, 3)) for key in keys[:2])
    x, info = hidden_states(70, 2, 12, 8), mode.TokenInfo.plain((2, 12))
    recorded = run(one, x, info, key=keys[2])
    replaying = eqx.tree_at(lambda r: r.select, other, mode.Replay(recorded))
    replayed = run(replaying, x, info)
    np.testing.assert_array_equal(replayed.index, recorded.index)
    np.testing.assert_array_equal(replayed.load, recorded.load)
    for group in range(2):
        logits = ref.router_logits(f64(x[group]), oracle_router(other))
        index = np.asarray(recorded.index[group])
        assert_close(replayed.weight[group], ref.combine_weights(logits, index, "softmax"))


def test_selected_mask_is_the_index_read_the_other_way():
    """`selected` and `filled` agree with the slots."""
    scores = draw_scores("barred", 80, (4, 9, 3))
    valid = draw_valid(81, (4,), 9)
    got = mode.ExpertChoice()(request(scores, valid, 3, 4))
    zeros = jnp.zeros((4, 9, 3))
    routing = mode.Routing(
        got.index, jnp.zeros((4, 3, 4)), zeros, zeros, got.load, jnp.asarray(valid), None
    )
    for group in range(4):
        expected = ref.selected_mask(np.asarray(got.index[group]), 9)
        np.testing.assert_array_equal(routing.selected[group], expected)
        assert int(routing.num_filled[group]) == expected.sum()
    np.testing.assert_array_equal(routing.filled, np.asarray(got.index) < 9)
