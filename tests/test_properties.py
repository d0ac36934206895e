"""What holds for every shape, capacity, tie, padding and packing that hypothesis finds."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings, strategies as st
from hypothesis.extra import numpy as hnp

import mode
from tests import reference as ref
from tests.helpers import assert_close, run


DIM = 4
checked = settings(deadline=None, derandomize=True, max_examples=40)

# Few shapes, so that most examples run a program that is compiled already; data varies freely.
SHAPES = [((), 1), ((3,), 8), ((2, 2), 5)]
shapes = st.sampled_from(SHAPES)
fractions = st.sampled_from([0.01, 0.5, 1.0])


def segments_of(shape):
    """Documents of any lengths with padding anywhere, mostly little of it."""
    return hnp.arrays(np.int32, shape, elements=st.sampled_from([1, 1, 2, 2, 3, 0]))


def scores_of(shape):
    """Few values, so that ties abound, and infinities."""
    values = [-np.inf, -1.0, 0.0, 0.5, 0.5, 2.0]
    return hnp.arrays(np.float32, shape, elements=st.sampled_from(values))


def states_of(shape):
    """Hidden states on a grid: many tokens are equal to others."""
    return hnp.arrays(np.float32, shape, elements=st.sampled_from([-1.0, -0.25, 0.0, 0.5, 1.0]))


@st.composite
def requests(draw, shapes=shapes, noop=0, scores=scores_of):
    """What a router of three experts might ask of a selector."""
    (groups, tokens), experts = draw(shapes), 3
    compared = jnp.asarray(draw(scores((*groups, tokens, experts + noop))))
    return mode.Request(
        scores=compared,
        logits=compared,
        predictor=None,
        threshold=jnp.zeros(experts),
        valid=jnp.asarray(draw(segments_of((*groups, tokens))) != 0),
        slots=mode.token_capacity(tokens, draw(fractions)),
    )


@st.composite
def inputs(draw):
    """Hidden states and their info; no single token, of which each expert would have half."""
    groups, tokens = draw(st.sampled_from(SHAPES[1:]))
    segments = np.sort(draw(segments_of((*groups, tokens))), axis=-1)
    # Padding behind the documents or before them.
    segments = segments if draw(st.booleans()) else segments[..., ::-1].copy()
    x = jnp.asarray(draw(states_of((*groups, tokens, DIM))))
    return x, mode.TokenInfo.packed(jnp.asarray(segments))


def check_slots(index, valid, tokens):
    """Ascending, empty slots last, no token twice in an expert, real tokens only."""
    index, valid = np.asarray(index), np.asarray(valid)
    assert ((index >= 0) & (index <= tokens)).all()
    rising = np.diff(index, axis=-1)
    assert ((rising > 0) | (index[..., 1:] == tokens)).all()
    for group in np.ndindex(valid.shape[:-1]):
        taken = index[group][index[group] < tokens]
        assert valid[group][taken].all()


@checked
@given(requests())
def test_expert_choice_fills_what_can_be_filled(request):
    """Exactly min(capacity, eligible), and nobody left out scores more than one taken."""
    tokens = request.num_tokens
    index = np.asarray(run(mode.ExpertChoice(), request).index)
    check_slots(index, request.valid, tokens)
    scores, valid = np.asarray(request.scores), np.asarray(request.valid)
    for *group, expert in np.ndindex(index.shape[:-1]):
        score = scores[tuple(group)][:, expert]
        eligible = np.flatnonzero(valid[tuple(group)] & (score > -np.inf))
        taken = index[(*group, expert)]
        taken = taken[taken < tokens]
        assert len(taken) == min(request.slots, len(eligible))
        for out in set(eligible) - set(taken):
            assert all((score[t], -t) > (score[out], -out) for t in taken)


@checked
@given(requests(), st.integers(0, 9))
def test_controls_fill_what_can_be_filled(request, seed):
    """Random and strided choice take exactly min(capacity, real tokens) per expert."""
    count = np.asarray(request.valid).sum(-1)[..., None]
    for select in (mode.Strided(), mode.RandomChoice()):
        selection = run(select, request, key=jax.random.key(seed))
        check_slots(selection.index, request.valid, request.num_tokens)
        filled = (np.asarray(selection.index) < request.num_tokens).sum(-1)
        expected = np.broadcast_to(np.minimum(request.slots, count), filled.shape)
        np.testing.assert_array_equal(filled, expected)
        np.testing.assert_array_equal(selection.load, filled)


@checked
@given(requests(noop=1, scores=states_of), st.sampled_from([1, 2]))
def test_token_choice_accounts_for_every_assignment(request, k):
    """A real token asks for exactly k choices; slots fill up before anything is dropped."""
    selection = run(mode.TokenChoice(k), request)
    check_slots(selection.index, request.valid, request.num_tokens)
    load, experts = np.asarray(selection.load), request.num_experts
    np.testing.assert_array_equal(load.sum(-1), k * np.asarray(request.valid).sum(-1))
    filled = (np.asarray(selection.index) < request.num_tokens).sum(-1)
    np.testing.assert_array_equal(filled, np.minimum(load[..., :experts], request.slots))


CAUSAL = [mode.TokenChoice(2), mode.Threshold(mode.ByLogit()), mode.Threshold(mode.ByQuantile())]


@checked
@given(requests(noop=1), st.sampled_from(CAUSAL), st.data())
def test_causal_selectors_do_not_look_ahead(request, select, data):
    """Whatever comes later, the assignments of earlier tokens stay."""
    tokens = request.num_tokens
    cut = data.draw(st.integers(0, tokens - 1))
    shape = request.scores.shape
    later = (np.arange(tokens) >= cut)[:, None]
    other = np.where(later, data.draw(scores_of(shape)), request.scores)
    changed = eqx.tree_at(lambda r: (r.scores, r.logits), request, (jnp.asarray(other),) * 2)
    for group in np.ndindex(shape[:-2]):
        masks = [
            ref.selected_mask(np.asarray(run(select, r).index)[group], tokens)[:cut]
            for r in (request, changed)
        ]
        np.testing.assert_array_equal(*masks)


def make_layer(kind):
    """A routed layer around a block that mixes tokens."""
    key = jax.random.key(0)
    if kind == "experts":

        def make(key):
            return mode.GELU(DIM, 4, key=key)

        return mode.Residual(
            mode.MixtureOfExperts(make, DIM, 2, num_noop=1, select=mode.TokenChoice(1), key=key)
        )
    block = mode.TransformerBlock(DIM, 2, key=key)
    return mode.MixtureOfDepths(block, DIM, 0.5, gate=mode.Sigmoid(), key=jax.random.key(1))


def over_groups(layer, x, info):
    """The layer, group by group."""
    return jax.vmap(layer)(x, info)


layers = st.sampled_from([make_layer("depths"), make_layer("experts")])
few = settings(checked, max_examples=20)


@few
@given(layers, inputs())
def test_tokens_that_nobody_took_keep_their_bits(layer, given_inputs):
    """Skipped, dropped, sent to a no-op or padding: out as they came in."""
    x, info = given_inputs
    hidden, (routing,) = run(layer, x, info)
    check_slots(routing.index, info.valid, x.shape[-2])
    skipped = ~np.asarray(routing.selected).any(-1)
    assert np.asarray(hidden)[skipped].tobytes() == np.asarray(x)[skipped].tobytes()
    assert not np.asarray(routing.weight)[~np.asarray(routing.filled)].any()
    assert np.isfinite(hidden).all()


@few
@given(layers, inputs())
def test_vmap_over_the_groups_is_the_batch(layer, given_inputs):
    """The same assignments exactly, and the same numbers."""
    x, info = given_inputs
    hidden, (routing,) = run(layer, x, info)
    mapped, (each,) = run(over_groups, layer, x, info)
    np.testing.assert_array_equal(each.index, routing.index)
    np.testing.assert_array_equal(each.load, routing.load)
    assert_close((mapped, each.weight), tuple(map(np.asarray, (hidden, routing.weight))))


@few
@given(layers, inputs(), st.randoms(use_true_random=False))
def test_groups_are_independent(layer, given_inputs, random):
    """Reordering the groups reorders the results."""
    x, info = given_inputs
    order = list(range(x.shape[0]))
    random.shuffle(order)
    shuffled = jax.tree.map(lambda leaf: leaf[np.array(order)], (x, info))
    expected, (routing,) = run(layer, x, info)
    hidden, (moved,) = run(layer, *shuffled)
    np.testing.assert_array_equal(moved.index, np.asarray(routing.index)[order])
    assert_close(hidden, np.asarray(expected)[order])


@checked
@given(hnp.arrays(np.int32, (2, 9), elements=st.integers(0, 3)))
def test_packed_positions_count_from_the_start_of_each_document(segments):
    """Positions restart where the segment changes, and are 0 in padding."""
    info = run(mode.TokenInfo.packed, jnp.asarray(segments))
    for row, positions in zip(segments, np.asarray(info.positions), strict=True):
        count = 0
        for place, segment in enumerate(row):
            count = 0 if place == 0 or segment != row[place - 1] else count + 1
            assert positions[place] == (count if segment else 0)
    np.testing.assert_array_equal(info.valid, segments != 0)


def measure(request):
    """Metrics and balance of a token choice."""
    chosen = mode.TokenChoice(1)(request)
    weight = jnp.zeros(chosen.index.shape)
    logits, load, valid = request.logits, chosen.load, request.valid
    routing = mode.Routing(chosen.index, weight, logits, logits, load, valid, None)
    return mode.routing_metrics(routing), mode.load_balance_loss(routing)


@checked
@given(requests(st.just(SHAPES[1]), noop=1, scores=states_of))
def test_metrics_of_any_routing_are_shares(request):
    """Coverage, rates and loads lie in [0, 1]; all that was asked for is accounted for."""
    metrics, balance = run(measure, request)
    for share in (metrics.coverage, metrics.drop_rate, metrics.noop_rate, *metrics.load):
        assert 0 <= share <= 1
    real = float(np.asarray(request.valid).any())
    assert_close(jnp.sum(metrics.load), real)
    assert_close(metrics.compute + metrics.drop_rate + metrics.noop_rate, real)
    assert 0 <= balance <= 4 + 1e-5
