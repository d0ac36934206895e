"""Differences between arms over seeds, and what may be concluded from them."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import scipy.stats


Verdict = Literal["reproduced", "contradicted", "not resolved at this scale"]
REPRODUCED: Verdict = "reproduced"
CONTRADICTED: Verdict = "contradicted"
UNRESOLVED: Verdict = "not resolved at this scale"
# Of the intervals that decide.
_CONFIDENCE = 0.95


@dataclasses.dataclass(frozen=True)
class Spread:
    """A mean over runs, and how well it is known.

    **Attributes:**

    - `mean`: of the values.
    - `deviation`: their standard deviation, of one below their number.
    - `low`, `high`: Student's interval of confidence 0.95 for the mean.
    - `count`: how many values.
    """

    mean: float
    deviation: float
    low: float
    high: float
    count: int

    @staticmethod
    def of(values: Sequence[float]) -> "Spread":
        """Of values that came independently; of a single one nothing but itself is known.

        **Raises:** `ValueError` for none.
        """
        if not values:
            raise ValueError("`values` must hold at least one, got none.")
        mean = float(np.mean(values))
        if len(values) == 1:
            return Spread(mean, math.nan, -math.inf, math.inf, 1)
        deviation = float(np.std(values, ddof=1))
        quantile = scipy.stats.t.ppf((1 + _CONFIDENCE) / 2, len(values) - 1)
        half = float(quantile) * deviation / math.sqrt(len(values))
        return Spread(mean, deviation, mean - half, mean + half, len(values))

    def above(self, least: float = 0.0) -> Verdict:
        """Whether the mean lies above a number: the claim, its opposite, or neither for sure."""
        if self.low > least:
            return REPRODUCED
        return CONTRADICTED if self.high < least else UNRESOLVED

    def below(self, most: float = 0.0) -> Verdict:
        """Whether the mean lies below a number."""
        if self.high < most:
            return REPRODUCED
        return CONTRADICTED if self.low > most else UNRESOLVED

    def text(self, digits: int, unit: str = "") -> str:
        """Mean, interval and number of runs, in words."""
        if self.count == 1:
            return f"{self.mean:+.{digits}f}{unit} (1 run)"
        return (
            f"{self.mean:+.{digits}f}{unit} ({self.low:+.{digits}f} to {self.high:+.{digits}f}, "
            f"{self.count} runs)"
        )
