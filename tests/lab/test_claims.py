"""Fits, intervals and verdicts, against numbers known beforehand."""

import dataclasses
import math

import numpy as np
import pandas as pd
import pytest
import scipy.stats

from mode.lab.evidence.claims import CLAIMS, accuracy
from mode.lab.evidence.curves import Curve, Parabola
from mode.lab.evidence.frame import Runs, to_frame
from mode.lab.evidence.presets import sizes_like
from mode.lab.evidence.records import Mark, RunRecord
from mode.lab.intervals import Interval
from tests.lab.records import REFERENCE, made_up, pairs


REPRODUCED, CONTRADICTED, UNRESOLVED = "reproduced", "contradicted", "not resolved at this scale"


def runs_of(records: list[RunRecord]) -> Runs:
    """The runs as they are compared. One run of an arm that no claim names is always there."""
    return Runs.of(to_frame([*records, made_up("other", 9.0)]), REFERENCE)


def changed(**fields: object) -> dict[str, object]:
    """The reference size with other fields, as an argument of `made_up`."""
    return {"size": dataclasses.replace(REFERENCE, **fields)}  # pyright: ignore


# Fits.


def parabola(parameters: list[float], losses: list[float]) -> Parabola:
    frame = pd.DataFrame({"parameters": parameters, "causal": losses, "forward_flops": 1.0})
    return Parabola(frame)


def test_a_fit_recovers_a_parabola_and_its_lowest_point() -> None:
    parameters = [1e3, 3e3, 1e4, 5e4]
    optimum = 7e3
    losses = [0.05 * math.log(n / optimum) ** 2 + 2.5 for n in parameters]
    fit = parabola(parameters, losses)
    assert fit.optimum == pytest.approx(optimum, rel=1e-6)
    assert fit.lowest == pytest.approx(2.5, abs=1e-9)
    assert fit.at(2e4) == pytest.approx(0.05 * math.log(2e4 / optimum) ** 2 + 2.5)
    assert fit.sizes(3) == pytest.approx([1e3, math.sqrt(5e7), 5e4])


@pytest.mark.parametrize("optimum", [5e2, 9e4])
def test_a_lowest_point_outside_the_sizes_does_not_count(optimum: float) -> None:
    parameters = [1e3, 1e4, 5e4]
    losses = [0.05 * math.log(n / optimum) ** 2 for n in parameters]
    assert math.isnan(parabola(parameters, losses).optimum)


def test_a_fit_without_a_lowest_point_has_no_optimum() -> None:
    losses = [-((math.log(n) - 9) ** 2) for n in (1e3, 1e4, 5e4)]
    fit = parabola([1e3, 1e4, 5e4], losses)
    assert math.isnan(fit.optimum)
    assert math.isnan(fit.lowest)


def over_sizes(arm: str, optimum: float, height: float, seeds: int = 2) -> list[RunRecord]:
    """Runs on a parabola, each seed's a little higher."""
    shapes = dict(zip((500, 1000, 2000, 4000), _SHAPES, strict=True))
    flops = 1 if arm == "mod" else 2
    return [
        made_up(
            arm,
            0.1 * math.log(parameters / optimum) ** 2 + height + 0.01 * seed,
            size=size,
            seed=seed,
            parameters=parameters,
            forward=float(flops * parameters),
        )
        for parameters, size in shapes.items()
        for seed in range(seeds)
    ]


_SHAPES = sizes_like(REFERENCE, "8x2", "16x2", "24x2", "32x2")


def curves(records: list[RunRecord]) -> list[Curve]:
    return runs_of(records).curves


def test_curves_are_over_the_sizes_of_the_dense_arm() -> None:
    records = over_sizes("dense", 1500, 2.0) + over_sizes("mod", 1200, 1.9)
    odd = made_up("mod", 0.1, size=sizes_like(REFERENCE, "40x2")[0], parameters=9000)
    searched = made_up("dense", 0.1, size=_SHAPES[0], seed=1000, parameters=500)
    long = made_up("mod", 0.1, **changed(length=64))  # pyright: ignore
    dense, mod = curves([*records, odd, searched, long])
    assert (dense.arm, mod.arm) == ("dense", "mod")
    assert dense.fit.optimum == pytest.approx(1500, rel=1e-6)
    assert dense.fit.lowest == pytest.approx(2.005)
    assert {seed: fit.lowest for seed, fit in dense.seeds.items()} == {
        0: pytest.approx(2.0),
        1: pytest.approx(2.01),
    }
    assert dense.misfit == pytest.approx(0, abs=1e-9)
    assert mod.fit.optimum == pytest.approx(1200, rel=1e-6)
    # MoD is at dense's optimum, of 3000 FLOPs, where 0.1 log(n / 1200)^2 = 0.1: below all sizes.
    assert mod.fit.cost_of(dense.fit) == pytest.approx(500 / 3000, rel=1e-2)
    assert dense.fit.cost_of(mod.fit) == math.inf
    assert math.isnan(mod.fit.cost_of(parabola([1.0, 2.0, 3.0], [3.0, 2.0, 1.0])))


