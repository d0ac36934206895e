"""What was computed for whom, as numbers: pure functions of tokens, selections and logits.

Tokens are flat here, those that count of all sequences together, and `sequence` says whose each is:
uncertainty is over sequences, as tokens of one sequence compete for the same slots and are about
the same things.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Float, Int, Integer

from .data import DOCUMENT_START


# In the order of their numbers.
CLASSES = {
    "document start": "the token before the first byte of a file",
    "space": "the ASCII bytes 9 to 13 and 32: tab, line ends, blank",
    "punctuation": "every other byte below 128, control characters among them",
    "digit": "0 to 9, inside words too",
    "word start": "a letter, underscore or byte of 128 and above (UTF-8 beyond ASCII) that follows "
    "none of these and no digit",
    "word inside": "a letter, underscore or byte of 128 and above that follows one, or a digit",
}
_START, _SPACE, _PUNCTUATION, _DIGIT, _WORD_START, _WORD_INSIDE = range(len(CLASSES))
_BINS = 48


def byte_classes(tokens: Integer[np.ndarray, " tokens"]) -> Int[np.ndarray, " tokens"]:
    """The number of each token's class in `CLASSES`, of a text in its order.

    The very first token has none before it, and follows a document's start as it were.

    >>> import numpy as np
    >>> text = np.frombuffer(b"def f2(x_1):", np.uint8)
    >>> [list(CLASSES)[number] for number in byte_classes(text)][3:8]
    ['space', 'word start', 'digit', 'punctuation', 'word start']
    """
    lower = tokens | 0x20
    letter = (lower >= ord("a")) & (lower <= ord("z")) & (tokens < 128)
    word = letter | (tokens == ord("_")) | ((tokens >= 128) & (tokens < DOCUMENT_START))
    digit = (tokens >= ord("0")) & (tokens <= ord("9"))
    space = ((tokens >= 9) & (tokens <= 13)) | (tokens == 32)
    follows = np.concatenate([[False], (word | digit)[:-1]])
    kinds = [tokens == DOCUMENT_START, space, digit, word & follows, word]
    numbers = [_START, _SPACE, _DIGIT, _WORD_INSIDE, _WORD_START]
    return np.select(kinds, numbers, _PUNCTUATION)


def log_probabilities(logits: Float[np.ndarray, "*axes vocab"]) -> Float[np.ndarray, "*axes vocab"]:
    """Of each next token, in bits, float64."""
    shifted = logits.astype(np.float64)
    shifted = shifted - shifted.max(-1, keepdims=True)
    return (shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))) / np.log(2)


def prediction_entropy(logits: Float[np.ndarray, "*axes vocab"]) -> Float[np.ndarray, "*axes"]:
    """The entropy of the next-token distribution, in bits.

    >>> import numpy as np
    >>> prediction_entropy(np.array([[1.0, 1.0, 1.0, 1.0], [0.0, 0.0, -1e9, -1e9]])).tolist()
    [2.0, 1.0]
    """
    logs = log_probabilities(logits)
    probability = np.exp2(logs)
    # A logit of minus infinity is a probability of 0, and adds nothing.
    return -np.where(probability > 0, probability * np.where(probability > 0, logs, 0), 0).sum(-1)


def chance(rates: Float[np.ndarray, " takers"]) -> Float[np.ndarray, " counts"]:
    """How many take a token, 0 to all, if each took its share of them whatever the others do.

    **Arguments:**

    - `rates`: of each expert or block, the share of the tokens that it takes.

    >>> import numpy as np
    >>> chance(np.array([0.5, 0.5])).tolist()
    [0.25, 0.5, 0.25]
    """
    found = np.ones(1)
    for rate in rates:
        found = np.convolve(found, [1 - rate, rate])
    return found


# A number for every bootstrap weight of the tokens; NaN where it is not defined.
Statistic = Callable[[Float[np.ndarray, " tokens"]], Float[np.ndarray, "*values"]]


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A number of a text and its 95 % interval over texts like it.

    **Attributes:**

    - `value`: NaN where it is not defined.
    - `low`, `high`: of the percentile bootstrap over sequences; NaN for fewer than two.
    """

    value: float
    low: float
    high: float


def resamples(sequences: int, count: int, seed: int) -> Int[np.ndarray, "count sequences"]:
    """How often each sequence is drawn, in `count` draws of as many as there are, with return."""
    even = np.full(sequences, 1 / sequences)
    return np.random.default_rng(seed).multinomial(sequences, even, size=count)


def estimates(
    statistic: Statistic,
    sequence: Int[np.ndarray, " tokens"],
    draws: Int[np.ndarray, "count sequences"],
) -> list[Estimate]:
    """Each of a statistic's numbers, with its interval.

    **Arguments:**

    - `statistic`: of weights of the tokens.
    - `sequence`: whose each token is, from 0.
    - `draws`: from `resamples`.
    """
    values = np.atleast_1d(statistic(np.ones(len(sequence))))
    bounds = np.full((2, len(values)), np.nan)
    if draws.shape[1] > 1:
        drawn = np.stack([np.atleast_1d(statistic(row[sequence])) for row in draws.astype(float)])
        for place in range(len(values)):
            known = drawn[np.isfinite(drawn[:, place]), place]
            # Where most draws leave it undefined, the rest do not say how it varies.
            if 2 * len(known) > len(drawn):
                bounds[:, place] = np.quantile(known, [0.025, 0.975])
    return [Estimate(*map(float, found)) for found in zip(values, *bounds, strict=True)]


