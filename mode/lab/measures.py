"""Measures of predictions and of compute: pure functions of tokens, logits and selections.

Arrays of tokens are flat: the tokens of all sequences that count, one after the other. Intervals
are over sequences, as tokens of one sequence compete for the same slots and share a topic.
"""

import string
import warnings
from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Int, Integer
from scipy import special, stats

from .data import DOCUMENT_START


# Classes of bytes, in the order of their numbers; texts/byte_classes.md defines them.
CLASSES = ("document start", "space", "punctuation", "digit", "word start", "word inside")
_BINS = 48

# Of sequences by number, drawn with replacement, to the numbers that these sequences give.
Statistic = Callable[[Int[np.ndarray, " sequences"]], Float[np.ndarray, " values"]]


def byte_classes(tokens: Integer[np.ndarray, " tokens"]) -> Int[np.ndarray, " tokens"]:
    """Finds the class of each token of a text, as a number of `CLASSES`.

    The first token counts as one that follows a document start.

    >>> import numpy as np
    >>> text = np.frombuffer(b"def f2(x_1):", np.uint8)
    >>> [CLASSES[number] for number in byte_classes(text)][3:8]
    ['space', 'word start', 'digit', 'punctuation', 'word start']
    """
    digit = np.isin(tokens, list(string.digits.encode()))
    word = np.isin(tokens, [*string.ascii_letters.encode(), ord("_"), *range(128, DOCUMENT_START)])
    follows = np.concatenate([[False], (word | digit)[:-1]])
    space, start = np.isin(tokens, list(string.whitespace.encode())), tokens == DOCUMENT_START
    other = ~(start | space | digit | word)
    # In the order of `CLASSES`, of which each token has one.
    return np.argmax([start, space, other, digit, word & ~follows, word & follows], axis=0)


def prediction_entropy(logits: Float[np.ndarray, "*axes vocab"]) -> Float[np.ndarray, "*axes"]:
    """Computes the entropy of the distribution of the next token, in bits.

    >>> import numpy as np
    >>> prediction_entropy(np.array([[1.0, 1.0, 1.0, 1.0], [0.0, 0.0, -1e9, -1e9]])).tolist()
    [2.0, 1.0]
    """
    probabilities = special.softmax(logits.astype(np.float64), axis=-1)
    return np.asarray(stats.entropy(probabilities, base=2, axis=-1))


def bootstrap(
    statistic: Statistic, sequences: int, *, seed: int, draws: int
) -> Float[np.ndarray, "values 3"]:
    """Estimates numbers and their 95 % intervals, by drawing whole sequences with replacement.

    **Returns:** each number, and the ends of its percentile interval. The ends are NaN for fewer
    than two sequences, or where at least half of the draws leave the number undefined.
    """
    values = statistic(np.arange(sequences))
    bounds = np.full((2, len(values)), np.nan)
    if sequences > 1:
        with warnings.catch_warnings():
            # Some draws leave a number undefined; its quantiles are computed below.
            warnings.simplefilter("ignore", stats.DegenerateDataWarning)
            result = stats.bootstrap(
                (np.arange(sequences),),
                lambda rows, axis: np.apply_along_axis(statistic, axis, rows).T,
                vectorized=True,
                n_resamples=draws,
                method="percentile",
                rng=seed,
            )
        drawn = result.bootstrap_distribution
        known = np.isfinite(drawn).mean(axis=-1) > 0.5
        bounds[:, known] = np.nanquantile(drawn[known], [0.025, 0.975], axis=-1)
    return np.stack([values, *bounds], axis=-1)


def correlations(
    x: Float[np.ndarray, " tokens"],
    y: Float[np.ndarray, " tokens"],
    sequence: Int[np.ndarray, " tokens"],
) -> Statistic:
    """Makes a statistic of Pearson's and Spearman's correlation of two numbers of the tokens.

    `sequence` is the number of the sequence of each token. The correlations are NaN where `x` or
    `y` is constant. (`scipy.stats` takes no weights, and would rank anew for every draw.)
    """
    groups = [np.unique(values, return_inverse=True)[1] for values in (x, y)]

    def ranks(group: Int[np.ndarray, " tokens"], weight: np.ndarray) -> np.ndarray:
        mass = np.bincount(group, weight)
        return (np.cumsum(mass) - mass / 2)[group]  # equal values share the middle rank

    def both(rows: Int[np.ndarray, " sequences"]) -> Float[np.ndarray, "2"]:
        weight = np.bincount(rows, minlength=sequence.max() + 1)[sequence].astype(float)
        if any(np.ptp(group[weight > 0]) == 0 for group in groups):
            return np.full(2, np.nan)
        ranked = [ranks(group, weight) for group in groups]
        covariances = (np.cov(np.stack(pair), ddof=0, aweights=weight) for pair in ((x, y), ranked))
        return np.array([c[0, 1] / np.sqrt(c[0, 0] * c[1, 1]) for c in covariances])

    return both


def class_ratios(
    tokens: Float[np.ndarray, "sequences classes"], compute: Float[np.ndarray, "sequences classes"]
) -> Statistic:
    """Makes a statistic of each class's fraction of the compute over its fraction of the tokens.

    It is 1 where the tokens of a class get as much compute as the average token, and NaN for a
    class without tokens. `compute` is the sum over the `tokens` of a class in a sequence.
    """

    def ratios(rows: Int[np.ndarray, " sequences"]) -> Float[np.ndarray, " classes"]:
        count, spent = tokens[rows].sum(0), compute[rows].sum(0)
        with np.errstate(divide="ignore", invalid="ignore"):
            return (spent / spent.sum()) / (count / count.sum())

    return ratios


def bin_edges(values: Float[np.ndarray, " values"]) -> Float[np.ndarray, " edges"]:
    """Computes the edges of even bins over all values but the outermost thousandth on each side,
    which would squeeze the rest into a few bins."""
    low, high = np.quantile(values, [0.001, 0.999]) if len(values) else (0.0, 1.0)
    least = 1e-6 * max(1.0, abs(low))  # equal values get a bin around them
    middle, half = (low + high) / 2, max(high - low, least) / 2
    return np.linspace(middle - half, middle + half, _BINS + 1)


def count_in_bins(
    values: Float[np.ndarray, " values"], edges: Float[np.ndarray, " edges"]
) -> Int[np.ndarray, " bins"]:
    """Counts the values in each bin; the first and the last bin hold those beyond them as well."""
    return np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0]
