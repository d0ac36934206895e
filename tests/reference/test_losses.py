"""The oracle's losses, metrics and router state, against numbers worked out by hand."""

import numpy as np
import pytest

from tests import reference as ref


def column(*scores: float) -> ref.Floats:
    """One expert's scores, a row per token."""
    return np.array(scores, dtype=np.float64).reshape(-1, 1)


def all_valid(num_tokens: int) -> ref.Bools:
    return np.ones(num_tokens, dtype=bool)


def test_losses() -> None:
    """Two groups of two tokens, two choices; the last token is padding.

    Exponentials (1, 3), (1, 1) and (3, 1): logsumexps log 4, log 2, log 4.
    Group 0: P = (1/4 + 1/2, 3/4 + 1/2) / 2 = (3/8, 5/8), load (1, 3): 2 * (3/32 + 15/32) = 9/8.
    Group 1: P = (3/4, 1/4), load (1, 0): 2 * 3/4 = 3/2. Mean 21/16.
    """
    logits = np.log([[[1.0, 3.0], [1.0, 1.0]], [[3.0, 1.0], [1.0, 1.0]]])
    logits[1, 1] = np.nan
    valid = np.array([[True, True], [True, False]])
    assert ref.router_z_loss(logits, valid) == pytest.approx(np.log(2) ** 2 * (4 + 1 + 4) / 3)
    load = np.array([[1, 3], [1, 0]])
    assert ref.load_balance_loss(logits, load, valid) == pytest.approx(21 / 16)
    nobody = np.array([[True, True], [False, False]])
    assert ref.load_balance_loss(logits, load, nobody) == pytest.approx(9 / 8)
    entropy = 2 * (np.log(4) - 0.75 * np.log(3)) + np.log(2)
    assert ref.router_entropy(logits, valid) == pytest.approx(entropy / 3)


def test_selection_bce_and_metrics() -> None:
    """Probabilities 3/4 (in), 1/2 (out), 3/4 (out), then padding.

    BCE = (log 4/3 + log 2 + log 4) / 3. Predicted: tokens 0 and 2; selected: token 0 and 3, the
    last padding. Precision 1/2, recall 1, coverage 1/3.
    """
    logits = np.log(column(3, 1, 3, 1))
    selected = np.array([[True], [False], [False], [True]])
    valid = np.array([True, True, True, False])
    expected = (np.log(4 / 3) + np.log(2) + np.log(4)) / 3
    assert ref.selection_bce(logits, selected, valid) == pytest.approx(expected)
    assert ref.precision_recall(logits > 0, selected, valid) == (0.5, 1.0)
    assert ref.coverage(selected, valid) == pytest.approx(1 / 3)
    assert ref.selection_bce(np.array([[1000.0]]), selected[1:2], all_valid(1)) == 1000.0


def test_running_quantile() -> None:
    """Five valid scores 9, 7, 4, 2, 1 in two groups; half of five is 2.5, to even 2.

    The midpoint of 7 and 4 is 5.5. First update: all the way. Second (count 1): 1/2 of the way
    from 1.5: 3.5. Eleventh: 1/11 is below the rate 0.2, so 1.5 + 0.2 * 4 = 2.3.
    """
    scores = np.array([[[1.0], [9.0], [4.0]], [[2.0], [100.0], [7.0]]])
    valid = np.array([[True, True, True], [True, False, True]])
    old = np.array([1.5])

    def update(capacity: float, count: int) -> float:
        return ref.running_quantile(old, scores, valid, capacity, 0.2, count).item()

    assert update(0.5, 0) == 5.5
    assert update(0.5, 1) == 3.5
    assert update(0.5, 10) == pytest.approx(2.3)
    assert update(0.01, 0) == 1.5
    assert update(1.0, 0) == np.finfo(np.float32).min
    assert ref.running_quantile(old, scores, valid & False, 0.5, 0.2, 0).item() == 1.5


def test_balancing_bias() -> None:
    """Loads 1 + 2, 4 + 2, 3 + 0 and 0 + 4 of two groups: 3, 6, 3, 4, mean 4."""
    load = np.array([[1, 4, 3, 0], [2, 2, 0, 4]])
    bias = np.array([0.0, 1.0, 2.0, 3.0])
    got = ref.balancing_bias(bias, load, 0.5)
    assert got.tolist() == [0.5, 0.5, 2.5, 3.0]
