"""Slots out and back, and that nothing which is not a token gets into one that is."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mode
from tests.helpers import assert_close, f64, hidden_states, packed_info, padded_info, rng, run


DIM = 8


def draw_routing(seed, groups, tokens, experts, slots):
    """Random distinct tokens per expert in time order, some slots empty, random weights."""
    draws = rng(seed)
    index = np.full((*groups, experts, slots), tokens, np.int32)
    for row in np.ndindex(index.shape[:-1]):
        taken = draws.permutation(tokens)[: draws.integers(0, slots + 1)]
        index[row][: len(taken)] = np.sort(taken)
    weight = np.where(index < tokens, draws.normal(size=index.shape), 0).astype(np.float32)
    logits = jnp.zeros((*groups, tokens, experts))
    return mode.Routing(
        index=jnp.asarray(index),
        weight=jnp.asarray(weight),
        logits=logits,
        detached_logits=logits,
        load=jnp.sum(index < tokens, axis=-1, dtype=jnp.int32),
        valid=jnp.ones((*groups, tokens), bool),
        predictor=None,
    )


CASES = [((), 6, 1, 3), ((4,), 6, 1, 6), ((3,), 9, 4, 2), ((2, 3), 5, 2, 5), ((9,), 1, 2, 1)]
cases = pytest.mark.parametrize(("groups", "tokens", "experts", "slots"), CASES)


@cases
def test_dispatch_gathers_and_leaves_zeros(groups, tokens, experts, slots):
    """Every slot holds its token's features and info; an empty one zeros and padding."""
    routing = draw_routing(0, groups, tokens, experts, slots)
    x = hidden_states(1, *groups, tokens, DIM)
    info = mode.TokenInfo(
        jnp.asarray(rng(2).integers(0, 99, (*groups, tokens)), jnp.int32),
        jnp.asarray(rng(3).integers(1, 5, (*groups, tokens)), jnp.int32),
    )
    got, got_info = mode.dispatch(x, routing), mode.dispatch_info(info, routing)
    assert got.shape == (experts, *groups, slots, DIM)
    for expert, *group, slot in np.ndindex(got.shape[:-1]):
        token = int(routing.index[(*group, expert, slot)])
        here, there = (expert, *group, slot), (*group, token)
        empty = token == tokens
        expected = np.zeros(DIM) if empty else np.asarray(x[there])
        np.testing.assert_array_equal(got[here], expected)
        assert int(got_info.positions[here]) == (0 if empty else info.positions[there])
        assert int(got_info.segment_ids[here]) == (0 if empty else info.segment_ids[there])


@cases
def test_combine_adds_weighted_updates(groups, tokens, experts, slots):
    """onto_i + sum of weight * update over the slots that hold i, against loops."""
    routing = draw_routing(10, groups, tokens, experts, slots)
    onto = hidden_states(11, *groups, tokens, DIM)
    updates = hidden_states(12, experts, *groups, slots, DIM)
    expected = f64(onto).copy()
    for expert, *group, slot in np.ndindex(updates.shape[:-1]):
        token = int(routing.index[(*group, expert, slot)])
        if token < tokens:
            weight = float(routing.weight[(*group, expert, slot)])
            expected[(*group, token)] += weight * f64(updates)[(expert, *group, slot)]
    assert_close(mode.combine(updates, routing, onto=onto), expected)


