"""All records of a folder as one data frame."""

import dataclasses
import functools
import re
from collections.abc import Sequence

import pandas as pd

from ..options import Size
from ..recovery import recoveries
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
    numbers = ["precision", "recall", "slots", "slots_top_k", "without"]
    sizes = pd.Series([record.run.size for record in records], dtype=object)
    return frame.astype(dict.fromkeys(numbers, float)).assign(
        size=sizes, shape=sizes.map(shape_name)
    )


@dataclasses.dataclass(frozen=True)
class Runs:
    """The runs that are compared, as `to_frame` makes them; arms are at the size `reference`.

    `frame` are runs of equal FLOPs, `equal_steps` those of as many steps as the dense arm.
    """

    frame: pd.DataFrame
    reference: Size
    equal_steps: pd.DataFrame

    @staticmethod
    def of(frame: pd.DataFrame, reference: Size) -> "Runs":
        """Leaves out the search of learning rates; of runs that differ in the rate, keeps one."""
        frame = frame[frame["seed"] < SEARCH_SEED]
        frame = frame.drop_duplicates(["arm", "size", "equal_steps", *PAIR], keep="last")
        same = frame["equal_steps"]
        return Runs(frame[~same], reference, frame[same | (frame["arm"] == "dense")])

    @functools.cached_property
    def recoveries(self) -> pd.DataFrame:
        """The part of the routed blocks' worth that arms recover: a row for budget and seed.

        That worth is the mean over the seeds of a budget.
        """
        frame = self.equal_steps[self.equal_steps["size"] == self.reference]
        losses = frame.pivot(index=PAIR, columns="arm", values="causal")
        if not {"dense", "left-out"} <= set(losses):
            return pd.DataFrame()
        gains = losses.groupby(level="budget", group_keys=False).apply(recoveries)
        return gains.drop(columns=["dense", "left-out"])

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
