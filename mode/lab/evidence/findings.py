"""Tests of claims: each a function of what a store holds that gives numbers and a verdict.

A verdict is by Student's interval of confidence 0.95 of a mean over seeds and budgets, runs paired
by both: *reproduced* where it lies on the claim's side, *contradicted* where it lies on the other,
and otherwise *not resolved at this scale*.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

from ..arms import Size
from .cells import Cell, Cells, gap_per_cent, top_k
from .fit import Curve, Parabola
from .records import Mark
from .statistics import CONTRADICTED, REPRODUCED, UNRESOLVED, Spread, Verdict


@dataclasses.dataclass(frozen=True)
class Finding:
    """What became of a claim.

    **Attributes:**

    - `numbers`: means, intervals and counts, in words.
    - `verdict`: what follows; `None` where the runs are not there.
    """

    numbers: str
    verdict: Verdict | None


Test = Callable[[Cells, Sequence[Curve]], Finding]

_MISSING = Finding("the runs are not there", None)


def better(one: str, other: str) -> Test:
    """`one` has a lower loss than `other`, at the reference."""

    def test(cells: Cells, curves: Sequence[Curve]) -> Finding:
        del curves
        size = cells.reference
        found = cells.paired((one, size), (other, size))
        if found is None:
            return _MISSING
        each = _by_budget(cells, (one, size), (other, size))
        return Finding(f"{other} less {one}: {found.text(4)} bits per byte; {each}", found.above())

    return test


def _by_budget(cells: Cells, one: Cell, other: Cell) -> str:
    parts = []
    for budget in cells.budgets:
        found = cells.paired(one, other, budget=budget)
        if found is not None:
            parts.append(f"{found.text(4)} at {budget:.3g}")
    return ", ".join(parts)


def best_capacity(cells: Cells, curves: Sequence[Curve]) -> Finding:
    """The reference's capacity against every other that was run."""
    del curves
    others = [size for size in cells.sizes("mod", capacity=None) if size != cells.reference]
    if not others or not cells.at("mod"):
        return _MISSING
    parts, verdicts = [], []
    for size in sorted(others, key=lambda size: size.capacity):
        found = cells.paired(("mod", cells.reference), ("mod", size))
        if found is not None:
            parts.append(f"{size.capacity:g}: {found.text(4)}")
            verdicts.append(found.above())
    best = REPRODUCED if all(one == REPRODUCED for one in verdicts) else UNRESOLVED
    verdict = CONTRADICTED if CONTRADICTED in verdicts else best
    return Finding(f"loss less that at {cells.reference.capacity:g}: {'; '.join(parts)}", verdict)


def optimum(lower: str, higher: str) -> Test:
    """The lowest points of the parabolas of each seed, in per cent of the second arm's."""

    def test(cells: Cells, curves: Sequence[Curve]) -> Finding:
        del cells
        pairs = _both(curves, higher, lower)
        if pairs is None:
            return _MISSING
        differences, parts, of = [], [], 0
        for base, other in pairs:
            both = _fits(base, other)
            of_budget = [
                100 * (1 - two.at(two.lowest) / one.at(one.lowest))
                for one, two in both
                if one.lowest is not None and two.lowest is not None
            ]
            differences += of_budget
            of += len(both)
            if of_budget:
                parts.append(f"{sum(of_budget) / len(of_budget):+.2f} % at {base.budget:.3g}")
        if not differences:
            return Finding("no optimum of both arms is bracketed by the sizes run", UNRESOLVED)
        found = Spread.of(differences)
        text = f"{lower} below {higher}: {found.text(2, ' %')} of its loss; {', '.join(parts)}"
        return Finding(text + _usable(len(differences), of), found.above())

    return test


def _both(curves: Sequence[Curve], one: str, other: str) -> list[tuple[Curve, Curve]] | None:
    """Two arms' curves of each budget."""
    by_name = {(curve.arm, curve.budget): curve for curve in curves}
    budgets = sorted({curve.budget for curve in curves})
    found = [
        (by_name[one, budget], by_name[other, budget])
        for budget in budgets
        if (one, budget) in by_name and (other, budget) in by_name
    ]
    return found or None


def _fits(one: Curve, other: Curve) -> list[tuple[Parabola, Parabola]]:
    """Two curves' fits of each seed that both have."""
    first, second = one.by_seed, other.by_seed
    return [(first[seed], second[seed]) for seed in sorted(first.keys() & second.keys())]


def forward_share(cells: Cells, curves: Sequence[Curve]) -> Finding:
    """The smallest share of the dense optimum's forward FLOPs at which MoD is as good, by seed."""
    del cells
    pairs = _both(curves, "dense", "mod")
    if pairs is None:
        return _MISSING
    shares, parts, of = [], [], 0
    for dense, routed in pairs:
        both = _fits(dense, routed)
        found = [
            share for one, other in both if (share := _share(dense, one, routed, other)) is not None
        ]
        shares += found
        of += len(both)
        mean = f"{sum(found) / len(found):.2f}" if found else "dense optimum not bracketed"
        parts.append(f"{mean} at {dense.budget:.3g}")
    each = "; ".join(parts)
    if not shares:
        return Finding(each, UNRESOLVED)
    if math.inf in shares:
        never = shares.count(math.inf)
        verdict = CONTRADICTED if never == len(shares) else UNRESOLVED
        return Finding(f"never in {never} of {len(shares)} pairs of fits; {each}", verdict)
    spread = Spread.of(shares)
    share = spread.text(2).replace("+", "")
    text = f"share of the dense optimum's forward FLOPs: {share}; {each}"
    return Finding(text + _usable(len(shares), of), spread.below(1.0))


