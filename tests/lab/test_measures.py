"""The measures of `mode-lab analyze`, against slow counts of the same."""

import itertools
import math
import statistics

import numpy as np
from hypothesis import assume, given, settings, strategies as st

from mode.lab import measures
from tests.helpers import assert_close
from tests.lab.helpers import slow_class


def test_classes_of_bytes() -> None:
    """Every token after every other: 66,049 pairs, and those next to them."""
    tokens = np.array([[a, b] for a in range(257) for b in range(257)], np.uint16).ravel()
    before = [256, *tokens[:-1].tolist()]
    names = measures.CLASSES
    classes = [names[number] for number in measures.byte_classes(tokens)]
    assert classes == list(map(slow_class, before, tokens.tolist()))


def test_entropy_is_the_mean_surprise() -> None:
    logits = np.random.default_rng(0).normal(0, 3, (5, 7, 11)).astype(np.float32)
    logits[0, 0, 3] = -np.inf
    entropy = measures.prediction_entropy(logits)
    for place in itertools.product(range(5), range(7)):
        powers = [math.exp(logit) for logit in logits[place].astype(float)]
        probabilities = [power / sum(powers) for power in powers]
        expected = -sum(p * math.log2(p) for p in probabilities if p > 0)
        assert_close(entropy[place], expected)


def test_a_logit_that_is_not_a_number_has_no_entropy() -> None:
    assert math.isnan(measures.prediction_entropy(np.array([[0.0, np.nan, 1.0]]))[0])


def slow_ranks(values: list[float]) -> list[float]:
    """Returns the mean rank of the values that are equal to each value."""
    return [
        sum(other < value for other in values) + sum(other == value for other in values) / 2
        for value in values
    ]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(-5, 5)), min_size=2, max_size=25), st.data()
)
def test_correlations_are_those_of_the_tokens_that_were_drawn(
    pairs: list[tuple[int, int]], data: st.DataObject
) -> None:
    """Sequences of one token each, some drawn several times and some not at all."""
    times = [data.draw(st.integers(0, 3)) for _ in pairs]
    assume(any(times))
    rows = np.repeat(np.arange(len(pairs)), times)
    x, y = np.array(pairs, float).T
    found = measures.correlations(x, y, np.arange(len(pairs)))(rows)
    columns = [[float(pairs[row][n]) for row in rows] for n in (0, 1)]
    if any(len(set(column)) < 2 for column in columns):
        assert np.isnan(found).all()
        return
    assert_close(found[0], statistics.correlation(*columns))
    assert_close(found[1], statistics.correlation(*map(slow_ranks, columns)))


def test_ratios_and_their_intervals_are_those_of_whole_sequences() -> None:
    generator = np.random.default_rng(0)
    sequence = np.repeat(np.arange(6), [3, 9, 1, 5, 4, 7])
    classes = generator.integers(1, 4, len(sequence))
    compute = generator.integers(0, 3, len(sequence)).astype(float)
    tables = np.zeros((2, 6, len(measures.CLASSES)))
    np.add.at(tables[0], (sequence, classes), 1)
    np.add.at(tables[1], (sequence, classes), compute)
    drawn = []

    def recorded(rows: np.ndarray) -> np.ndarray:
        drawn.append(rows.tolist())
        return measures.class_ratios(*tables)(rows)

    found = measures.bootstrap(recorded, 6, seed=3, draws=50)
    everything, *draws = drawn
    assert everything == list(range(6))
    assert len(draws) == 50
    assert len(set(map(tuple, draws))) > 40
    for number, (value, low, high) in enumerate(found):

        def ratio(rows: list[int], number: int = number) -> float:
            tokens = [t for row in rows for t in np.flatnonzero(sequence == row)]
            own = [token for token in tokens if classes[token] == number]
            spent = sum(compute[token] for token in tokens)
            if not own or not spent:
                return math.nan
            return sum(compute[t] for t in own) / spent / (len(own) / len(tokens))

        assert_close(value, ratio(everything))
        known = [one for one in map(ratio, draws) if not math.isnan(one)]
        if not known:
            assert math.isnan(low)
            continue
        assert_close(low, np.percentile(known, 2.5))
        assert_close(high, np.percentile(known, 97.5))


def test_a_number_that_most_draws_leave_undefined_has_no_interval() -> None:
    def only_with_the_first(rows: np.ndarray) -> np.ndarray:
        return np.array([1.0, 1.0 if (rows == 0).sum() > 1 else np.nan])

    found = measures.bootstrap(only_with_the_first, 8, seed=0, draws=40)
    assert np.array_equal(found[0], np.ones(3))
    assert np.isnan(found[1]).all()


def test_one_sequence_has_no_interval() -> None:
    statistic = measures.correlations(
        np.arange(4.0), np.array([1.0, 3.0, 2.0, 4.0]), np.zeros(4, int)
    )
    found = measures.bootstrap(statistic, 1, seed=0, draws=9)
    assert_close(found[:, 0], np.array([0.8, 0.8]))
    assert np.isnan(found[:, 1:]).all()


def test_every_weight_is_in_a_bin() -> None:
    values = np.concatenate([np.random.default_rng(0).normal(size=5000), [-900.0, 900.0]])
    edges = measures.bin_edges(values)
    assert edges[0] > -10
    assert edges[-1] < 10
    assert measures.count_in_bins(values, edges).sum() == len(values)
    assert measures.count_in_bins(values, edges)[0] >= 1
    alike = np.full(7, 0.3)
    assert measures.count_in_bins(alike, measures.bin_edges(alike)).sum() == 7
