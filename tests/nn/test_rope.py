"""Rotary embeddings at original positions, against the oracle."""

import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array

import mode
from tests import reference as ref
from tests.helpers import assert_close, f64, rng


QUICK = True


@pytest.mark.parametrize("theta", [100.0, 10_000.0])
def test_rope_at_any_positions(theta: float) -> None:
    """Positions need be neither consecutive nor start at 0, and differ between sequences."""
    x = jnp.asarray(rng(100).normal(size=(2, 6, 3, 8)), jnp.float32)
    positions = jnp.asarray([[0, 1, 5, 9, 200, 4000], [3, 0, 1, 2, 0, 1]], jnp.int32)
    expected = ref.over_groups(lambda x, p: ref.rope(x, p, theta), 1, f64(x), np.asarray(positions))
    # Float32 angles of 4,000 radians are good to 2e-4.
    assert_close(mode.rope(x, positions, theta), expected, scale=30)


def test_rope_makes_scores_depend_on_distances_alone() -> None:
    """Shifting all positions by the same amount leaves every product of a query and a key."""
    q, k = (jnp.asarray(rng(110 + i).normal(size=(5, 2, 8)), jnp.float32) for i in range(2))
    positions = jnp.asarray([0, 2, 3, 7, 30], jnp.int32)

    def products(shift: int) -> Array:
        at = positions + shift
        return jnp.einsum("qhd,khd->hqk", mode.rope(q, at), mode.rope(k, at))

    assert_close(products(50), products(0), scale=4)