@cases
def test_round_trip_multiplies_by_the_sum_of_weights(groups, tokens, experts, slots):
    """Dispatch, then combine onto zeros."""
    routing = draw_routing(20, groups, tokens, experts, slots)
    x = hidden_states(21, *groups, tokens, DIM)
    got = mode.combine(mode.dispatch(x, routing), routing, onto=jnp.zeros_like(x))
    total = np.zeros((*groups, tokens))
    for *group, expert, slot in np.ndindex(routing.index.shape):
        token = int(routing.index[(*group, expert, slot)])
        if token < tokens:
            total[(*group, token)] += float(routing.weight[(*group, expert, slot)])
    assert_close(got, f64(x) * total[..., None])


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_empty_slots_are_never_read(poison):
    """NaN or infinity in them changes no bit of the result, nor of gradients to others."""
    routing = draw_routing(30, (3,), 9, 4, 5)
    onto, updates = hidden_states(31, 3, 9, DIM), hidden_states(32, 4, 3, 5, DIM)
    empty = ~jnp.moveaxis(routing.filled, 1, 0)[..., None]
    assert 0 < int(empty.sum()) < empty.size

    @jax.jit
    def outcome(updates):
        def run(updates, onto):
            return mode.combine(updates, routing, onto=onto)

        gradient = jax.grad(lambda *z: jnp.sum(jnp.sin(run(*z))), (0, 1))(updates, onto)
        return run(updates, onto), gradient

    before = outcome(jnp.where(empty, 0, updates))
    after = outcome(jnp.where(empty, poison, updates))
    for one, other in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        assert np.isfinite(one).all()
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_tokens_without_a_slot_keep_their_bits(dtype):
    """Negative zeros, infinities, subnormals and NaN included; the sum is rounded once."""
    routing = draw_routing(40, (2,), 9, 1, 4)
    skipped = ~np.asarray(routing.selected).any(-1)
    onto = np.array(hidden_states(41, 2, 9, DIM).astype(dtype))
    tiny = float(jnp.finfo(dtype).smallest_normal)
    onto[skipped] = np.array([-0.0, 0.0, np.inf, -np.inf, np.nan, tiny, -3.0, 0.1], onto.dtype)
    updates = hidden_states(42, 1, 2, 4, DIM).astype(dtype)
    got = np.asarray(mode.combine(updates, routing, onto=jnp.asarray(onto)))
    assert got.dtype == onto.dtype
    assert got[skipped].tobytes() == onto[skipped].tobytes()
    wide = mode.combine(
        updates.astype(jnp.float32), routing, onto=jnp.asarray(onto).astype(jnp.float32)
    )
    np.testing.assert_array_equal(got[~skipped], np.asarray(wide.astype(dtype))[~skipped])


def make(key):
    """One expert."""
    return mode.GELU(DIM, 8, key=key)


def make_experts(**options):
    """Two experts around random weights."""
    return mode.MixtureOfExperts(make, DIM, 2, key=jax.random.key(2), **options)


@eqx.filter_jit
def make_layers():
    """Each kind of layer."""
    block = mode.TransformerBlock(DIM, 2, key=jax.random.key(0))
    options = {"key": jax.random.key(1)}
    predictor = mode.Predictor(DIM, key=jax.random.key(3))
    return {
        "dense": mode.Residual(block),
        "depths": mode.MixtureOfDepths(block, DIM, 0.5, predictor=predictor, **options),
        "depths full": mode.MixtureOfDepths(block, DIM, 1.0, gate=mode.Sigmoid(), **options),
        "experts": mode.Residual(make_experts(num_shared=1)),
        "experts alone": make_experts(num_shared=1),
        "experts tanh": mode.Residual(make_experts(gate=mode.Tanh(), capacity_factor=2.0)),
        "selected softmax": mode.Residual(
            make_experts(select=mode.TokenChoice(2), gate=mode.SelectedSoftmax())
        ),
        "staged": mode.staged_mode(make, DIM, 2, 2, capacity=0.5, **options),
        "integrated": mode.integrated_mode(
            make, DIM, 2, 2, 1, select=mode.TokenChoice(1), **options
        ),
        "causal": mode.causal(mode.MixtureOfDepths(block, DIM, 0.5, **options)),
        "module": mode.MixtureOfDepths(mode.Delta(lambda x: x + jnp.tanh(x)), DIM, **options),
    }


LAYERS = make_layers()


