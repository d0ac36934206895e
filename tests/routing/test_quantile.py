"""The quantile of scores that thresholds follow, against a sort and by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from mode.routing._quantile import nth_largest, score_quantile
from tests.helpers import rng, run


@pytest.mark.parametrize("count", [1, 2, 7, 24, 40])
def test_the_nth_largest_is_that_of_a_sort(count: int) -> None:
    """Bit for bit, of large and tiny numbers, ties, both zeros and infinities."""
    values = rng(count).normal(size=(40, 6)) * 10.0 ** np.array([-36, -8, 0, 0, 9, 38])
    values = np.clip(values, -3e38, 3e38).astype(np.float32)
    values[:, 2] = np.round(values[:, 2])
    values[::3, 3] = -0.0
    values[::5, 4] = -np.inf
    values[::4, 5] = np.inf
    nth = run(nth_largest, jnp.asarray(values), jnp.asarray(count))
    np.testing.assert_array_equal(nth[0], -np.sort(-values, axis=0)[count - 1])
    values[7, 1] = np.nan
    assert np.isnan(run(nth_largest, jnp.asarray(values), jnp.asarray(count))[0, 1])


@pytest.mark.parametrize(
    ("capacity", "scores", "expected"),
    [
        (0.5, [4.0, 1.0, 3.0, 2.0], 2.5),  # half way between the second and the third
        (0.01, [4.0, 1.0, 3.0, 2.0], 3.5),  # one token is the least
        (0.9, [4.0, 1.0, 3.0, 2.0], 1.0),  # all four by rounding: their minimum
        (1.0, [4.0, 1.0, 3.0, 2.0], float(np.finfo(np.float32).min)),
        (0.5, [2.0, 2.0, 2.0, 1.0], 2.0),  # a tie at the cut
    ],
)
def test_the_quantile_of_a_few_scores(
    capacity: float, scores: list[float], expected: float
) -> None:
    """By hand, with a padded token that scores best."""
    values = jnp.asarray([*scores, 100.0])[:, None]
    valid = jnp.asarray([True] * len(scores) + [False])
    assert score_quantile(values, valid, capacity).tolist() == [expected]
