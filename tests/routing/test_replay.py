"""`Replay`: recorded assignments, live weights."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mode
from tests import reference as ref
from tests.helpers import assert_close, hidden_states, run
from tests.routing.draws import DIM, make_router, oracle_logits, selector_inputs


@pytest.mark.parametrize(
    "select", [mode.ExpertChoice(), mode.TokenChoice(2), mode.RandomChoice(), mode.Strided()]
)
def test_replay_repeats_the_assignments_with_live_weights(select: mode.AbstractSelector) -> None:
    """Another router under `Replay` fills the recorded slots with weights of its own.

    The replaying router has another capacity: the record's slots count.
    """
    gate = mode.SoftmaxGate()
    recording = make_router(0, num_noop=2, select=select, gate=gate)
    x, info = hidden_states(70, 2, 12, DIM), mode.TokenInfo.plain((2, 12))
    recorded = run(recording, x, info, key=jax.random.key(2))
    replaying = make_router(1, num_noop=2, capacity=0.75, select=mode.Replay(recorded), gate=gate)
    replayed = run(replaying, x, info)
    np.testing.assert_array_equal(replayed.index, recorded.index)
    np.testing.assert_array_equal(replayed.load, recorded.load)
    for group in range(2):
        logits = oracle_logits(replaying, x[group])
        index = np.asarray(recorded.index[group])
        assert_close(replayed.weight[group], ref.combine_weights(logits, index, "softmax"))


def test_replay_never_selects_padding() -> None:
    """Recorded tokens that are padding now leave their slots empty, at the end of the row."""
    scores, valid = np.arange(6.0)[:, None], np.ones(6, bool)
    router = make_router(0, num_experts=1, predictor=None)
    info = mode.TokenInfo.plain((6,))
    recorded = router(hidden_states(0, 6, DIM), info, slots=4)
    recorded = eqx.tree_at(lambda r: r.index, recorded, jnp.array([[0, 2, 3, 6]], jnp.int32))
    valid[2] = False
    got = mode.Replay(recorded)(selector_inputs(scores, valid, 1, 4))
    assert got.index.tolist() == [[0, 3, 6, 6]]
