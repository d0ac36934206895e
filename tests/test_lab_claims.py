"""Fits, intervals and verdicts, against numbers known beforehand."""

import dataclasses
import math

import numpy as np
import pytest
import scipy.stats

from mode.lab.evidence.cells import Cells
from mode.lab.evidence.claims import CLAIMS
from mode.lab.evidence.findings import accuracy
from mode.lab.evidence.fit import Parabola, curves
from mode.lab.evidence.grids import sized
from mode.lab.evidence.records import Mark, Record
from mode.lab.evidence.statistics import CONTRADICTED, REPRODUCED, UNRESOLVED, Spread
from mode.lab.evidence.studies import against_default, closing, comparable, leaks, learned
from tests.records import REFERENCE, made_up


# Fits.


def test_a_parabola_is_found_again_and_its_lowest_point() -> None:
    parameters = [1e3, 3e3, 1e4, 5e4]
    lowest = 7e3
    losses = [0.05 * (math.log(n) - math.log(lowest)) ** 2 + 2.5 for n in parameters]
    fit = Parabola.through(parameters, losses)
    assert fit.lowest == pytest.approx(lowest, rel=1e-6)
    assert fit.at(lowest) == pytest.approx(2.5, abs=1e-9)
    assert fit.at(2e4) == pytest.approx(0.05 * math.log(2e4 / lowest) ** 2 + 2.5)


@pytest.mark.parametrize("lowest", [5e2, 1e3, 5e4, 9e4])
def test_a_lowest_point_outside_the_sizes_is_not_bracketed(lowest: float) -> None:
    parameters = [1e3, 1e4, 5e4]
    losses = [0.05 * math.log(n / lowest) ** 2 for n in parameters]
    found = Parabola.through(parameters, losses).lowest
    assert found is None or lowest in (1e3, 5e4)
    assert Parabola.through(parameters, [-loss for loss in losses]).lowest is None


def test_two_sizes_are_no_fit() -> None:
    with pytest.raises(ValueError, match=r"at least 3 for a fit of loss against size, got 2"):
        Parabola.through([10.0, 20.0, 20.0], [1.0, 2.0, 3.0])


def over_sizes(arm: str, lowest: float, height: float, seeds: int = 2) -> list[Record]:
    """Runs on a parabola, each seed's a little higher."""
    records = []
    for name, parameters in (("8x2", 500), ("16x2", 1000), ("24x2", 2000), ("32x2", 4000)):
        for seed in range(seeds):
            loss = 0.1 * math.log(parameters / lowest) ** 2 + height + 0.01 * seed
            share = 0.5 if arm == "mod" else 1.0
            records.append(
                made_up(
                    arm,
                    loss,
                    size=sized(REFERENCE, name),
                    seed=seed,
                    parameters=parameters,
                    forward=share * 2 * parameters,
                )
            )
    return records


def test_curves_are_over_the_sizes_of_the_dense_arm() -> None:
    records = over_sizes("dense", 1500, 2.0) + over_sizes("mod", 1200, 1.9)
    odd = made_up("mod", 0.1, size=sized(REFERENCE, "40x2"), parameters=9000)
    searched = made_up("dense", 0.1, size=sized(REFERENCE, "8x2"), seed=1000, parameters=500)
    long = dataclasses.replace(REFERENCE, length=64)
    dense, mod = curves([*records, odd, searched, made_up("mod", 0.1, size=long)], REFERENCE)
    assert (dense.arm, mod.arm) == ("dense", "mod")
    assert dense.fit.lowest == pytest.approx(1500, rel=1e-6)
    assert dense.lowest == pytest.approx(2.005)
    assert dense.spread == pytest.approx(0.01 / math.sqrt(2))
    assert dense.misfit == pytest.approx(0, abs=1e-9)
    assert mod.fit.lowest == pytest.approx(1200, rel=1e-6)
    # MoD is at dense's optimum where 0.1 log(n / 1200)^2 = 0.1: at 1200 / e, a size not measured.
    found = mod.cheapest(2.005)
    assert found is not None
    assert found[0] == pytest.approx(1200 / math.e, rel=0.2)
    assert mod.cheapest(1.0) is None
    assert not mod.cheapest(5.0)[1]  # pyright: ignore[reportOptionalSubscript]


