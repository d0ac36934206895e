"""Loss against size at equal training FLOPs: a parabola in the logarithm of the parameters.

*Source:* the second method of arXiv:2203.15556, as arXiv:2404.02258, section 4.1, uses it.
"""

import dataclasses
import math

import numpy as np
import pandas as pd
from numpy.polynomial import Polynomial


# Through fewer sizes there is more than one parabola.
_FEWEST = 3


class Parabola:
    """Loss as a parabola in the natural logarithm of the parameters, over the sizes of some runs.

    `optimum` is the size of lowest loss, `lowest` the loss there; NaN where it is not between the
    sizes of the runs.
    """

    def __init__(self, runs: pd.DataFrame):
        self.polynomial = Polynomial.fit(np.log(runs["parameters"]), runs["causal"], 2)
        self._flops: pd.Series = runs.groupby("parameters")["forward_flops"].first()
        self.optimum = self.lowest = math.nan
        if self.polynomial.deriv(2)(0.0) > 0:
            (log,) = self.polynomial.deriv().roots()
            smallest, largest = self.polynomial.domain
            if smallest < log < largest:
                self.optimum, self.lowest = math.exp(log), float(self.polynomial(log))

    def at(self, parameters: float) -> float:
        """Returns the loss at a size."""
        return float(self.polynomial(math.log(parameters)))

    def sizes(self, count: int) -> list[float]:
        """Returns sizes from the smallest to the largest, at equal ratios."""
        smallest, largest = self.polynomial.domain
        return np.exp(np.linspace(smallest, largest, count)).tolist()

    def forward_flops(self, parameters: float) -> float:
        """FLOPs of a forward pass per token at a size, interpolated between those that were run."""
        sizes, flops = self._flops.index.to_numpy(float), self._flops.to_numpy(float)
        return float(np.exp(np.interp(math.log(parameters), np.log(sizes), np.log(flops))))

    def cost_of(self, other: "Parabola") -> float:
        """The forward FLOPs at the smallest size that is as low as the optimum of another fit,
        divided by those of that optimum. Infinite where no size is as low, NaN without optimum."""
        if math.isnan(other.optimum):
            return math.nan
        size = next((size for size in self.sizes(2001) if self.at(size) <= other.lowest), None)
        cost = math.inf if size is None else self.forward_flops(size)
        return cost / other.forward_flops(other.optimum)


@dataclasses.dataclass(frozen=True)
class Curve:
    """One arm at one budget, over sizes: its `runs`, a `fit` through all of them, and one for each
    of the `seeds` that have every size. Runs of other seeds count only where no seed has."""

    arm: str
    budget: float
    runs: pd.DataFrame
    fit: Parabola
    seeds: dict[int, Parabola]

    @property
    def misfit(self) -> float:
        """The largest distance of a size's mean loss from the fit."""
        means = self.runs.groupby("parameters")["causal"].mean()
        fitted = [self.fit.at(size) for size in means.index.to_numpy(float).tolist()]
        return float((means - fitted).abs().max())


def fit_curves(frame: pd.DataFrame) -> list[Curve]:
    """Fits a curve for every arm and budget that has at least three sizes, by budget and arm.

    Only those sizes count at which the dense arm was run too, so that all arms are fitted over the
    same sizes.
    """
    curves = []
    for budget, cells in frame.groupby("budget"):
        sizes = set(cells.loc[cells["arm"] == "dense", "size"])
        for arm, cell in cells[cells["size"].isin(sizes)].groupby("arm"):
            if cell["parameters"].nunique() < _FEWEST:
                continue
            counts = cell["seed"].value_counts()
            complete = sorted(counts.index[counts == cell["size"].nunique()].tolist())
            if complete:  # other seeds would pull the fit to the sizes that have more of them
                cell = cell[cell["seed"].isin(complete)]
            seeds = {seed: Parabola(cell[cell["seed"] == seed]) for seed in complete}
            curves.append(Curve(arm, budget, cell, Parabola(cell), seeds))  # pyright: ignore
    return curves
