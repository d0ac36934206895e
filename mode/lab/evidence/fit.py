"""Loss against size at equal training FLOPs: a parabola in the logarithm of the parameters.

*Source:* the second method of arXiv:2203.15556, as arXiv:2404.02258, section 4.1, uses it.
"""

import collections
import dataclasses
import math
from collections.abc import Iterable, Sequence

import numpy as np

from ..arms import Size
from .records import SEARCH_SEED, Record


# The fewest sizes that leave a parabola something to say.
_FEWEST = 3


@dataclasses.dataclass(frozen=True)
class Parabola:
    """Loss as a parabola in the natural logarithm of the parameters.

    **Attributes:**

    - `coefficients`: of the square, the logarithm and 1.
    - `smallest`, `largest`: parameters that it was fitted to; it is for these and those between.
    """

    coefficients: tuple[float, float, float]
    smallest: float
    largest: float

    @staticmethod
    def through(parameters: Sequence[float], losses: Sequence[float]) -> "Parabola":
        """The one of least squares.

        **Raises:** `ValueError` for fewer than three sizes.
        """
        if len(set(parameters)) < _FEWEST:
            raise ValueError(
                f"`sizes` must be at least {_FEWEST} for a fit of loss against size, got "
                f"{len(set(parameters))}."
            )
        # Around their middle, where the squares of the logarithms are small.
        logs = np.log(np.asarray(parameters, np.float64))
        middle = float(logs.mean())
        square, slope, height = np.polyfit(logs - middle, np.asarray(losses, np.float64), 2)
        coefficients = (
            float(square),
            float(slope - 2 * square * middle),
            float(height - slope * middle + square * middle**2),
        )
        return Parabola(coefficients, min(parameters), max(parameters))

    def at(self, parameters: float) -> float:
        """The loss at a size."""
        return float(np.polyval(self.coefficients, math.log(parameters)))

    @property
    def lowest(self) -> float | None:
        """The size of lowest loss; `None` where it is not between those that were measured."""
        square, slope, _ = self.coefficients
        if square <= 0:
            return None
        place = -slope / (2 * square)
        if not math.log(self.smallest) < place < math.log(self.largest):
            return None
        return math.exp(place)


@dataclasses.dataclass(frozen=True)
class Curve:
    """One arm at one budget, over sizes.

    **Attributes:**

    - `arm`, `budget`: which.
    - `records`: of the seeds that have every size, or else all, by parameters and seed.
    - `fit`: through all of these.
    - `seeds`: a fit for each seed that has every size.
    """

    arm: str
    budget: float
    records: tuple[Record, ...]
    fit: Parabola
    seeds: tuple[Parabola, ...]

    @property
    def lowest(self) -> float | None:
        """The loss at its optimum; `None` where that is not bracketed."""
        return None if self.fit.lowest is None else self.fit.at(self.fit.lowest)

    @property
    def spread(self) -> float | None:
        """Standard deviation over seeds of the loss at the optimum of each."""
        found = [fit.at(fit.lowest) for fit in self.seeds if fit.lowest is not None]
        return float(np.std(found, ddof=1)) if len(found) > 1 else None

    @property
    def by_seed(self) -> dict[int, Parabola]:
        """The fits of `seeds`, by seed."""
        return dict(
            zip(sorted({record.run.seed for record in self.records}), self.seeds, strict=False)
        )

    @property
    def misfit(self) -> float:
        """The furthest that the mean over seeds at a size lies from the parabola through all."""
        sizes: dict[int, list[float]] = {}
        for record in self.records:
            sizes.setdefault(record.parameters, []).append(record.end.bits_causal)
        return max(
            abs(float(np.mean(found)) - self.fit.at(float(size))) for size, found in sizes.items()
        )

    def forward_flops(self, parameters: float) -> float:
        """FLOPs of a forward pass per token at a size, between those of the sizes measured."""
        points = sorted({(record.parameters, record.forward_flops) for record in self.records})
        logs = np.log(np.asarray(points))
        return float(np.exp(np.interp(math.log(parameters), logs[:, 0], logs[:, 1])))

    def cheapest(self, loss: float, fit: Parabola | None = None) -> tuple[float, bool] | None:
        """The fewest forward FLOPs per token at which a fit is as low as `loss`, and whether a
        smaller size that was measured is not; `None` where no size is.

        **Arguments:**

        - `fit`: one of `seeds`; by default that through all.
        """
        fit = self.fit if fit is None else fit
        sizes = np.geomspace(fit.smallest, fit.largest, 2001)
        reached = [size for size in sizes if fit.at(size) <= loss]
        if not reached:
            return None
        first = float(reached[0])
        return self.forward_flops(first), bool(first > sizes[0])


def curves(records: Iterable[Record], reference: Size) -> list[Curve]:
    """A curve for every arm and budget that has at least three sizes, by budget and arm.

    Of sizes that differ from `reference` in features, layers and heads alone, those at which the
    dense arm was run too: arms are fitted over the same ones.
    """
    cells: dict[tuple[float, str], list[Record]] = {}
    for record in records:
        if compared(record, reference):
            cells.setdefault((record.run.budget, record.run.arm), []).append(record)
    found = []
    for (budget, arm), cell in sorted(cells.items()):
        shapes = {record.run.size for record in cells.get((budget, "dense"), ())}
        cell = sorted(
            (record for record in cell if record.run.size in shapes),
            key=lambda record: (record.parameters, record.run.seed),
        )
        if len({record.parameters for record in cell}) < _FEWEST:
            continue
        whole = _whole_seeds(cell)
        if whole:  # the others would pull the fit to the sizes that have more of them
            cell = [record for record in cell if record.run.seed in whole]
        seeds = [[record for record in cell if record.run.seed == seed] for seed in whole]
        found.append(Curve(arm, budget, tuple(cell), _fit(cell), tuple(map(_fit, seeds))))
    return found


def _whole_seeds(cell: Sequence[Record]) -> list[int]:
    """Those that were run at every size."""
    sizes = len({record.run.size for record in cell})
    count = collections.Counter(record.run.seed for record in cell)
    return sorted(seed for seed, runs in count.items() if runs == sizes)


def compared(record: Record, reference: Size) -> bool:
    """Whether a run is one of the comparison over sizes."""
    size = record.run.size
    alike = dataclasses.replace(reference, dim=size.dim, depth=size.depth, heads=size.heads)
    return size == alike and record.run.seed < SEARCH_SEED


def _fit(records: Sequence[Record]) -> Parabola:
    parameters = [float(record.parameters) for record in records]
    return Parabola.through(parameters, [record.end.bits_causal for record in records])