def test_the_misfit_is_the_worst_distance_of_a_size_from_the_fit() -> None:
    records = over_sizes("dense", 1500, 2.0)
    records[2] = made_up(
        "dense", 3.0, size=records[2].run.size, parameters=records[2].parameters, forward=2000.0
    )
    (curve,) = curves(records, REFERENCE)
    points = [(record.parameters, record.end.bits_causal) for record in records]
    parameters, losses = np.transpose(points)
    by_hand = np.polyfit(np.log(parameters), losses, 2)
    apart = []
    for size in set(parameters):
        mean = np.mean(losses[parameters == size])
        apart.append(abs(mean - np.polyval(by_hand, math.log(size))))
    assert curve.misfit == pytest.approx(max(apart))
    assert curve.misfit > 0.1


def test_seeds_of_some_sizes_alone_do_not_pull_at_the_fit() -> None:
    records = over_sizes("dense", 1500, 2.0)
    more = made_up("dense", 9.0, size=records[2].run.size, seed=7, parameters=1000, forward=2000.0)
    (one,), (other,) = curves(records, REFERENCE), curves([*records, more], REFERENCE)
    assert other == one
    # Until a seed has all sizes there is nothing better than all runs.
    (partly,) = curves(records[1:7], REFERENCE)
    assert (len(partly.records), partly.seeds) == (6, ())


def test_an_arm_of_two_sizes_has_no_curve() -> None:
    records = over_sizes("dense", 1500, 2.0) + over_sizes("mod", 1200, 1.9)[:4]
    assert [curve.arm for curve in curves(records, REFERENCE)] == ["dense"]


# Statistics.


def test_intervals_are_those_of_student() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(0.3, 0.2, 7).tolist()
    found = Spread.of(values)
    low, high = scipy.stats.t.interval(0.95, 6, np.mean(values), scipy.stats.sem(values))
    assert (found.low, found.high) == pytest.approx((low, high))
    assert found.deviation == pytest.approx(np.std(values, ddof=1))
    assert found.count == 7


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ([0.1, 0.11, 0.09], REPRODUCED),
        ([-0.1, -0.11, -0.09], CONTRADICTED),
        ([0.1, -0.11, 0.09], UNRESOLVED),
        ([5.0], UNRESOLVED),  # one run resolves nothing
    ],
)
def test_verdicts_follow_the_interval(values: list[float], verdict: str) -> None:
    assert Spread.of(values).above() == verdict
    assert Spread.of([-value for value in values]).below() == verdict


def test_no_values_have_no_spread() -> None:
    with pytest.raises(ValueError, match="`values` must hold at least one"):
        Spread.of([])


# Claims.


def pairs(one: str, other: str, difference: float, **options: object) -> list[Record]:
    """Runs of two arms, of whose losses the second's is higher by about so much."""
    records = []
    for seed in range(3):
        for budget in (1e8, 3e8):
            base = 2.0 + 0.3 * seed - 1e-9 * budget
            wobble = 1e-3 * (seed - 1)
            records.append(made_up(one, base, budget=budget, seed=seed))
            records.append(
                made_up(other, base + difference + wobble, budget=budget, seed=seed, **options)
            )
    return records


def finding(number: int, records: list[Record]) -> tuple[str, str | None]:
    claimed = CLAIMS[number]
    found = claimed.test(Cells(records, REFERENCE), curves(records, REFERENCE))
    return found.numbers, found.verdict


BETTER = {
    0: ("mod", "mod-random"),
    3: ("mod", "mod-every"),
    12: ("mod-predictor", "dense"),
    13: ("mode-staged", "moe"),
    14: ("mode-staged", "mod"),
    15: ("mode-integrated", "moe-reduced"),
    16: ("mod", "mod-sigmoid"),
}


@pytest.mark.parametrize("number", BETTER)
def test_claims_of_one_arm_over_another(number: int) -> None:
    one, other = BETTER[number]
    numbers, verdict = finding(number, pairs(one, other, 0.05))
    assert verdict == REPRODUCED
    assert "+0.0500" in numbers
    assert finding(number, pairs(one, other, -0.05))[1] == CONTRADICTED
    assert finding(number, pairs(one, other, 1e-5))[1] == UNRESOLVED


def test_the_claim_of_capacity() -> None:
    def records(other: float) -> list[Record]:
        wide, narrow = (dataclasses.replace(REFERENCE, capacity=c) for c in (0.5, 0.0625))
        return [
            *pairs("mod", "mod", 0.05, size=wide),
            *pairs("mod", "mod", other, size=narrow),
        ]

    assert finding(4, records(0.03))[1] == REPRODUCED
    assert finding(4, records(-0.03))[1] == CONTRADICTED
    assert finding(4, records(0.0))[1] == UNRESOLVED


