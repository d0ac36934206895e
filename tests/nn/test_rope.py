"""Rotary embeddings at original positions, against the oracle."""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array

import mode
from tests import reference as ref
from tests.helpers import assert_close, f64, rng


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


def test_a_linear_scaling_is_a_division_of_positions() -> None:
    x = jnp.asarray(rng(120).normal(size=(6, 2, 8)), jnp.float32)
    positions = jnp.arange(0, 24, 4, dtype=jnp.int32)
    scaled = mode.rope(x, positions, scaling=mode.LinearRopeScaling(4.0))
    assert_close(scaled, mode.rope(x, positions // 4), scale=4)


def test_the_scaling_of_llama_3_keeps_short_waves_and_stretches_long_ones() -> None:
    """Frequencies that turn more than 4 times in 64 positions stay; below once, they are divided
    by 8; between, they are blended."""
    frequency = np.array([2.0, 0.5, 0.2, 0.09, 0.01])
    scaled = mode.Llama3RopeScaling(8.0, original_max_positions=64)(
        jnp.asarray(frequency, jnp.float32)
    )
    turns = 64 * frequency / (2 * np.pi)
    assert (turns > 4).tolist() == [True, True, False, False, False]
    assert (turns < 1).tolist() == [False, False, False, True, True]
    kept = (turns[2] - 1) / 3
    middle = (1 - kept) * frequency[2] / 8 + kept * frequency[2]
    assert_close(scaled, np.array([2.0, 0.5, middle, 0.09 / 8, 0.01 / 8]))


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: mode.LinearRopeScaling(0.0), "factor"),
        (lambda: mode.LinearRopeScaling(float("nan")), "factor"),
        (lambda: mode.Llama3RopeScaling(8.0, 4.0, 4.0), "low_freq_factor"),
        (lambda: mode.Llama3RopeScaling(8.0, original_max_positions=0), "original_max_positions"),
    ],
)
def test_scalings_of_bad_numbers(make: Callable[[], object], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make()
