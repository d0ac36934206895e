"""What `mode-lab analyze` measures, against slow counts of the same."""

import itertools
import math
import statistics

import numpy as np
from hypothesis import given, settings, strategies as st

from mode.lab import measures

from .helpers import assert_close
from .lab import slow_class


def test_classes_of_bytes() -> None:
    """Of every token after every other: 66,049 pairs, and those next to them."""
    tokens = np.array([[a, b] for a in range(257) for b in range(257)], np.uint16).ravel()
    before = [256, *tokens[:-1].tolist()]
    names = list(measures.CLASSES)
    found = [names[number] for number in measures.byte_classes(tokens)]
    assert found == list(map(slow_class, before, tokens.tolist()))


def test_entropy_is_the_mean_surprise() -> None:
    logits = np.random.default_rng(0).normal(0, 3, (5, 7, 11)).astype(np.float32)
    logits[0, 0, 3] = -np.inf
    found = measures.prediction_entropy(logits)
    for place in itertools.product(range(5), range(7)):
        powers = [math.exp(logit) for logit in logits[place].astype(float)]
        shares = [power / sum(powers) for power in powers]
        assert_close(found[place], -sum(p * math.log2(p) for p in shares if p > 0))


def test_chance_is_the_sum_over_who_takes() -> None:
    rates = [0.1, 0.7, 0.5, 1.0]
    slow = np.zeros(5)
    for taken in itertools.product([0, 1], repeat=4):
        slow[sum(taken)] += math.prod(
            rate if took else 1 - rate for rate, took in zip(rates, taken, strict=True)
        )
    assert_close(measures.chance(np.array(rates)), slow)


def slow_ranks(values: list[float]) -> list[float]:
    """Of each value, the mean place of its equals."""
    return [
        sum(other < value for other in values) + sum(other == value for other in values) / 2
        for value in values
    ]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(-5, 5)), min_size=2, max_size=25), st.data()
)
def test_correlations_are_those_of_the_repeated_tokens(
    pairs: list[tuple[int, int]], data: st.DataObject
) -> None:
    weights = [data.draw(st.integers(0, 3)) for _ in pairs]
    repeated = [pair for pair, weight in zip(pairs, weights, strict=True) for _ in range(weight)]
    x, y = np.array(pairs, float).T
    found = measures.correlations(x, y)(np.array(weights, float))
    columns = [[float(pair[n]) for pair in repeated] for n in (0, 1)]
    if any(len(set(column)) < 2 for column in columns):
        assert np.isnan(found).all()
        return
    assert_close(found[0], statistics.correlation(*columns))
    assert_close(found[1], statistics.correlation(*map(slow_ranks, columns)))


def test_intervals_are_those_of_whole_sequences_drawn_again() -> None:
    generator = np.random.default_rng(0)
    sequence = np.repeat(np.arange(6), [3, 9, 1, 5, 4, 7])
    classes = generator.integers(1, 4, len(sequence))
    compute = generator.integers(0, 3, len(sequence)).astype(float)
    draws = measures.resamples(6, 50, seed=3)
    assert (draws.sum(1) == 6).all()
    assert len({tuple(row) for row in draws.tolist()}) > 40
    found = measures.estimates(measures.class_ratios(classes, compute), sequence, draws)
    for number in range(len(measures.CLASSES)):

        def ratio(kept: list[int], number: int = number) -> float:
            own = [token for token in kept if classes[token] == number]
            spent = sum(compute[token] for token in kept)
            if not own or not spent:
                return math.nan
            share = sum(compute[token] for token in own) / spent
            return share / (len(own) / len(kept))

        everything = list(range(len(sequence)))
        assert_close(found[number].value, ratio(everything))
        several = []
        for row in draws:
            kept = [token for token in everything for _ in range(row[sequence[token]])]
            several.append(ratio(kept))
        known = [value for value in several if not math.isnan(value)]
        if not known:
            assert math.isnan(found[number].low)
            continue
        assert_close(found[number].low, np.percentile(known, 2.5))
        assert_close(found[number].high, np.percentile(known, 97.5))


def test_one_sequence_has_no_interval() -> None:
    statistic = measures.correlations(np.arange(4.0), np.array([1.0, 3.0, 2.0, 4.0]))
    (r, rho) = measures.estimates(statistic, np.zeros(4, int), measures.resamples(1, 9, seed=0))
    assert_close(r.value, 0.8)
    assert_close(rho.value, 0.8)
    assert math.isnan(r.low)
    assert math.isnan(r.high)


def test_every_weight_is_in_a_bin() -> None:
    values = np.concatenate([np.random.default_rng(0).normal(size=5000), [-900.0, 900.0]])
    edges = measures.bin_edges(values)
    assert edges[0] > -10
    assert edges[-1] < 10
    assert measures.binned(values, edges).sum() == len(values)
    assert measures.binned(values, edges)[0] >= 1
    alike = np.full(7, 0.3)
    assert measures.binned(alike, measures.bin_edges(alike)).sum() == 7