@pytest.mark.parametrize("name", LAYERS)
def test_padding_reaches_neither_outputs_nor_gradients(name):
    """Real tokens, routings, losses and every gradient are the same bits as over zeros."""
    layer = LAYERS[name]
    info = padded_info(12, 5, 0, tokens=12)
    real = info.valid[..., None]
    x = hidden_states(50, 3, 12, DIM)

    @eqx.filter_jit
    def outcome(layer, x):
        def loss(both):
            layer, x = both
            hidden, routings = layer(x, info)
            extra = sum(mode.router_z_loss(r) + mode.router_bce(r) for r in routings)
            total = jnp.sum(jnp.sin(jnp.where(real, hidden, 0))) + extra
            return total, (jnp.where(real, hidden, 0), routings)

        gradient, result = eqx.filter_grad(loss, has_aux=True)((layer, x))
        return gradient, result, mode.update_state(layer, result[1])

    before = outcome(layer, jnp.where(real, x, 0))
    for poison in (np.nan, np.inf):
        after = outcome(layer, jnp.where(real, x, poison))
        leaves = [jax.tree.leaves(eqx.filter(z, eqx.is_array)) for z in (before, after)]
        for one, other in zip(*leaves, strict=True):
            assert np.isfinite(np.asarray(one, np.float32)).all()
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("name", [name for name in LAYERS if name != "experts alone"])
def test_padding_passes_by_unchanged(name):
    """A layer returns the bits of padded positions as it got them."""
    info = padded_info(12, 5, 0, tokens=12)
    padding = ~np.asarray(info.valid)
    x = hidden_states(60, 3, 12, DIM)
    hidden, _ = run(LAYERS[name], x, info)
    assert np.asarray(hidden)[padding].tobytes() == np.asarray(x)[padding].tobytes()


def test_skipped_tokens_are_not_keys():
    """Changing a skipped token that stays skipped changes no other token's bits."""
    layer = LAYERS["depths"]
    x = hidden_states(70, 1, 12, DIM)
    before, (routing,) = run(layer, x)
    skipped = ~routing.selected.any(-1)[..., None]
    # Orthogonal to the router's weights, so that no score moves by more than its rounding.
    direction = layer.router.scorer.weight[:, 0]
    noise = hidden_states(71, 1, 12, DIM)
    along = jnp.einsum("gtd,d->gt", noise, direction) / jnp.sum(direction**2)
    noise = noise - along[..., None] * direction[None, None]
    after, (moved,) = run(layer, jnp.where(skipped, x + noise, x))
    np.testing.assert_array_equal(moved.index, routing.index)
    chosen = ~np.asarray(skipped)[..., 0]
    assert np.asarray(before)[chosen].tobytes() == np.asarray(after)[chosen].tobytes()


def test_blocks_see_true_positions_of_what_was_gathered():
    """Tokens inserted between the selected ones and skipped change distances, and nothing else."""
    layer = mode.MixtureOfDepths(
        LAYERS["dense"].block,
        DIM,
        0.5,
        select=mode.Threshold(mode.ByLogit()),
        key=jax.random.key(4),
    )
    layer = eqx.tree_at(lambda m: m.router.scorer.weight, layer, jnp.zeros((DIM, 1)).at[0].set(1.0))
    chosen = hidden_states(80, 4, DIM).at[:, 0].set(1.0)
    positions = jnp.asarray([1, 4, 5, 9])
    spread = hidden_states(81, 10, DIM).at[:, 0].set(-1.0).at[positions].set(chosen)
    hidden, (routing,) = run(layer, spread)
    assert routing.index[0, :4].tolist() == [1, 4, 5, 9]
    dense = mode.Residual(layer.block)
    told = run(dense, chosen, mode.TokenInfo(positions.astype(jnp.int32), jnp.ones(4, jnp.int32)))[
        0
    ]
    assert_close(hidden[positions], told)
    assert np.abs(told - run(dense, chosen)[0]).max() > 1e-3


def test_packed_documents_do_not_see_each_other():
    """Inside the block a document's selected tokens attend to their own document alone."""
    layer = mode.MixtureOfDepths(LAYERS["dense"].block, DIM, 1.0, key=jax.random.key(5))
    info = packed_info((5, 7), tokens=12)
    x = hidden_states(90, 1, 12, DIM)
    together, _ = run(layer, x, info)
    for part in (slice(0, 5), slice(5, 12)):
        alone, _ = run(layer, x[:, part])
        assert_close(together[:, part], alone)
