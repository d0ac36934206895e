"""What a block inside Mixture-of-Depths sees: the selected tokens, where they stood."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mode
from tests.helpers import assert_close, hidden_states, packed_info, run
from tests.routing.draws import scorer_weight


pytestmark = pytest.mark.optimized


DIM = 8
BLOCK = mode.TransformerBlock(DIM, 2, key=jax.random.key(0))


def test_skipped_tokens_are_not_keys() -> None:
    """Changing a skipped token that stays skipped changes no other token's bits."""
    layer = mode.MixtureOfDepths(BLOCK, DIM, 0.5, key=jax.random.key(1))
    x = hidden_states(70, 1, 12, DIM)
    before, (routing,) = run(layer, x)
    skipped = ~routing.selected.any(-1)[..., None]
    # Orthogonal to the router's weights, so that no score moves by more than its rounding.
    direction = scorer_weight(layer.router)[:, 0]
    noise = hidden_states(71, 1, 12, DIM)
    along = jnp.einsum("gtd,d->gt", noise, direction) / jnp.sum(direction**2)
    noise = noise - along[..., None] * direction[None, None]
    after, (moved,) = run(layer, jnp.where(skipped, x + noise, x))
    np.testing.assert_array_equal(moved.index, routing.index)
    chosen = ~np.asarray(skipped)[..., 0]
    assert np.asarray(before)[chosen].tobytes() == np.asarray(after)[chosen].tobytes()


def test_blocks_see_true_positions_of_the_gathered_tokens() -> None:
    """Skipped tokens between the selected ones change distances, and nothing else."""
    layer = mode.MixtureOfDepths(
        BLOCK, DIM, 0.5, select=mode.LogitThreshold(), key=jax.random.key(4)
    )
    layer = eqx.tree_at(lambda m: m.router.scorer.weight, layer, jnp.zeros((DIM, 1)).at[0].set(1.0))
    chosen = hidden_states(80, 4, DIM).at[:, 0].set(1.0)
    positions = jnp.asarray([1, 4, 5, 9])
    spread = hidden_states(81, 10, DIM).at[:, 0].set(-1.0).at[positions].set(chosen)
    hidden, (routing,) = run(layer, spread)
    assert routing.index[0, :4].tolist() == [1, 4, 5, 9]
    dense = mode.Residual(BLOCK)
    info = mode.TokenInfo(positions.astype(jnp.int32), jnp.ones(4, jnp.int32))
    expected, _ = run(dense, chosen, info)
    assert_close(hidden[positions], expected)
    neighbours, _ = run(dense, chosen)
    assert np.abs(expected - neighbours).max() > 1e-3


def test_packed_documents_do_not_see_each_other() -> None:
    """Inside the block a document's selected tokens attend to their own document alone."""
    layer = mode.MixtureOfDepths(BLOCK, DIM, 1.0, key=jax.random.key(5))
    x = hidden_states(90, 1, 12, DIM)
    together, _ = run(layer, x, packed_info((5, 7), tokens=12))
    for part in (slice(0, 5), slice(5, 12)):
        alone, _ = run(layer, x[:, part])
        assert_close(together[:, part], alone)
