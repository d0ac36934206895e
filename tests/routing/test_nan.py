"""A token whose score is NaN comes after all numbers and before padding, whatever the NaN's sign.

On x86, inf - inf is a NaN with its sign bit set, and 0 / 0 written as a constant has it not.
Tried of this kind: expert choice and random ties, token choice, thresholds, several experts, all
tokens NaN, fewer real tokens than slots.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array, Float

import mode
from tests.helpers import padded_info


NAN = np.float32(np.nan)
NANS = {"positive": np.copysign(NAN, np.float32(1)), "negative": np.copysign(NAN, np.float32(-1))}


def routed(
    scores: Float[np.ndarray, "tokens choices"],
    real: int,
    select: mode.AbstractSelector,
    *,
    capacity: float,
    noop: int = 0,
) -> mode.Routing:
    """Routes tokens whose features are their logits."""
    tokens, choices = scores.shape
    router = mode.Router(
        choices,
        choices - noop,
        num_noop=noop,
        capacity=capacity,
        select=select,
        gate=mode.IdentityGate(),
        key=jax.random.key(0),
    )
    copies = lambda x: x  # noqa: E731
    router = eqx.tree_at(lambda r: r.scorer, router, copies)
    return router(jnp.asarray(scores)[None], padded_info(real, tokens=tokens))


@pytest.mark.parametrize("sign", NANS)
def test_expert_choice(sign: str) -> None:
    """Two NaN tokens, three numbers, three paddings: four slots take the numbers and one NaN."""
    scores = np.array([NANS[sign], 0.5, -3.0, NANS[sign], 2.0, 9.0, 9.0, 9.0], np.float32)[:, None]
    assert routed(scores, 5, mode.ExpertChoice(), capacity=0.5).index.tolist() == [[[0, 1, 2, 4]]]
    assert routed(scores, 5, mode.ExpertChoice(), capacity=0.25).index.tolist() == [[[1, 4]]]
    # As many slots as min(slots, real tokens) are filled.
    assert routed(scores, 5, mode.ExpertChoice(), capacity=0.75).num_filled.tolist() == [5]
    every = np.full((8, 1), NANS[sign])
    assert routed(every, 8, mode.ExpertChoice(), capacity=0.5).index.tolist() == [[[0, 1, 2, 3]]]


@pytest.mark.parametrize("sign", NANS)
def test_several_experts(sign: str) -> None:
    """A NaN for one expert says nothing to the other."""
    scores = np.array([[NANS[sign], 3], [1, NANS[sign]], [0, 0], [2, 1]], np.float32)
    routing = routed(scores, 4, mode.ExpertChoice(), capacity=0.5)
    assert routing.index.tolist() == [[[1, 3], [0, 3]]]


@pytest.mark.parametrize("sign", NANS)
def test_token_choice(sign: str) -> None:
    """A choice that scores NaN is never chosen; the token takes its other ones."""
    scores = np.array([[NANS[sign], 1, 0], [2, 1, NANS[sign]], [NANS[sign]] * 3], np.float32)
    routing = routed(scores, 3, mode.TokenChoice(2), capacity=1.0, noop=1)
    assert routing.selected[0].tolist() == [[False, True], [True, True], [False, False]]
    assert routing.load.tolist() == [[1, 2, 1]]


@pytest.mark.parametrize("sign", NANS)
def test_thresholds(sign: str) -> None:
    """A NaN is above no threshold."""
    scores = np.array([NANS[sign], 1.0, -1.0], np.float32)[:, None]
    for select in (mode.QuantileThreshold(), mode.LogitThreshold()):
        assert routed(scores, 3, select, capacity=1.0).selected[0, :, 0].tolist() == [
            False,
            True,
            False,
        ]


@pytest.mark.parametrize("sign", NANS)
def test_router_state_ignores_a_step_with_nan(sign: str) -> None:
    """One such token would otherwise decide the threshold for good."""
    router = mode.Router(
        1, capacity=0.5, select=mode.ExpertChoice(), gate=mode.IdentityGate(), key=jax.random.key(0)
    )
    scores = np.array([NANS[sign], 1.0, -1.0, 0.0], np.float32)[:, None]
    routing = routed(scores, 4, mode.ExpertChoice(), capacity=0.5)
    state = mode.update_router_state(router, (routing,)).state
    assert (state.threshold.item(), state.updates.item()) == (0, 0)


def as_bits(x: Float[Array, "..."]) -> np.ndarray:
    """The bits of a float, of which the first is the sign."""
    return np.asarray(x).view(np.uint32) >> 31


def test_the_two_signs_are_two() -> None:
    """The inputs above are what they say."""
    assert [int(as_bits(nan)) for nan in NANS.values()] == [0, 1]