def test_the_misfit_is_the_largest_distance_of_a_size_from_the_fit() -> None:
    records = over_sizes("dense", 1500, 2.0)
    records[2] = made_up("dense", 3.0, size=_SHAPES[1], parameters=1000, forward=2000.0)
    (curve,) = curves(records)
    points = [(record.parameters, record.end.causal) for record in records]
    parameters, losses = np.transpose(points)
    by_hand = np.polyfit(np.log(parameters), losses, 2)
    distances = [
        abs(np.mean(losses[parameters == size]) - np.polyval(by_hand, math.log(size)))
        for size in set(parameters)
    ]
    assert curve.misfit == pytest.approx(max(distances))
    assert curve.misfit > 0.1


def test_seeds_of_some_sizes_alone_do_not_change_the_fit() -> None:
    records = over_sizes("dense", 1500, 2.0)
    more = made_up("dense", 9.0, size=_SHAPES[1], seed=7, parameters=1000, forward=2000.0)
    (one,), (other,) = curves(records), curves([*records, more])
    assert other.fit.polynomial == one.fit.polynomial
    assert other.seeds.keys() == one.seeds.keys() == {0, 1}
    # Until a seed has all sizes there is nothing better than all runs.
    (partly,) = curves(records[1:7])
    assert (len(partly.runs), partly.seeds) == (6, {})


def test_an_arm_of_two_sizes_has_no_curve() -> None:
    records = over_sizes("dense", 1500, 2.0) + over_sizes("mod", 1200, 1.9)[:4]
    assert [curve.arm for curve in curves(records)] == ["dense"]


# Intervals.


def test_intervals_are_those_of_student() -> None:
    values = np.random.default_rng(0).normal(0.3, 0.2, 7)
    interval = Interval.of(values)
    low, high = scipy.stats.t.interval(0.95, 6, np.mean(values), scipy.stats.sem(values))
    assert (interval.low, interval.high) == pytest.approx((low, high))
    assert (interval.mean, interval.count) == (pytest.approx(values.mean()), 7)
    one = Interval.of([5.0])
    assert (one.mean, one.low, one.high, one.count) == (5.0, -math.inf, math.inf, 1)
    assert one.text() == "+5.0000 (1 run)"
    equal = Interval.of([2.0, 2.0])
    assert (equal.low, equal.high) == (2.0, 2.0)


# Claims.


def judged(number: int, records: list[RunRecord]) -> tuple[str, str]:
    return CLAIMS[number].test(runs_of(records))


BETTER = {
    0: ("mod", "mod-random"),
    3: ("mod", "mod-every"),
    12: ("mod-predictor", "dense"),
    13: ("mode-staged", "moe"),
    14: ("mode-staged", "mod"),
    15: ("mode-integrated", "moe-reduced"),
    16: ("mod", "mod-raw"),
    17: ("mod", "mod-sigmoid"),
    18: ("mod", "left-out"),
}


@pytest.mark.parametrize("number", BETTER)
def test_claims_of_one_arm_over_another(number: int) -> None:
    one, other = BETTER[number]
    numbers, verdict = judged(number, pairs(one, other, 0.05))
    assert verdict == REPRODUCED
    assert f"{other} minus {one}: +0.0500 bits per byte (" in numbers
    assert "6 runs), +0.0500 (" in numbers
    assert "at 1e+08" in numbers
    assert judged(number, pairs(one, other, -0.05))[1] == CONTRADICTED
    assert judged(number, pairs(one, other, 1e-5))[1] == UNRESOLVED


def test_one_run_resolves_nothing() -> None:
    numbers, verdict = judged(0, [made_up("mod", 1.0), made_up("mod-random", 6.0)])
    assert (numbers, verdict) == ("mod-random minus mod: +5.0000 bits per byte (1 run)", UNRESOLVED)


