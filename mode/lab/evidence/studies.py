"""Questions beside the paper's claims: how to close the gap, when learning to route pays, and how
much is leaked.

The gap is that between the loss under top-k, which looks at the future, and the loss as a sampler
would get it. A rule that spends more compute than top-k did is not a better rule, so what each
spends stands beside its loss.
"""

import dataclasses
from collections.abc import Iterable, Sequence

from ..arms import Size
from .cells import Cells, causal, gap_per_cent, top_k
from .records import Record
from .statistics import Spread


_LEAKING = ("mod-after", "moe-after")


@dataclasses.dataclass(frozen=True)
class Closing:
    """One arm at the reference, at one budget.

    **Attributes:**

    - `arm`, `budget`: which.
    - `top_k`, `causal`, `gap`: bits per byte over seeds; the gap is their difference.
    - `compute`: slots filled per token, causally, by the outermost router; `None` for a dense arm.
    """

    arm: str
    budget: float
    top_k: Spread
    causal: Spread
    gap: Spread
    compute: Spread | None


def _gap(record: Record) -> float:
    return causal(record) - top_k(record)


def closing(cells: Cells, arms: Sequence[str]) -> list[Closing]:
    """Arms at the reference by budget, from the lowest causal loss to the highest."""
    found = []
    for budget in cells.budgets:
        rows = [_row(arm, budget, here) for arm in arms if (here := _at(cells, arm, budget))]
        found += sorted(rows, key=lambda row: row.causal.mean)
    return found


def _row(arm: str, budget: float, records: Sequence[Record]) -> Closing:
    top, low, gap = (Spread.of([value(one) for one in records]) for value in (top_k, causal, _gap))
    return Closing(arm, budget, top, low, gap, _filled(records))


def _filled(records: Iterable[Record]) -> Spread | None:
    """Slots per token, causally; `None` where nothing is routed."""
    found = [one.end.compute for one in records if one.end.compute is not None]
    return Spread.of(found) if found else None


def _at(cells: Cells, arm: str, budget: float) -> list[Record]:
    return [record for (spent, _), record in cells.at(arm).items() if spent == budget]


@dataclasses.dataclass(frozen=True)
class Against:
    """One arm at the reference against `mod`, which is what the library does by default.

    **Attributes:**

    - `arm`: which.
    - `causal`: its causal loss less that of `mod`, over the seeds and budgets of both.
    - `slots`: filled per token, causally; `None` for a dense arm.
    """

    arm: str
    causal: Spread
    slots: float | None


def against_default(cells: Cells, arms: Sequence[str]) -> list[Against]:
    """Every other arm, from the lowest causal loss to the highest."""
    found = []
    for arm in arms:
        apart = cells.paired(("mod", cells.reference), (arm, cells.reference))
        if arm == "mod" or apart is None:
            continue
        filled = _filled(cells.at(arm).values())
        found.append(Against(arm, apart, None if filled is None else filled.mean))
    return sorted(found, key=lambda row: row.causal.mean)


@dataclasses.dataclass(frozen=True)
class Learned:
    """What learning where to route gained over routing by noise, at one size and budget.

    **Attributes:**

    - `size`, `budget`: which.
    - `steps`: that the router had to learn in.
    - `gain`: causal loss of `mod-random` less that of `mod`, over seeds.
    """

    size: Size
    budget: float
    steps: int
    gain: Spread


def learned(cells: Cells) -> list[Learned]:
    """Of every size in features and layers at which both were run, by steps."""
    found = []
    for size in cells.sizes("mod", dim=None, depth=None, heads=None):
        steps = {budget: record.steps for (budget, _), record in cells.at("mod", size).items()}
        for budget in sorted(steps):
            gain = cells.paired(("mod", size), ("mod-random", size), budget=budget)
            if gain is not None:
                found.append(Learned(size, budget, steps[budget], gain))
    return sorted(found, key=lambda row: row.steps)


@dataclasses.dataclass(frozen=True)
class Leak:
    """One arm, trained under top-k to the end and run causally, where one field varies.

    **Attributes:**

    - `arm`: which.
    - `field`: what varies, `length` (the routing group) or `depth`.
    - `value`: of it.
    - `share`: causal loss over top-k loss, less one, in per cent, over seeds.
    """

    arm: str
    field: str
    value: int
    share: Spread


def leaks(cells: Cells) -> list[Leak]:
    """Of every length and depth that was run, at the smallest budget of each."""
    varied = {"length": ("length", "batch"), "depth": ("depth",)}
    found = []
    for arm in _LEAKING:
        for field, fields in varied.items():
            sizes = cells.sizes(arm, **dict.fromkeys(fields))
            for size in sorted(sizes, key=lambda size: getattr(size, field)):
                records = cells.at(arm, size)
                least = min(budget for budget, _ in records)
                shares = [
                    gap_per_cent(record)
                    for (budget, _), record in records.items()
                    if budget == least
                ]
                found.append(Leak(arm, field, getattr(size, field), Spread.of(shares)))
    return found


def comparable(cells: Cells, names: Sequence[str]) -> list[str]:
    """The arms to compare for the gap: dense, and those that route every other layer's depth alone,
    that were run."""
    return [
        name
        for name in names
        if cells.at(name)
        and (name in ("dense", "mod") or name.startswith("mod-"))
        and name != "mod-every"
    ]