def test_the_claims_of_the_fits() -> None:
    dense = over_sizes("dense", 1500, 2.0)
    better = dense + over_sizes("mod", 1200, 1.9)
    numbers, verdict = finding(5, better)
    assert verdict == REPRODUCED
    assert "+4.99 %" in numbers or "+5.00 %" in numbers or "+4.98 %" in numbers
    assert finding(6, better)[1] == REPRODUCED
    worse = dense + over_sizes("mod", 1200, 2.1)
    assert finding(5, worse)[1] == CONTRADICTED
    assert finding(6, worse) == (finding(6, worse)[0], CONTRADICTED)
    assert "never" in finding(6, worse)[0]
    # MoD's smallest size, of 500 parameters and as many FLOPs, of the dense optimum's 3000.
    assert "FLOPs: 0.17 (" in finding(6, better)[0]
    later = [dataclasses.replace(r, run=dataclasses.replace(r.run, budget=3e8)) for r in worse]
    partly = [*better, *later]
    assert finding(6, partly)[1] == UNRESOLVED
    assert "never in 2 of 4" in finding(6, partly)[0]
    outside = over_sizes("dense", 50, 2.0) + over_sizes("mod", 50, 1.9)
    assert finding(5, outside)[1] == UNRESOLVED
    assert "not bracketed" in finding(6, outside)[0]


@pytest.mark.parametrize(("number", "better"), [(1, "mod"), (2, "dense")])
def test_the_claims_about_noise_over_sizes(number: int, better: str) -> None:
    random = over_sizes("mod-random", 1400, 2.0)
    dense = [] if better == "dense" else over_sizes("dense", 1500, 2.0)
    for height, verdict in ((1.9, REPRODUCED), (2.1, CONTRADICTED), (2.0, UNRESOLVED)):
        assert finding(number, [*dense, *random, *over_sizes(better, 1200, height)])[1] == verdict


def test_fits_are_paired_by_their_seeds() -> None:
    """A seed that one arm lacks pairs with nothing, not with the next."""
    dense = over_sizes("dense", 1500, 2.0, seeds=3)
    mod = [record for record in over_sizes("mod", 1200, 1.9, seeds=3) if record.run.seed > 0]
    numbers, verdict = finding(5, [*dense, *mod])
    shares = [1 - (1.9 + 0.01 * seed) / (2.0 + 0.01 * seed) for seed in (1, 2)]
    assert f"{100 * sum(shares) / 2:+.2f} %" in numbers
    assert verdict == REPRODUCED


def test_the_claim_of_depth() -> None:
    deeper = dataclasses.replace(REFERENCE, depth=4)
    wider = dataclasses.replace(REFERENCE, dim=24)
    other = dataclasses.replace(REFERENCE, dim=40)
    records = [made_up("mod", 9.0, seed=seed) for seed in range(3)]
    for seed in range(3):
        records += [
            made_up("mod", 2.0 + seed, size=deeper, seed=seed, forward=3000.0),
            made_up("mod", 2.1 + seed + 1e-3 * seed, size=wider, seed=seed, forward=3100.0),
            made_up("mod", 0.1 + seed, size=other, seed=seed, forward=5000.0),
        ]
    numbers, verdict = finding(7, records)
    assert verdict == REPRODUCED
    assert "24x2 less 16x4" in numbers


@pytest.mark.parametrize("seed", range(3))
def test_accuracy_is_that_of_the_confusion_matrix(seed: int) -> None:
    rng = np.random.default_rng(seed)
    taken, asked = rng.random(4000) < 0.125, rng.random(4000) < 0.2
    right = (taken & asked).sum()
    mark = Mark(1, 2.0, 2.0, right / asked.sum(), right / taken.sum(), asked.mean())
    assert accuracy(mark, taken.mean()) == pytest.approx((taken == asked).mean())
    nobody = Mark(1, 2.0, 2.0, 0.0, 0.0, 0.0)
    assert accuracy(nobody, taken.mean()) == pytest.approx((~taken).mean())


def test_the_claims_of_the_predictor() -> None:
    def predicted(recall: float, gap: float) -> list[Record]:
        mark = Mark(10, 2.0, 2.0 + gap, 0.98, recall, 0.125)
        return [made_up("mod-predictor", 0.0, seed=seed, mark=mark) for seed in range(3)]

    assert finding(8, predicted(0.98, 0.0))[1] == REPRODUCED
    assert finding(8, predicted(0.5, 0.0))[1] == CONTRADICTED
    assert finding(11, predicted(0.9, 0.001))[1] == REPRODUCED
    assert finding(11, predicted(0.9, 0.01))[1] == CONTRADICTED