def pearson(
    x: Float[np.ndarray, " tokens"],
    y: Float[np.ndarray, " tokens"],
    weight: Float[np.ndarray, " tokens"],
) -> Float[np.ndarray, ""]:
    """The linear correlation of weighted pairs; NaN where either of them does not vary."""
    used = weight > 0
    if not used.any() or any(np.ptp(values[used]) == 0 for values in (x, y)):
        return np.asarray(np.nan)
    total = weight.sum()
    x, y = (values - np.sum(weight * values) / total for values in (x, y))
    squares = np.sum(weight * x * x) * np.sum(weight * y * y)
    return np.asarray(np.sum(weight * x * y) / np.sqrt(squares))


def ranker(
    values: Float[np.ndarray, " tokens"],
) -> Callable[[Float[np.ndarray, " tokens"]], Float[np.ndarray, " tokens"]]:
    """From weights to ranks, equal values sharing the middle one: `pearson` of such is Spearman's.

    A token of weight 2 counts as two. Sorted once, so that a thousand draws are quick.
    """
    _, group = np.unique(values, return_inverse=True)

    def ranks(weight: Float[np.ndarray, " tokens"]) -> Float[np.ndarray, " tokens"]:
        mass = np.bincount(group, weight)
        return (np.cumsum(mass) - mass / 2)[group]

    return ranks


def correlations(x: Float[np.ndarray, " tokens"], y: Float[np.ndarray, " tokens"]) -> Statistic:
    """Pearson's and Spearman's, as a statistic of weights."""
    ranks_of_x, ranks_of_y = ranker(x), ranker(y)

    def both(weight: Float[np.ndarray, " tokens"]) -> Float[np.ndarray, "2"]:
        rank = pearson(ranks_of_x(weight), ranks_of_y(weight), weight)
        return np.stack([pearson(x, y, weight), rank])

    return both


def class_totals(
    classes: Int[np.ndarray, " tokens"],
    values: Float[np.ndarray, " tokens"],
    weight: Float[np.ndarray, " tokens"],
) -> Float[np.ndarray, " classes"]:
    """The sum of `values` over the tokens of each class."""
    return np.bincount(classes, weight * values, minlength=len(CLASSES))


def class_ratios(
    classes: Int[np.ndarray, " tokens"], compute: Float[np.ndarray, " tokens"]
) -> Statistic:
    """A class's share of the compute over its share of the tokens, as a statistic of weights.

    1 is as much for its tokens as for the average one; NaN for a class that does not occur.
    """

    def ratios(weight: Float[np.ndarray, " tokens"]) -> Float[np.ndarray, " classes"]:
        tokens = class_totals(classes, np.ones_like(compute), weight)
        spent = class_totals(classes, compute, weight)
        with np.errstate(divide="ignore", invalid="ignore"):
            found = (spent / spent.sum()) / (tokens / tokens.sum())
        return np.where(np.isfinite(found), found, np.nan)

    return ratios


@dataclasses.dataclass(frozen=True)
class Spread:
    """How a set of numbers is spread.

    **Attributes:**

    - `count`: how many there are; with none, all else is NaN.
    - `mean`: of them.
    - `quantiles`: at 5, 25, 50, 75 and 95 %.
    """

    count: int
    mean: float
    quantiles: tuple[float, ...]


def spread(values: Float[np.ndarray, " values"]) -> Spread:
    """Of numbers in any order."""
    if not len(values):
        return Spread(0, np.nan, (np.nan,) * 5)
    values = values.astype(np.float64)
    found = np.quantile(values, [0.05, 0.25, 0.5, 0.75, 0.95])
    return Spread(len(values), float(values.mean()), tuple(map(float, found)))


def bin_edges(values: Float[np.ndarray, " values"]) -> Float[np.ndarray, " edges"]:
    """Even bins over nearly all of the numbers; the first and last bin hold what lies outside.

    The outermost thousandth on each side would squeeze the rest into a few bins.
    """
    low, high = np.quantile(values, [0.001, 0.999]) if len(values) else (0.0, 1.0)
    least = 1e-6 * max(1.0, abs(low))  # equal numbers get a bin around them
    middle, half = (low + high) / 2, max(high - low, least) / 2
    return np.linspace(middle - half, middle + half, _BINS + 1)


def binned(
    values: Float[np.ndarray, " values"], edges: Float[np.ndarray, " edges"]
) -> Int[np.ndarray, " bins"]:
    """How many of the numbers each bin holds, those beyond the ends in the last ones."""
    return np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0]


def expert_shares(
    selected: Bool[np.ndarray, "layers sequences tokens experts"],
    counted: Bool[np.ndarray, "layers sequences tokens"],
) -> Float[np.ndarray, "layers experts"]:
    """The share of a layer's tokens that each expert took; NaN where no token came."""
    taken = np.sum(selected & counted[..., None], axis=(1, 2))
    came = np.sum(counted, axis=(1, 2))[:, None]
    return np.where(came > 0, taken / np.maximum(came, 1), np.nan)
