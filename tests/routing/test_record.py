"""The record of a routing, and the order in which slots are filled."""

import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mode
from tests import reference as ref
from tests.helpers import hidden_states, packed_info
from tests.routing.draws import DIM, make_router


TOKENS = 11
INFO = packed_info((6, 4), (5,), tokens=TOKENS)
X = hidden_states(1, 2, TOKENS, DIM)


@pytest.mark.parametrize("slots", [0, 1, 3, 6])
def test_first_come_first_served_up_to_the_free_slots(slots: int) -> None:
    """The first of the tokens that requested an expert, never more than are free."""
    requested = np.array([[[1, 0], [0, 0], [1, 1], [1, 0], [0, 1], [1, 1]]], bool)
    for free in itertools.product(range(4), repeat=2):
        index = mode.first_come_first_served(
            jnp.asarray(requested), slots, jnp.asarray([free], jnp.int32)
        )
        for expert in range(2):
            first = np.flatnonzero(requested[0, :, expert])[: min(slots, free[expert])].tolist()
            assert index[0, expert].tolist() == first + [6] * (slots - len(first))


def test_a_masked_routing_holds_nothing_where_keep_is_false() -> None:
    """Empty slots, zeros and padding there; every other group as it was; also under a scan."""
    routing = make_router(7, num_noop=1)(
        jnp.tile(X[:1], (3, 1, 1)), mode.TokenInfo.plain((3, TOKENS))
    )
    keep = jnp.array([True, False, True])
    masked = routing.masked(keep)
    for got, old in zip(jax.tree.leaves(masked), jax.tree.leaves(routing), strict=True):
        assert got.dtype == old.dtype
        np.testing.assert_array_equal(got[::2], old[::2])
    assert (masked.index[1] == TOKENS).all()
    assert not masked.selected[1].any()
    assert not any(leaf[1].any() for leaf in jax.tree.leaves(masked)[1:])
    assert [int(n[1]) for n in (masked.num_filled, masked.num_dropped, masked.num_noop)] == [0] * 3
    assert masked.num_padding.tolist() == [0, TOKENS, 0]
    alone = eqx.tree_at(lambda r: r.predictor, routing, None, is_leaf=lambda leaf: leaf is None)
    assert alone.masked(keep).predictor is None


def test_selected_mask_is_the_index_read_the_other_way() -> None:
    """`selected` and `filled` agree with the slots."""
    routing = make_router(9)(X, INFO)
    for group in range(2):
        expected = ref.selected_mask(np.asarray(routing.index[group]), TOKENS)
        np.testing.assert_array_equal(routing.selected[group], expected)
        assert int(routing.num_filled[group]) == expected.sum()
    np.testing.assert_array_equal(routing.filled, np.asarray(routing.index) < TOKENS)