def test_the_claim_of_capacity() -> None:
    def records(other: float) -> list[RunRecord]:
        wide, narrow = (dataclasses.replace(REFERENCE, capacity=c) for c in (0.5, 0.0625))
        return [*pairs("mod", "mod", 0.05, size=wide), *pairs("mod", "mod", other, size=narrow)]

    numbers, verdict = judged(4, records(0.03))
    assert verdict == REPRODUCED
    assert numbers.startswith("loss at 0.0625 minus at 0.125: +0.0300")
    assert "; loss at 0.5 minus at 0.125: +0.0500" in numbers
    assert judged(4, records(-0.03))[1] == CONTRADICTED
    assert judged(4, records(0.0))[1] == UNRESOLVED


def test_the_claims_of_the_fits() -> None:
    dense = over_sizes("dense", 1500, 2.0)
    better = dense + over_sizes("mod", 1200, 1.9)
    worse = dense + over_sizes("mod", 1200, 2.1)
    numbers, verdict = judged(5, better)
    assert verdict == REPRODUCED
    assert "mod below dense: +4.99 %" in numbers
    assert judged(5, worse)[1] == CONTRADICTED
    # MoD's smallest size, of 500 parameters and as many FLOPs, of the dense optimum's 3000.
    numbers, verdict = judged(6, better)
    assert verdict == REPRODUCED
    assert "of that optimum: 0.17 (" in numbers
    numbers, verdict = judged(6, worse)
    assert verdict == CONTRADICTED
    assert "never in 2 of 2 pairs" in numbers
    later = [r.model_copy(update={"run": r.run.model_copy(update={"budget": 3e8})}) for r in worse]
    numbers, verdict = judged(6, [*better, *later])
    assert verdict == UNRESOLVED
    assert "never in 2 of 4 pairs" in numbers
    outside = over_sizes("dense", 50, 2.0) + over_sizes("mod", 50, 1.9)
    for number in (5, 6):
        numbers, verdict = judged(number, outside)
        assert verdict == UNRESOLVED
        assert "no optimum is between the sizes run" in numbers


@pytest.mark.parametrize(("number", "better"), [(1, "mod"), (2, "dense")])
def test_the_claims_about_random_routing_over_sizes(number: int, better: str) -> None:
    random = over_sizes("mod-random", 1400, 2.0)
    dense = [] if better == "dense" else over_sizes("dense", 1500, 2.0)
    for height, verdict in ((1.9, REPRODUCED), (2.1, CONTRADICTED), (2.0, UNRESOLVED)):
        records = [*dense, *random, *over_sizes(better, 1200, height)]
        assert judged(number, records)[1] == verdict


def test_fits_are_paired_by_their_seeds() -> None:
    """A seed that one arm lacks pairs with nothing, not with the next."""
    dense = over_sizes("dense", 1500, 2.0, seeds=3)
    mod = [record for record in over_sizes("mod", 1200, 1.9, seeds=3) if record.run.seed > 0]
    numbers, verdict = judged(5, [*dense, *mod])
    gains = [1 - (1.9 + 0.01 * seed) / (2.0 + 0.01 * seed) for seed in (1, 2)]
    assert f"{100 * sum(gains) / 2:+.2f} %" in numbers
    assert "2 runs" in numbers
    assert verdict == REPRODUCED


def test_the_claim_of_depth() -> None:
    records = [made_up("mod", 9.0, seed=seed) for seed in range(3)]
    deeper, wider, other = (
        dataclasses.replace(REFERENCE, **field)
        for field in ({"depth": 4}, {"dim": 24}, {"dim": 40})
    )
    for seed in range(3):
        records += [
            made_up("mod", 2.0 + seed, size=deeper, seed=seed, forward=3000.0),
            made_up("mod", 2.1 + seed + 1e-3 * seed, size=wider, seed=seed, forward=3100.0),
            made_up("mod", 0.1 + seed, size=other, seed=seed, forward=5000.0),
        ]
    numbers, verdict = judged(7, records)
    assert verdict == REPRODUCED
    assert numbers.startswith("24x2 minus 16x4, at 1.03 of its forward FLOPs: +0.1010")


@pytest.mark.parametrize("seed", range(3))
def test_accuracy_is_that_of_the_confusion_matrix(seed: int) -> None:
    rng = np.random.default_rng(seed)
    top_k, rule = rng.random(4000) < 0.125, rng.random(4000) < 0.2
    both = (top_k & rule).sum()
    frame = pd.DataFrame(
        {
            "precision": [both / rule.sum(), 0.0],
            "recall": [both / top_k.sum(), 0.0],
            "slots": [rule.mean(), 0.0],  # the second rule selects nothing
            "slots_top_k": top_k.mean(),
        }
    )
    assert accuracy(frame).tolist() == pytest.approx([(top_k == rule).mean(), (~top_k).mean()])


