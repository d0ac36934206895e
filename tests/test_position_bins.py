"""Running quantiles by position: a threshold for each bin of positions, forward and decoding."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
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
    padded_info,
    rng,
    run,
)


DIM, VOCAB = 8, 17
KEY = jax.random.key(0)


def make_expert(key):
    return mode.GELU(DIM, 8, key=key)


def make_depths(bins, capacity=0.25, **options):
    block = mode.PositionWise(make_expert(KEY))
    return mode.MixtureOfDepths(block, DIM, capacity, position_bins=bins, key=KEY, **options)


def make_experts(bins, **options):
    """Three experts and a no-op."""
    options = {"num_noop": 1, "capacity_factor": 1.5, "router_std": 0.3, **options}
    return mode.MixtureOfExperts(make_expert, DIM, 3, position_bins=bins, key=KEY, **options)


def make_decoder(bins, **options):
    """Four layers, every other one routed: one scan of two periods."""
    options = {"depth": 4, "num_heads": 2, "capacity": 0.5, "key": KEY, **options}
    return mode.mod_decoder(VOCAB, DIM, position_bins=bins, **options)


def draw_tokens(seed, *shape):
    return jnp.asarray(rng(seed).integers(0, VOCAB, shape), jnp.int32)


def sparse(info):
    """Every eighth token of longer documents: the bins then hold 1, 2, 4, ... tokens of each."""
    return mode.TokenInfo(8 * info.positions, info.segment_ids)


def updated(model, *arguments, **rates):
    """The model after it has seen one step."""
    return run(mode.update_state, model, run(model, *arguments)[1], **rates)


def with_thresholds(values, model):
    """Every router of `model` compares with `values`, `[bins, experts]`."""
    return mode.map_routers(
        lambda router: eqx.tree_at(
            lambda r: r.state.threshold,
            router,
            jnp.broadcast_to(jnp.asarray(values, jnp.float32), router.state.threshold.shape),
        ),
        model,
    )


@pytest.mark.parametrize("bins", [2, 5, 8, 40])
@pytest.mark.parametrize("dtype", [jnp.int8, jnp.int16, jnp.int32])
def test_every_position_has_a_bin(bins, dtype):
    """Exactly, up to the largest position there is; the last bin takes the rest."""
    largest = jnp.iinfo(dtype).max
    edges = [8 * 2**power - 8 + step for power in range(29) for step in (-1, 0, 1)]
    positions = sorted(
        {p for p in [*range(300), *edges, largest - 1, largest] if 0 <= p <= largest}
    )
    state = mode.RouterState.initial(1, 1, bins)
    found = run(state.bins, jnp.asarray(np.array(positions), dtype))
    assert found.dtype == jnp.int32
    assert found.tolist() == [ref.position_bin(position, bins) for position in positions]


def test_the_oracle_by_hand():
    """Bins 0-7 | 8-23 | 24-: scores 4 | 1 3 | none, then none | 5 7 | none; a half is taken."""
    valid, positions = np.array([True, True, True]), np.array([7, 8, 23])
    scores = np.array([[4.0], [1.0], [3.0]])
    new, counts = ref.running_quantiles_by_position(
        np.zeros((3, 1)), scores, valid, positions, 0.5, 0.1, np.zeros(3, int)
    )
    assert (new[:, 0].tolist(), counts.tolist()) == ([4.0, 2.0, 2.0], [1, 1, 0])
    new, counts = ref.running_quantiles_by_position(
        new, scores + 4, np.array([False, True, True]), positions, 0.5, 0.1, counts
    )
    assert (new[:, 0].tolist(), counts.tolist()) == ([4.0, 4.0, 4.0], [1, 2, 0])


LAYERS = {
    "depths raw": (make_depths(5), "raw"),
    "depths full": (make_depths(3, 1.0), "raw"),
    "depths sigmoid": (make_depths(2, 0.5, gate=mode.Sigmoid()), "sigmoid"),
    "expert choice": (make_experts(5), "softmax"),
    "token choice": (make_experts(3, select=mode.TokenChoice(2)), "softmax"),
}

# What the steps bring: documents too short for the later bins, nothing at all, padding, packing.
STEPS = [
    sparse(info)
    for info in (
        packed_info((2,), (1, 1), tokens=12),
        padded_info(0, 0, tokens=12),
        padded_info(12, 5, tokens=12),
        packed_info((4, 6), (3, 8, 1), tokens=12),
        packed_info((2, 2, 2), (1,), tokens=12),
        padded_info(9, 12, tokens=12),
    )
]


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("rates", [{}, {"quantile_rate": 0.4, "bias_rate": 0.1}])
def test_several_updates_follow_the_oracle(name, rates):
    """Each bin after each step, those without tokens in it and those that never had any too."""
    model, gate = LAYERS[name]
    bins, experts = model.router.state.threshold.shape
    threshold, updates = np.zeros((bins, experts)), np.zeros(bins, int)
    bias = np.zeros(model.router.state.bias.shape[0])

    @eqx.filter_jit
    def step(model, x, info):
        _, routings = model(x, info)
        return mode.update_state(model, routings, **rates), routings[0]

    for number, info in enumerate(STEPS):
        before = model.router.state.threshold
        model, routing = step(model, hidden_states(number, 2, 12, DIM), info)
        valid, positions = np.asarray(info.valid), np.asarray(info.positions)
        np.testing.assert_array_equal(routing.positions, positions)
        scores = ref.over_groups(
            lambda z, b=bias: ref.selection_scores(z, gate, b), 1, f64(routing.logits)
        )
        threshold, updates = ref.running_quantiles_by_position(
            threshold,
            scores[..., :experts],
            valid,
            positions,
            model.router.fraction,
            rates.get("quantile_rate", 0.03),
            updates,
        )
        if name == "token choice":
            rate = rates.get("bias_rate", 0.001)
            bias = ref.balancing_bias(bias, np.asarray(routing.load), rate)
        state = model.router.state
        assert state.threshold.shape == (bins, experts)
        assert_close(state.threshold, threshold)
        assert state.updates.tolist() == updates.tolist()
        assert_close(state.bias, bias)
        seen = {ref.position_bin(int(p), bins) for p in positions[valid]}
        for one in set(np.flatnonzero(updates)) - seen:
            np.testing.assert_array_equal(state.threshold[one], before[one])
    assert updates[0] == len(STEPS) - 1
    assert bins < 5 or (updates[3] == 3 and updates[4] == 0)


def test_every_layer_of_a_scan_has_bins_of_its_own():
    """Thresholds of a scanned decoder follow the oracle layer by layer over three steps."""
    model = make_decoder(3)
    expected, updates = np.zeros((2, 3, 1)), np.zeros((2, 3), int)

    @eqx.filter_jit
    def step(model, tokens, info):
        _, routings = model(tokens, info)
        return mode.update_state(model, routings), routings

    for number in range(3):
        info = packed_info((26, 9), (30,), tokens=36)
        model, (routing,) = step(model, draw_tokens(number, 2, 36), info)
        for layer in range(2):
            expected[layer], updates[layer] = ref.running_quantiles_by_position(
                expected[layer],
                f64(routing.logits[layer]),
                np.asarray(info.valid),
                np.asarray(info.positions),
                0.5,
                0.03,
                updates[layer],
            )
        (router,) = mode.routers(model)
        assert router.state.layers == (2,)
        assert router.state.position_bins == 3
        assert_close(router.state.threshold, expected)
        assert router.state.updates.tolist() == updates.tolist() == [[number + 1] * 3] * 2
    assert len(np.unique(expected)) == 6


def test_each_bin_takes_its_share_where_one_threshold_does_not():
    """Scores that rise along the sequence: what the bins are for."""
    taken = {}
    info = sparse(mode.TokenInfo.plain((2, 63)))
    x = hidden_states(20, 2, 63, DIM).at[..., 0].add(jnp.sqrt(info.positions.astype(jnp.float32)))
    for bins in (1, 6):
        layer = make_depths(bins)
        weight = jnp.zeros_like(layer.router.scorer.weight).at[0].set(1.0)
        layer = eqx.tree_at(lambda m: m.router.scorer.weight, layer, weight)
        layer = updated(layer, x, info)
        _, (routing,) = run(mode.causal(layer), x, info)
        bin_of = [ref.position_bin(8 * place, 6) for place in range(63)]
        counts = np.zeros(6, int)
        np.add.at(counts, bin_of, np.asarray(routing.selected).sum((0, 2)))
        taken[bins] = counts.tolist()
    assert taken[6] == [1, 1, 2, 4, 8, 16]  # a quarter of 2, 4, 8, 16, 32, 64; never none
    assert sum(taken[1]) == 32  # a quarter of all, rounded to even
    assert taken[1][:4] == [0, 0, 0, 0]


@pytest.mark.parametrize("limit", [1.0, None])
def test_depths_by_position_against_the_oracle(limit):
    """Packed documents: a token is held to the threshold of its position in its document."""
    keys = jax.random.split(jax.random.key(4), 2)
    block = mode.TransformerBlock(DIM, 2, key=keys[0])
    layer = mode.MixtureOfDepths(block, DIM, 0.5, position_bins=4, router_std=1.0, key=keys[1])
    thresholds = np.array([-1.0, 0.5, -0.5, 1.0])
    layer = with_thresholds(thresholds[:, None], layer)
    model = mode.causal(layer, limit=limit)
    info = sparse(packed_info((5, 4, 3), (10, 1), tokens=12))
    x = hidden_states(7, 2, 12, DIM)
    hidden, (routing,) = run(model, x, info)
    slots = 12 if limit else 6

    def depths(x, valid, positions, segments):
        shift = np.array([[thresholds[ref.position_bin(int(p), 4)]] for p in positions])
        return ref.mixture_of_depths(
            x,
            oracle_router(layer.router)[0],
            oracle_block(block),
            0.5,
            "raw",
            valid,
            positions,
            segments,
            select=lambda scores, valid: ref.threshold(scores - shift, valid, slots),
        )

    given = map(np.asarray, (info.valid, info.positions, info.segment_ids))
    expected, assignment = ref.over_groups(depths, 1, f64(x), *given)
    np.testing.assert_array_equal(routing.index, assignment.index)
    np.testing.assert_array_equal(routing.load, assignment.load)
    assert_close(hidden, expected)
    # As recorded under top-k, held against what the rule would do.
    _, recorded = run(layer, x, info)
    (asked,) = mode.causal_membership(layer, recorded)
    assert int(asked.sum()) == assignment.load.sum()
    if limit:
        np.testing.assert_array_equal(asked, routing.selected)


def test_experts_by_position_against_the_oracle():
    """A threshold per bin and expert; other rules pay no heed to it."""
    layer = make_experts(3)
    thresholds = rng(5).normal(size=(3, 3)) * 0.5 - 1.3
    layer = with_thresholds(thresholds, layer)
    info = sparse(packed_info((5, 6), (12,), tokens=12))
    x = hidden_states(8, 2, 12, DIM)
    _, (routing,) = run(mode.causal(layer), x, info)
    for group in range(2):
        logits = ref.router_logits(f64(x[group]), oracle_router(layer.router))
        places = [ref.position_bin(int(p), 3) for p in info.positions[group]]
        scores = ref.selection_scores(logits, "softmax")[:, :3] - thresholds[places]
        expected = ref.threshold(scores, np.asarray(info.valid[group]), 12)
        np.testing.assert_array_equal(routing.index[group], expected.index)
        assert routing.load[group].tolist() == [*expected.load, 0]
    plain = run(mode.causal(make_experts(1), by=mode.ByLogit()), x, info)
    binned = run(mode.causal(layer, by=mode.ByLogit()), x, info)
    np.testing.assert_array_equal(plain[0], binned[0])


def test_the_router_inside_a_depth_sees_original_positions():
    """Staged: the experts' router bins tokens by where they stood, not by their slot."""
    layer = mode.staged_mode(make_expert, DIM, 2, 2, capacity=0.5, position_bins=4, key=KEY)
    info = sparse(packed_info((9, 6), (16,), tokens=16))
    _, (depth, experts) = run(layer, hidden_states(9, 2, 16, DIM), info)
    seat = np.minimum(np.asarray(depth.index[:, 0]), 15)
    taken = np.take_along_axis(np.asarray(info.positions), seat, axis=1)
    valid = np.asarray(experts.valid)
    np.testing.assert_array_equal(np.asarray(experts.positions)[valid], taken[valid])
    moved = run(mode.update_state, layer, (depth, experts))
    updates = [router.state.updates for router in mode.routers(moved)]
    places = [ref.position_bin(int(p), 4) for p in taken[valid]]
    assert updates[0].tolist() == [1, 1, 1, 1]
    assert updates[1].tolist() == [int(one in places) for one in range(4)]


