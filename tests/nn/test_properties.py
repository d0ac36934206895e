"""What holds for every tie, padding and packing that hypothesis finds."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from hypothesis.extra import numpy as hnp
from jaxtyping import Array, PRNGKeyArray
from numpy.typing import NDArray

import mode
from tests.helpers import assert_close, run


pytestmark = pytest.mark.optimized


DIM = 4
few = settings(deadline=None, derandomize=True, max_examples=20)

# Two shapes, so that most examples run a program that is compiled already; data varies freely.
SHAPES = [((3,), 8), ((2, 2), 5)]


def segments_of(shape: tuple[int, ...]) -> st.SearchStrategy[Any]:
    """Documents of any lengths with padding anywhere, mostly little of it."""
    return hnp.arrays(np.int32, shape, elements=st.sampled_from([1, 1, 2, 2, 3, 0]))


def states_of(shape: tuple[int, ...]) -> st.SearchStrategy[Any]:
    """Hidden states on a grid: many tokens are equal to others."""
    return hnp.arrays(np.float32, shape, elements=st.sampled_from([-1.0, -0.25, 0.0, 0.5, 1.0]))


@st.composite
def inputs(draw: Any) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """Hidden states and segment ids."""
    groups, tokens = draw(st.sampled_from(SHAPES))
    segments = np.sort(draw(segments_of((*groups, tokens))), axis=-1)
    # Padding behind the documents or before them.
    segments = segments if draw(st.booleans()) else segments[..., ::-1].copy()
    return draw(states_of((*groups, tokens, DIM))), segments


def make_layer(kind: str) -> Any:
    """A routed layer around a block that mixes tokens."""
    key = jax.random.key(0)
    if kind == "experts":

        def make(key: PRNGKeyArray) -> mode.GELUFeedForward:
            return mode.GELUFeedForward(DIM, 4, key=key)

        select = mode.TokenChoice(1)
        return mode.Residual(
            mode.MixtureOfExperts(make, DIM, 2, num_noop=1, select=select, key=key)
        )
    block = mode.TransformerBlock(DIM, 2, key=key)
    return mode.MixtureOfDepths(block, DIM, 0.5, gate=mode.SigmoidGate(), key=jax.random.key(1))


def over_groups(layer: Any, x: Array, info: mode.TokenInfo) -> Any:
    """The layer, group by group."""
    return jax.vmap(layer)(x, info)


layers = st.sampled_from([make_layer("depths"), make_layer("experts")])
Drawn = tuple[NDArray[np.float32], NDArray[np.int32]]


def arrays(drawn: Drawn) -> tuple[Array, mode.TokenInfo]:
    """Hidden states and their info, as layers take them."""
    x, segments = drawn
    return jnp.asarray(x), mode.TokenInfo.packed(jnp.asarray(segments))


@few
@given(layers, inputs())
def test_tokens_that_no_expert_selected_keep_their_bits(layer: Any, drawn: Drawn) -> None:
    """Skipped, dropped, sent to a no-op or padding: out as they came in."""
    x, info = arrays(drawn)
    hidden, (routing,) = run(layer, x, info)
    skipped = ~np.asarray(routing.selected).any(-1)
    assert np.asarray(hidden)[skipped].tobytes() == np.asarray(x)[skipped].tobytes()
    assert not np.asarray(routing.weight)[~np.asarray(routing.filled)].any()
    assert np.isfinite(hidden).all()


@few
@given(layers, inputs())
def test_vmap_over_the_groups_is_the_batch(layer: Any, drawn: Drawn) -> None:
    """The same assignments exactly, and the same numbers."""
    x, info = arrays(drawn)
    hidden, (routing,) = run(layer, x, info)
    mapped, (each,) = run(over_groups, layer, x, info)
    np.testing.assert_array_equal(each.index, routing.index)
    np.testing.assert_array_equal(each.load, routing.load)
    assert_close((mapped, each.weight), (hidden, routing.weight))


@few
@given(layers, inputs(), st.randoms(use_true_random=False))
def test_sequences_are_independent(layer: Any, drawn: Drawn, random: Any) -> None:
    """Reordering the groups reorders the results; replacing the others changes no bit of one."""
    x, info = arrays(drawn)
    order = list(range(x.shape[0]))
    random.shuffle(order)
    shuffled = jax.tree.map(lambda leaf: leaf[np.array(order)], (x, info))
    expected, (routing,) = run(layer, x, info)
    hidden, (moved,) = run(layer, *shuffled)
    np.testing.assert_array_equal(moved.index, np.asarray(routing.index)[order])
    assert_close(hidden, np.asarray(expected)[order])
    others = jnp.where(jnp.arange(len(x)).reshape(-1, *[1] * (x.ndim - 1)) == 0, x, 3 - x)
    alone, _ = run(layer, others, info)
    assert np.asarray(alone[0]).tobytes() == np.asarray(expected[0]).tobytes()


@settings(few, max_examples=40)
@given(hnp.arrays(np.int32, (2, 9), elements=st.integers(0, 3)))
def test_packed_positions_count_from_the_start_of_each_document(segments: Any) -> None:
    """Positions restart where the segment changes, and are 0 in padding."""
    info = run(mode.TokenInfo.packed, jnp.asarray(segments))
    for row, positions in zip(segments, np.asarray(info.positions), strict=True):
        count = 0
        for at, segment in enumerate(row):
            count = 0 if at == 0 or segment != row[at - 1] else count + 1
            assert positions[at] == (count if segment else 0)
    np.testing.assert_array_equal(info.valid, segments != 0)
