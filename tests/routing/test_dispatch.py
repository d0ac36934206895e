"""Slots out and back, and that padding and empty slots reach no real token."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array

import mode
from tests.helpers import assert_close, f64, hidden_states, padded_info, rng
from tests.routing.draws import DIM, GATES, make_router


def draw_slots(
    seed: int, groups: tuple[int, ...], tokens: int, experts: int, slots: int
) -> mode.Routing:
    """Random distinct tokens per expert in time order, some slots empty, random weights."""
    draws = rng(seed)
    index = np.full((*groups, experts, slots), tokens, np.int32)
    for row in np.ndindex(index.shape[:-1]):
        chosen = draws.permutation(tokens)[: draws.integers(0, slots + 1)]
        index[row][: len(chosen)] = np.sort(chosen)
    weight = np.where(index < tokens, draws.normal(size=index.shape), 0).astype(np.float32)
    return mode.Routing(
        index=jnp.asarray(index),
        weight=jnp.asarray(weight),
        logits=jnp.zeros((*groups, tokens, experts)),
        load=jnp.sum(index < tokens, axis=-1, dtype=jnp.int32),
        valid=jnp.ones((*groups, tokens), bool),
        predictor=None,
    )


CASES = [((), 6, 1, 3), ((4,), 6, 1, 6), ((3,), 9, 4, 2), ((2, 3), 5, 2, 5), ((9,), 1, 2, 1)]
cases = pytest.mark.parametrize(("groups", "tokens", "experts", "slots"), CASES)


@cases
def test_dispatch_gathers_and_leaves_zeros(
    groups: tuple[int, ...], tokens: int, experts: int, slots: int
) -> None:
    """Every slot holds its token's features and info; an empty one zeros and padding."""
    routing = draw_slots(0, groups, tokens, experts, slots)
    x = hidden_states(1, *groups, tokens, DIM)
    info = mode.TokenInfo(
        jnp.asarray(rng(2).integers(0, 99, (*groups, tokens)), jnp.int32),
        jnp.asarray(rng(3).integers(1, 5, (*groups, tokens)), jnp.int32),
    )
    got, got_info = mode.dispatch(x, routing), mode.dispatch_info(info, routing)
    assert got.shape == (experts, *groups, slots, DIM)
    for expert, *group, slot in np.ndindex(got.shape[:-1]):
        token = int(routing.index[(*group, expert, slot)])
        target, source = (expert, *group, slot), (*group, token)
        empty = token == tokens
        expected = np.zeros(DIM) if empty else np.asarray(x[source])
        np.testing.assert_array_equal(got[target], expected)
        assert int(got_info.positions[target]) == (0 if empty else info.positions[source])
        assert int(got_info.segment_ids[target]) == (0 if empty else info.segment_ids[source])


@cases
def test_combine_adds_weighted_updates(
    groups: tuple[int, ...], tokens: int, experts: int, slots: int
) -> None:
    """onto_i + sum of weight * update over the slots that hold i, against loops."""
    routing = draw_slots(10, groups, tokens, experts, slots)
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
def test_round_trip_multiplies_by_the_sum_of_weights(
    groups: tuple[int, ...], tokens: int, experts: int, slots: int
) -> None:
    """Dispatch, then combine onto zeros."""
    routing = draw_slots(20, groups, tokens, experts, slots)
    x = hidden_states(21, *groups, tokens, DIM)
    got = mode.combine(mode.dispatch(x, routing), routing, onto=jnp.zeros_like(x))
    total = np.zeros((*groups, tokens))
    for *group, expert, slot in np.ndindex(routing.index.shape):
        token = int(routing.index[(*group, expert, slot)])
        if token < tokens:
            total[(*group, token)] += float(routing.weight[(*group, expert, slot)])
    assert_close(got, f64(x) * total[..., None])


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_empty_slots_are_never_read(poison: float) -> None:
    """NaN or infinity in them changes no bit of the result, nor of gradients to others."""
    routing = draw_slots(30, (3,), 9, 4, 5)
    onto, updates = hidden_states(31, 3, 9, DIM), hidden_states(32, 4, 3, 5, DIM)
    empty = ~jnp.moveaxis(routing.filled, 1, 0)[..., None]
    assert 0 < int(empty.sum()) < empty.size

    @jax.jit
    def outcome(updates: Array) -> tuple[Array, tuple[Array, Array]]:
        def loss(updates: Array, onto: Array) -> Array:
            return jnp.sum(jnp.sin(mode.combine(updates, routing, onto=onto)))

        gradient = jax.grad(loss, (0, 1))(updates, onto)
        return mode.combine(updates, routing, onto=onto), gradient

    before = outcome(jnp.where(empty, 0, updates))
    after = outcome(jnp.where(empty, poison, updates))
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        assert np.isfinite(old).all()
        assert np.asarray(old).tobytes() == np.asarray(new).tobytes()


@pytest.mark.optimized
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_tokens_without_a_slot_keep_their_bits(dtype: jnp.dtype) -> None:
    """Negative zeros, infinities, subnormals and NaN included; the sum is rounded once."""
    routing = draw_slots(40, (2,), 9, 1, 4)
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


@pytest.mark.optimized
@pytest.mark.parametrize(
    ("select", "gate"),
    [
        *[(mode.ExpertChoice(), gate) for gate in GATES],
        (mode.TokenChoice(2), "selected softmax"),
        (mode.QuantileThreshold(), "softmax"),
        (mode.PredictorThreshold(), "sigmoid"),
        (mode.Strided(), "tanh"),
    ],
    ids=str,
)
def test_padding_reaches_neither_routings_nor_gradients(
    select: mode.AbstractSelector, gate: str
) -> None:
    """Real tokens, routings, losses and every gradient are the same bits as over zeros."""
    router = make_router(50, select=select, gate=GATES[gate][0])
    info = padded_info(12, 5, 0, tokens=12)
    real = info.valid[..., None]
    x = hidden_states(51, 3, 12, DIM)

    @eqx.filter_jit
    def outcome(
        router: mode.Router, x: Array
    ) -> tuple[tuple[mode.Router, Array], tuple[Array, mode.Routing], mode.Router]:
        def loss(both: tuple[mode.Router, Array]) -> tuple[Array, tuple[Array, mode.Routing]]:
            router, x = both
            routing = router(x, info)
            hidden = mode.combine(jnp.sin(mode.dispatch(x, routing)), routing, onto=x)
            hidden = jnp.where(real, hidden, 0)
            extra = mode.router_z_loss(routing) + mode.router_bce(routing)
            extra += mode.predictor_bce(routing) + mode.load_balance_loss(routing)
            return jnp.sum(jnp.sin(hidden)) + extra, (hidden, routing)

        gradient, result = eqx.filter_grad(loss, has_aux=True)((router, x))
        return gradient, result, mode.update_router_state(router, (result[1],))

    before = outcome(router, jnp.where(real, x, 0))
    for poison in (np.nan, np.inf):
        after = outcome(router, jnp.where(real, x, poison))
        leaves = [jax.tree.leaves(eqx.filter(z, eqx.is_array)) for z in (before, after)]
        for old, new in zip(*leaves, strict=True):
            assert np.isfinite(np.asarray(old, np.float32)).all()
            np.testing.assert_array_equal(old, new)