@pytest.mark.parametrize("make", [make_depths, make_experts])
def test_causal_by_position(make):
    layer = mode.causal(updated(make(4), hidden_states(15, 2, 60, DIM)))
    mode.testing.assert_causal(layer, dim=DIM, tokens=60)


def test_a_narrow_state_stays_narrow():
    """A model cast as a whole keeps its dtypes and its structure from step to step."""
    layer = jax.tree.map(
        lambda leaf: leaf.astype(jnp.bfloat16) if eqx.is_inexact_array(leaf) else leaf,
        make_experts(3),
    )
    x = hidden_states(10, 2, 12, DIM).astype(jnp.bfloat16)
    hidden, routings = run(layer, x)
    moved = run(mode.update_state, layer, routings)
    assert hidden.dtype == moved.router.state.threshold.dtype == jnp.bfloat16
    assert jax.tree.structure(moved) == jax.tree.structure(layer)
    assert moved.router.state.updates.dtype == jnp.int32
    assert run(mode.causal(moved), x)[0].dtype == jnp.bfloat16


def test_one_bin_is_what_there_was():
    """No leaf more in model or record, the shapes of one threshold for all."""
    layer = make_depths(1)
    state = layer.router.state
    assert (state.position_bins, state.threshold.shape, state.updates.shape) == (1, (1,), ())
    _, (routing,) = run(layer, hidden_states(11, 2, 12, DIM))
    assert routing.positions is None
    assert mode.routers(make_decoder(1))[0].state.threshold.shape == (2, 1)
    default = mode.MixtureOfDepths(mode.PositionWise(make_expert(KEY)), DIM, 0.25, key=KEY)
    assert eqx.tree_equal(default, layer)
    assert jax.tree.structure(default) == jax.tree.structure(make_depths(7))


