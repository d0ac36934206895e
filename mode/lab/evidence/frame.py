"""All records of a folder as one data frame, and intervals of means over its runs."""

import dataclasses
import functools
import math
import re
from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd
import scipy.stats

from ..options import Size
from .curves import Curve, fit_curves
from .records import SEARCH_SEED, RunRecord, shape_name


# What two runs have in common that are compared.
PAIR = ["budget", "seed"]


def to_frame(records: Sequence[RunRecord]) -> pd.DataFrame:
    """Makes a data frame with a row for every record.

    Columns are the fields of `RunRecord`, with dots for nested ones, such as `size.dim`; those of
    `run` and `end` have no prefix. `size` is the whole `Size` and `shape` its name. What a run does
    not have is NaN.
    """
    frame = pd.json_normalize([record.model_dump() for record in records])
    frame = frame.rename(columns=lambda name: re.sub(r"^(run|end)\.", "", name))
    numbers = ["precision", "recall", "slots", "slots_top_k"]
    sizes = pd.Series([record.run.size for record in records], dtype=object)
    return frame.astype(dict.fromkeys(numbers, float)).assign(
        size=sizes, shape=sizes.map(shape_name)
    )


@dataclasses.dataclass(frozen=True)
class Runs:
    """The runs that are compared, as `to_frame` makes them; arms are at the size `reference`."""

    frame: pd.DataFrame
    reference: Size

    @staticmethod
    def of(frame: pd.DataFrame, reference: Size) -> "Runs":
        """Leaves out the search of learning rates; of runs that differ in the rate, keeps one."""
        frame = frame[frame["seed"] < SEARCH_SEED]
        return Runs(frame.drop_duplicates(["arm", "size", *PAIR], keep="last"), reference)

    def varying(self, *fields: str) -> pd.DataFrame:
        """Selects runs whose sizes differ from the reference in these fields or not at all."""
        alike = [
            size == dataclasses.replace(self.reference, **{f: getattr(size, f) for f in fields})
            for size in self.frame["size"]
        ]
        return self.frame[pd.Series(alike, self.frame.index, bool)]

    def at_reference(self, arm: str) -> pd.DataFrame:
        """Selects runs of an arm at the reference, indexed by budget and seed."""
        frame = self.varying()
        return frame[frame["arm"] == arm].set_index(PAIR).sort_index()

    @functools.cached_property
    def curves(self) -> list[Curve]:
        """Loss against size, where sizes differ in features, layers and heads."""
        return fit_curves(self.varying("dim", "depth", "heads"))

    @property
    def fits(self) -> pd.DataFrame:
        """The parabolas of the seeds that have every size: a row for budget and seed, by arm."""
        rows = [(c.arm, c.budget, seed, fit) for c in self.curves for seed, fit in c.seeds.items()]
        frame = pd.DataFrame(rows, columns=pd.Index(["arm", *PAIR, "fit"]))
        return frame.pivot(index=PAIR, columns="arm", values="fit")


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
