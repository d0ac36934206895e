"""Intervals of means over runs."""

import dataclasses
import math
from collections.abc import Iterable

import numpy as np
import scipy.stats


@dataclasses.dataclass(frozen=True)
class Interval:
    """The mean of independent values, and Student's interval of confidence 0.95 for it, which is
    infinite for a single value."""

    mean: float
    low: float
    high: float
    count: int

    @staticmethod
    def of(values: Iterable[float]) -> "Interval":
        """Computes the interval of at least one value."""
        x = np.fromiter(values, np.float64)
        half = math.inf
        if x.size > 1:  # equal values have no error, for which `scipy.stats.t.interval` gives NaN
            half = scipy.stats.t.ppf(0.975, x.size - 1) * scipy.stats.sem(x)
        return Interval(float(x.mean()), float(x.mean() - half), float(x.mean() + half), x.size)

    def text(self, spec: str = "+.4f", unit: str = "") -> str:
        """Formats the mean, the interval and the number of runs.

        >>> Interval.of([1.0, 2.0, 3.0]).text("+.2f", " %")
        '+2.00 % (-0.48 to +4.48, 3 runs)'
        """
        mean = f"{self.mean:{spec}}{unit}"
        if self.count == 1:
            return f"{mean} (1 run)"
        return f"{mean} ({self.low:{spec}} to {self.high:{spec}}, {self.count} runs)"