@pytest.mark.parametrize(
    ("per_cent", "predictor", "bce"),
    [(0.0, REPRODUCED, CONTRADICTED), (0.25, CONTRADICTED, REPRODUCED)],
)
def test_the_costs_of_auxiliary_losses(per_cent: float, predictor: str, bce: str) -> None:
    for number, arm, expected in ((9, "mod-predictor", predictor), (10, "mod-bce-0.1", bce)):
        records = [
            made_up(name, (2.0 + seed) * (1 + share + 1e-6 * seed), seed=seed)
            for seed in range(3)
            for name, share in (("mod-after", 0.0), (arm, per_cent / 100))
        ]
        assert finding(number, records)[1] == expected


def test_claims_without_runs_are_said_to_be_without() -> None:
    for number in range(len(CLAIMS)):
        assert finding(number, []) == ("the runs are not there", None)


def test_the_gap_is_ranked_by_causal_loss_with_what_was_spent() -> None:
    cells = Cells([*pairs("mod", "mod-after", 0.05, gap=0.1), made_up("moe", 0.0)], REFERENCE)
    rows = closing(cells, ["dense", "mod-after", "mod"])
    assert [(row.arm, row.budget) for row in rows] == [
        *(("mod", 1e8), ("mod-after", 1e8)),
        *(("mod", 3e8), ("mod-after", 3e8)),
    ]
    assert rows[1].gap.mean == pytest.approx(0.1)
    assert rows[1].compute is not None
    assert rows[1].compute.mean == 0.125


def test_the_leak_is_by_group_and_by_layers() -> None:
    short = dataclasses.replace(REFERENCE, length=16, batch=4)
    deep = dataclasses.replace(REFERENCE, depth=6)
    records = [made_up("mod-after", 2.0, gap=0.02, seed=seed) for seed in range(2)]
    records += [made_up("mod-after", 2.0, gap=0.2, size=short, seed=seed) for seed in range(2)]
    records += [made_up("mod-after", 2.0, gap=0.1, size=deep)]
    found = {(row.field, row.value): row.share.mean for row in leaks(Cells(records, REFERENCE))}
    assert found == {
        ("length", 16): pytest.approx(100 * 0.2 / 1.8),
        ("length", 32): pytest.approx(100 * 0.02 / 1.98),
        ("depth", 2): pytest.approx(100 * 0.02 / 1.98),
        ("depth", 6): pytest.approx(100 * 0.1 / 1.9),
    }


def test_arms_are_held_against_the_default_seed_by_seed() -> None:
    better, worse = (pairs("mod", name, d) for name, d in (("mod-half", -0.02), ("dense", 0.3)))
    cells = Cells([*worse, *better, made_up("moe", 0.0)], REFERENCE)
    found = against_default(cells, ["dense", "mod", "mod-half", "mod-start"])
    assert [row.arm for row in found] == ["mod-half", "dense"]
    assert [row.count for row in (found[0].causal, found[1].causal)] == [6, 6]
    assert found[0].causal.mean == pytest.approx(-0.02)
    assert found[0].slots == pytest.approx(0.125)
    assert found[1].causal.low > 0
    assert comparable(cells, ["mod-half", "mod-every", "moe", "dense", "mod"]) == [
        *("mod-half", "dense", "mod")
    ]


def test_what_learning_gains_is_told_by_size_and_budget() -> None:
    wide = sized(REFERENCE, "24x2")
    long = dataclasses.replace(REFERENCE, length=64)
    records = [
        *pairs("mod", "mod-random", 0.05),
        *(made_up("mod", 2.0, size=wide, seed=s) for s in (0, 1)),
        *(made_up("mod-random", 1.9, size=wide, seed=s) for s in (1, 2)),
        *(made_up(arm, 1.0, size=long) for arm in ("mod", "mod-random")),
    ]
    found = learned(Cells(records, REFERENCE))
    assert [(row.size.dim, row.budget, row.gain.count) for row in found] == [
        *((16, 1e8, 3), (16, 3e8, 3)),
        (24, 1e8, 1),
    ]
    assert found[0].gain.mean == pytest.approx(0.05)
    assert found[2].gain.mean == pytest.approx(-0.1)
    assert {row.steps for row in found} == {10}