def _share(dense: Curve, one: Parabola, routed: Curve, other: Parabola) -> float | None:
    """Of one seed; at most so much where MoD's smallest size is as good, and infinite where none
    is. `None` where the dense optimum is not bracketed."""
    if one.lowest is None:
        return None
    found = routed.cheapest(one.at(one.lowest), other)
    return math.inf if found is None else found[0] / dense.forward_flops(one.lowest)


def _usable(used: int, of: int) -> str:
    """Which pairs of fits an interval is from."""
    return "" if used == of else f"; {of - used} of {of} pairs of fits not bracketed"


def deeper_than_wider(cells: Cells, curves: Sequence[Curve]) -> Finding:
    """Of two models beyond the reference, the deeper and the wider one."""
    del curves
    beyond = [
        size
        for size in cells.sizes("mod", dim=None, depth=None, heads=None)
        if size != cells.reference
    ]
    deeper = [size for size in beyond if size.dim == cells.reference.dim]
    wider = [size for size in beyond if size.depth == cells.reference.depth]
    pairs = [(one, other) for one in deeper for other in wider if _alike(cells, one, other)]
    if not pairs:
        return _MISSING
    one, other = pairs[0]
    found = cells.paired(("mod", one), ("mod", other))
    if found is None:
        return _MISSING
    costs = [next(iter(cells.at("mod", size).values())).forward_flops for size in (one, other)]
    text = (
        f"{other.dim}x{other.depth} less {one.dim}x{one.depth}: {found.text(4)} bits per byte, at "
        f"{costs[1] / costs[0]:.2f} of its forward FLOPs"
    )
    return Finding(text, found.above())


def _alike(cells: Cells, deeper: Size, wider: Size) -> bool:
    """Whether the two cost the same, within a tenth, and more than the reference."""
    costs = []
    for size in (deeper, wider, cells.reference):
        found = cells.at("mod", size)
        if not found:
            return False
        costs.append(next(iter(found.values())).forward_flops)
    return abs(costs[0] / costs[1] - 1) < 0.1 and min(costs[:2]) > costs[2]


def accuracy(mark: Mark, share: float) -> float | None:
    """How often a rule says what top-k does, from its precision and recall.

    **Arguments:**

    - `share`: of the tokens that top-k takes.
    """
    if mark.precision is None or mark.recall is None:
        return None
    right = mark.recall * share
    wrong = right * (1 / mark.precision - 1) if mark.precision > 0 else (mark.compute or 0.0)
    return 1 - wrong - (share - right)


def predictor_accuracy(cells: Cells, curves: Sequence[Curve]) -> Finding:
    """At the marks of the predictor's runs."""
    del curves
    runs = list(cells.at("mod-predictor").values())
    if not runs:
        return _MISSING

    def at(place: int) -> list[float]:
        found = []
        for record in runs:
            marks = [*record.marks, record.end]
            value = accuracy(marks[min(place, len(marks) - 1)], record.compute_top_k or 0.0)
            found += [] if value is None else [100 * value]
        return found

    end = Spread.of(at(10**6))
    places = [(0, "after an eighth"), (3, "after half")]
    parts = [f"{sum(at(place)) / len(runs):.1f} % {when}" for place, when in places]
    precision, recall = (
        sum(getattr(record.end, name) for record in runs) / len(runs)
        for name in ("precision", "recall")
    )
    trivial = 100 * (1 - (runs[0].compute_top_k or 0.0))
    text = (
        f"accuracy {', '.join(parts)}, {end.text(1, ' %')} at the end (saying never: "
        f"{trivial:.1f} %); precision {precision:.2f}, recall {recall:.2f}"
    )
    return Finding(text, end.above(97.0))


def costs(arm: str, low: float, high: float) -> Test:
    """What an auxiliary loss adds to the loss under top-k, in per cent, against none."""

    def test(cells: Cells, curves: Sequence[Curve]) -> Finding:
        del curves
        size = cells.reference
        found = cells.paired(("mod-after", size), (arm, size), top_k, per_cent=True)
        if found is None:
            return _MISSING
        outside = found.low > high or found.high < low
        inside = low <= found.low and found.high <= high
        verdict = CONTRADICTED if outside else REPRODUCED if inside else UNRESOLVED
        return Finding(f"{arm} less mod-after: {found.text(2, ' %')} of the top-k loss", verdict)

    return test


def gap(arm: str, most: float) -> Test:
    """How much higher the causal loss of an arm is than its top-k loss, in per cent."""

    def test(cells: Cells, curves: Sequence[Curve]) -> Finding:
        del curves
        found = cells.within((arm, cells.reference), gap_per_cent)
        if found is None:
            return _MISSING
        return Finding(f"{found.text(2, ' %')} of the top-k loss", found.below(most))

    return test
