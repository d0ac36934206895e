"""What several test files share: seeds, tolerances, and small layers to test."""

import jax
import numpy as np
from jaxtyping import PyTree


# Relative and absolute, per dtype of the result: the one place where tolerances are set.
TOLERANCE = {
    "float64": 1e-9,
    "float32": 2e-5,
    "float16": 4e-3,
    "bfloat16": 3e-2,
}


def assert_close(actual: PyTree, expected: PyTree, *, scale: float = 1.0) -> None:
    """Equal shapes, and equal numbers up to what the dtype of `actual` can hold.

    `scale` widens the tolerance for results that are sums of many terms of that size.
    """
    actual_leaves, actual_tree = jax.tree.flatten(actual)
    expected_leaves, expected_tree = jax.tree.flatten(expected)
    assert actual_tree == expected_tree
    for one, other in zip(actual_leaves, expected_leaves, strict=True):
        one, other = np.asarray(one), np.asarray(other)
        assert one.shape == other.shape, (one.shape, other.shape)
        tolerance = scale * TOLERANCE.get(str(one.dtype), 0)
        np.testing.assert_allclose(
            one.astype(np.float64), other.astype(np.float64), rtol=tolerance, atol=tolerance
        )