@pytest.mark.parametrize("make", [make_depths, make_experts])
def test_bins_that_agree_are_one_bin(make):
    """Bit for bit: the same thresholds in all bins take the same tokens; and where all tokens are
    in one bin, it moves as the only one does."""
    one, many = make(1), make(4)
    x = hidden_states(12, 2, 12, DIM)
    start = mode.TokenInfo(jnp.zeros((2, 12), jnp.int32), jnp.ones((2, 12), jnp.int32))
    for number in range(3):
        one, many = (updated(m, x + 0.1 * number, start, quantile_rate=0.2) for m in (one, many))
        for place in range(4):
            np.testing.assert_array_equal(
                many.router.state.threshold[place], one.router.state.threshold
            )
    assert many.router.state.updates.tolist() == [3, 0, 0, 0]
    info = sparse(mode.TokenInfo.plain((2, 12)))
    (hidden, (routing,)), (other, (binned,)) = (run(mode.causal(m), x, info) for m in (one, many))
    np.testing.assert_array_equal(hidden, other)
    np.testing.assert_array_equal(routing.index, binned.index)
    assert 0 < int(routing.num_filled.sum()) < 2 * 12 * one.router.num_experts


def test_bins_travel_with_the_rest(tmp_path):
    """Under `vmap` and gradients, in records and checkpoints, and out of an optimizer's reach."""
    layer = with_thresholds([[0.1], [-0.2], [0.0]], make_depths(3, select=mode.Threshold()))
    x = hidden_states(13, 2, 30, DIM)
    hidden, (routing,) = run(layer, x)
    mapped, (one_by_one,) = run(jax.vmap(layer), x)
    assert_close(mapped, hidden)
    np.testing.assert_array_equal(one_by_one.index, routing.index)
    np.testing.assert_array_equal(one_by_one.positions, routing.positions)

    replayed = eqx.tree_at(lambda m: m.router.select, layer, mode.Replay(routing))
    np.testing.assert_array_equal(run(replayed, x)[0], hidden)

    assert mode.trainable(layer).router.state.threshold is False
    gradient = eqx.filter_jit(eqx.filter_grad(lambda m: jnp.sum(jnp.sin(m(x)[0]))))(layer)
    assert not np.asarray(gradient.router.state.threshold).any()
    assert np.asarray(gradient.router.scorer.weight).any()

    file = tmp_path / "layer.eqx"
    eqx.tree_serialise_leaves(file, layer)
    read = eqx.tree_deserialise_leaves(file, make_depths(3, select=mode.Threshold()))
    np.testing.assert_array_equal(run(read, x)[0], hidden)


def test_the_checks_of_users_hold_with_bins():
    model = mode.mod_decoder(64, 16, depth=4, num_heads=2, position_bins=3, key=jax.random.key(0))
    mode.testing.assert_static_shapes(model, tokens=(16, 32), vocab=64)
    mode.testing.assert_router_gradients(model, tokens=16, vocab=64)