def test_the_claims_of_the_predictor() -> None:
    def predicted(recall: float, gap: float) -> list[RunRecord]:
        mark = Mark(
            step=10, top_k=2.0, causal=2.0 + gap, precision=0.98, recall=recall, slots=0.125
        )
        return [made_up("mod-predictor", 0.0, seed=seed, mark=mark) for seed in range(3)]

    numbers, verdict = judged(8, predicted(0.98, 0.0))
    assert verdict == REPRODUCED
    assert "after an eighth" in numbers
    assert "87.5 % of a rule that selects nothing" in numbers
    assert judged(8, predicted(0.5, 0.0))[1] == CONTRADICTED
    assert judged(11, predicted(0.9, 0.001))[1] == REPRODUCED
    assert judged(11, predicted(0.9, 0.01))[1] == CONTRADICTED


@pytest.mark.parametrize(
    ("per_cent", "predictor", "bce"),
    [(0.0, REPRODUCED, CONTRADICTED), (0.25, CONTRADICTED, REPRODUCED)],
)
def test_the_costs_of_auxiliary_losses(per_cent: float, predictor: str, bce: str) -> None:
    for number, arm, expected in ((9, "mod-predictor", predictor), (10, "mod-bce-0.1", bce)):
        records = [
            made_up(name, (2.0 + seed) * (1 + higher + 1e-6 * seed), seed=seed)
            for seed in range(3)
            for name, higher in (("mod-after", 0.0), (arm, per_cent / 100))
        ]
        assert judged(number, records)[1] == expected


def equal_steps(mod: float, random: float) -> list[RunRecord]:
    """Runs whose routed blocks are worth 0.2 in the mean, 0.1 or 0.3 by seed, and two arms."""
    records = []
    for seed, worth in enumerate((0.1, 0.2, 0.3)):
        losses = {"left-out": 2.0, "mod": 2.0 - 0.2 * mod, "mod-random": 2.0 - 0.2 * random}
        records.append(made_up("dense", 2.0 - worth, seed=seed))
        records += [made_up(arm, x, seed=seed, equal_steps=True) for arm, x in losses.items()]
    return records


def test_recovery_is_of_the_mean_worth() -> None:
    """Not of that of each seed, and of runs of equal steps alone."""
    records = [*equal_steps(0.9, 0.5), made_up("mod", 9.0), made_up("mod-random", 9.0)]
    gains = runs_of(records).recoveries
    assert gains["mod"].tolist() == pytest.approx([0.9] * 3)
    assert gains["mod-random"].tolist() == pytest.approx([0.5] * 3)
    assert list(gains) == ["mod", "mod-random"]
    assert runs_of([made_up("dense", 1.0)]).recoveries.empty


def test_claims_of_recovery() -> None:
    """Above 0, and the difference of learned and random."""
    records = equal_steps(0.9, -0.5)
    numbers, verdict = judged(19, records)
    assert verdict == REPRODUCED
    assert "recovery of mod: +90 % (+90 to +90, 3 runs)" in numbers
    assert judged(20, records)[1] == CONTRADICTED
    numbers, verdict = judged(21, records)
    assert verdict == REPRODUCED
    assert "recovery of mod minus mod-random: +140 %" in numbers


def test_claims_of_use() -> None:
    """What the loss of the trained model rises by where its routed updates are left out."""
    used = Mark(step=10, top_k=2.0, causal=2.0, precision=1, recall=1, slots=0.125, without=2.25)
    records = [made_up("mod", 2.0, mark=used, seed=seed) for seed in range(2)]
    numbers, verdict = judged(22, records)
    assert numbers == "mod without its updates: +0.2500 bits per byte (+0.2500 to +0.2500, 2 runs)"
    assert verdict == REPRODUCED
    unused = used.model_copy(update={"without": 1.99})
    records = [made_up("mod-random", 2.0, mark=unused, seed=seed) for seed in range(2)]
    assert judged(23, records)[1] == CONTRADICTED
    assert judged(22, records)[1] == "not run"


def test_claims_without_runs_say_so() -> None:
    for claim in CLAIMS:
        assert claim.test(runs_of([])) == ("no such runs", "not run")
