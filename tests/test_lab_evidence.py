"""The isoFLOP laboratory: fits, verdicts and stores against numbers known beforehand."""

import dataclasses
import io
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from rich.console import Console

from mode.lab.arms import Size
from mode.lab.data import read_corpus
from mode.lab.evidence import sweep as sweeping, verdicts
from mode.lab.evidence.cells import Cells
from mode.lab.evidence.claims import CLAIMS, accuracy
from mode.lab.evidence.fit import Parabola, curves
from mode.lab.evidence.grids import PRESETS, Grid, Preset, sized
from mode.lab.evidence.perform import check_budget, perform
from mode.lab.evidence.records import Mark, Record, Run, Store
from mode.lab.evidence.runs import Runs
from mode.lab.evidence.statistics import CONTRADICTED, REPRODUCED, UNRESOLVED, Spread
from mode.lab.evidence.studies import closing, leaks
from mode.lab.evidence.sweep import Isoflop, run_isoflop
from mode.lab.evidence.variants import VARIANTS, variants_named
from mode.lab.step import Recipe, make_step


REFERENCE = Size(dim=16, depth=2, heads=1, length=32, batch=2, experts=2, noop=1)
RECIPE = Recipe(learning_rate=0.01)


def quiet() -> Console:
    return Console(file=io.StringIO(), width=160)


def said(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def made_up(
    arm: str,
    causal: float,
    *,
    size: Size = REFERENCE,
    budget: float = 1e8,
    seed: int = 0,
    gap: float = 0.0,
    parameters: int = 1000,
    forward: float = 2000.0,
    mark: Mark | None = None,
    rate: float = 0.01,
) -> Record:
    """A record of a run that never was."""
    run = Run(arm, size, Recipe(learning_rate=rate), budget, seed, 8, "text")
    end = Mark(10, causal - gap, causal, 0.9, 0.8, 0.125) if mark is None else mark
    return Record(
        run=run,
        parameters=parameters,
        forward_flops=forward,
        step_flops=10**7,
        steps=10,
        end=end,
        compute_top_k=0.125,
        marks=(dataclasses.replace(end, step=5),),
        curve=(3.0, 2.0),
        seconds={"training": 1.0, "waiting": 0.1, "evaluating": 0.5},
        step_seconds=0.1,
        versions={"jax": "0"},
        machine="none",
    )


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
    assert mod.fit.lowest == pytest.approx(1200, rel=1e-6)
    # MoD is at dense's optimum where 0.1 log(n / 1200)^2 = 0.1: at 1200 / e, a size not measured.
    found = mod.cheapest(2.005)
    assert found is not None
    assert found[0] == pytest.approx(1200 / math.e, rel=0.2)
    assert mod.cheapest(1.0) is None
    assert not mod.cheapest(5.0)[1]  # pyright: ignore[reportOptionalSubscript]


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


# Stores.


def test_a_record_comes_back_as_it_was(tmp_path: Path) -> None:
    store = Store(tmp_path)
    record = made_up("mod", 2.0)
    assert not store.has(record.run)
    store.add(record)
    assert store.has(record.run)
    assert store.all() == [record] == [store.get(record.run)]
    store.fail(made_up("dense", 1.0).run, "the loss is not finite")
    assert store.has(made_up("dense", 1.0).run)
    assert store.get(made_up("dense", 1.0).run) is None
    assert list(store.failures().values()) == ["the loss is not finite"]


def test_names_differ_for_every_difference() -> None:
    run = made_up("mod", 2.0).run
    others = [
        dataclasses.replace(run, seed=1),
        dataclasses.replace(run, budget=1.001e8),
        dataclasses.replace(run, corpus="other"),
        dataclasses.replace(run, held_out=9),
        dataclasses.replace(run, recipe=Recipe(clip=0.5)),
        dataclasses.replace(run, size=dataclasses.replace(REFERENCE, capacity=0.25)),
    ]
    assert len({run.name, *(other.name for other in others)}) == 7


def test_what_a_store_refuses(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    record = made_up("mod", 2.0)
    store.add(record)
    path = store.path(record.run)
    content = path.read_text()

    def refusal(changed: str) -> str:
        path.write_text(changed)
        with pytest.raises(ValueError, match="record") as caught:
            store.all()
        path.write_text(content)
        return str(caught.value)

    assert "must be of format 1, got 0" in refusal(content.replace('"format": 1', '"format": 0'))
    assert "is not whole" in refusal(content[: len(content) // 2])
    assert "is not whole" in refusal(content.replace('"steps"', '"stops"'))
    assert "was changed or renamed" in refusal(content.replace('"seed": 0', '"seed": 3'))
    (path.parent / "copy.json").write_text(content)
    with pytest.raises(ValueError, match=r"one record of a run, got two, .*copy.json and"):
        store.all()
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="`out` must be a folder"):
        Store(tmp_path / "file")


# Presets and runs.


@pytest.mark.parametrize("name", PRESETS)
def test_presets_pay_for_their_runs(name: str) -> None:
    preset = PRESETS[name]
    runs = Runs(preset, Recipe(), "text", Store(Path("nowhere")))
    names = [run.name for group in (*runs.groups, *runs.searches) for run in group]
    assert len(names) == len(set(names))
    assert all(len({(run.arm, run.size) for run in group}) == 1 for group in runs.groups)
    smallest = min(runs.groups, key=lambda group: (group[0].budget, -group[0].size.dim))
    assert check_budget(smallest[0]) >= 2
    lengths = {size.length * size.batch for grid in preset.grids for size in grid.sizes}
    assert len(lengths) == 1, "as many tokens in every step"


def test_arms_differ_from_one_another() -> None:
    names = [arm.name for arm in VARIANTS]
    assert len(names) == len(set(names))
    assert variants_named(["mod-half"])[0].under_rule == 0.5
    assert variants_named(["mod-rate-0.01"])[0].quantile_rate == 0.01


def test_every_arm_is_trained_at_the_rate_that_was_best_for_the_dense_one(tmp_path: Path) -> None:
    sizes = (sized(REFERENCE, "8x2"), sized(REFERENCE, "16x2"))
    grid = Grid(("dense", "mod"), sizes, (1e8, 2e8), 2)
    preset = Preset("", REFERENCE, (grid, grid), rates=(0.01, 0.02, 0.04), held_out=8)
    runs = Runs(preset, Recipe(weight_decay=0.1), "text", Store(tmp_path))
    assert runs.count == 16
    assert [len(group) for group in runs.searches] == [3, 3]
    assert runs.rated() is None
    best = {8: 0.02, 16: 0.04}
    for group in runs.searches:
        for run in group:
            assert (run.arm, run.seed, run.budget) == ("dense", 1000, 1e8)
            rate = run.recipe.learning_rate
            if rate == 0.01:
                runs.store.fail(run, "not finite")
                continue
            loss = 2.0 if rate == best[run.size.dim] else 3.0
            runs.store.add(dataclasses.replace(made_up("dense", loss), run=run))
    rated = runs.rated()
    assert rated is not None
    for group in rated:
        for run in group:
            assert run.recipe == Recipe(learning_rate=best[run.size.dim], weight_decay=0.1)


def test_a_size_that_trains_at_no_rate_is_named(tmp_path: Path) -> None:
    preset = Preset("", REFERENCE, (Grid(("dense",), (REFERENCE,), (1e8,), 1),), (0.5, 1.0))
    runs = Runs(preset, Recipe(), "text", Store(tmp_path))
    for run in runs.searches[0]:
        runs.store.fail(run, "not finite")
    with pytest.raises(ValueError, match=r"`rates` must hold one at which the dense arm of 16x2"):
        runs.rated()


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


BETTER = {0: ("mod", "mod-random"), 1: ("dense", "mod-random"), 2: ("mod", "mod-every")} | {
    11: ("mod-predictor", "dense"),
    12: ("mode-staged", "moe"),
    13: ("mode-staged", "mod"),
    14: ("mode-integrated", "moe-reduced"),
    15: ("mod", "mod-sigmoid"),
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

    assert finding(3, records(0.03))[1] == REPRODUCED
    assert finding(3, records(-0.03))[1] == CONTRADICTED
    assert finding(3, records(0.0))[1] == UNRESOLVED


def test_the_claims_of_the_fits() -> None:
    dense = over_sizes("dense", 1500, 2.0)
    better = dense + over_sizes("mod", 1200, 1.9)
    numbers, verdict = finding(4, better)
    assert verdict == REPRODUCED
    assert "+4.99 %" in numbers or "+5.00 %" in numbers or "+4.98 %" in numbers
    assert finding(5, better)[1] == REPRODUCED
    worse = dense + over_sizes("mod", 1200, 2.1)
    assert finding(4, worse)[1] == CONTRADICTED
    assert finding(5, worse) == (finding(5, worse)[0], CONTRADICTED)
    assert "never" in finding(5, worse)[0]
    outside = over_sizes("dense", 50, 2.0) + over_sizes("mod", 50, 1.9)
    assert finding(4, outside)[1] == UNRESOLVED
    assert "not bracketed" in finding(5, outside)[0]


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
    numbers, verdict = finding(6, records)
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

    assert finding(7, predicted(0.98, 0.0))[1] == REPRODUCED
    assert finding(7, predicted(0.5, 0.0))[1] == CONTRADICTED
    assert finding(10, predicted(0.9, 0.001))[1] == REPRODUCED
    assert finding(10, predicted(0.9, 0.01))[1] == CONTRADICTED


@pytest.mark.parametrize(
    ("per_cent", "predictor", "bce"),
    [(0.0, REPRODUCED, CONTRADICTED), (0.25, CONTRADICTED, REPRODUCED)],
)
def test_the_costs_of_auxiliary_losses(per_cent: float, predictor: str, bce: str) -> None:
    for number, arm, expected in ((8, "mod-predictor", predictor), (9, "mod-bce-0.1", bce)):
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
    assert rows[0].behind is None
    assert rows[1].behind is not None
    assert rows[1].behind.mean == pytest.approx(0.05)
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


# Runs that train.


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("texts")
    for number in range(12):
        line = f"line {number} of a text that repeats itself\n"
        (folder / f"{number}.txt").write_text(line * 30)
    return str(folder / "*.txt")


def isoflop(out: Path, texts: str, **changes: object) -> Isoflop:
    options = {
        "arms": ("dense",),
        "sizes": ("8x2", "16x2", "24x2"),
        "budgets": (2e8,),
        "seeds": 1,
        "rates": (0.01,),
        "held_out": 4,
        "base": REFERENCE,
    }
    return Isoflop(out=out, data=texts, **{**options, **changes})  # pyright: ignore


def killed_after_its_first_run(out: Path, texts: str) -> None:
    """A sweep of the dense arm in a process of its own."""
    flags = [
        *("--arms", "dense", "--sizes", "8x2", "16x2", "24x2", "--budgets", "2e8"),
        *("--seeds", "1", "--rates", "0.01", "--held-out", "4", "--base.length", "32"),
        *("--base.dim", "16", "--base.depth", "2", "--base.batch", "2", "--base.experts", "2"),
        *("--base.noop", "1", "--base.heads", "1"),
    ]
    command = [sys.executable, "-m", "mode.lab", "isoflop", "--out", str(out), "--data", texts]
    process = subprocess.Popen([*command, *flags], stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not list((out / "records").glob("*.json")):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
    finally:
        process.kill()
        process.wait()


def test_a_sweep_from_its_first_run_to_the_verdicts(tmp_path: Path, texts: str) -> None:
    """Killed, gone on with, repeated, reported: one test, as every size takes long to compile."""
    out = tmp_path / "out"
    store = Store(out)
    killed_after_its_first_run(out, texts)
    kept = store.all()
    assert 1 <= len(kept) < 3
    run_isoflop(isoflop(out, texts), quiet())
    records = store.all()
    assert len(records) == 3
    assert all(record in records for record in kept)
    for record in records:
        spent = record.steps * record.step_flops
        assert abs(spent - 2e8) <= record.step_flops / 2
        assert record.end.step == record.steps
        assert 5 <= len(record.marks) <= 8
        assert record.seconds["waiting"] < record.seconds["training"]
        assert len(record.curve) == min(100, record.steps)
    assert "| 2e+08 | dense | 3 x 1 |" in (out / "report.md").read_text()
    assert (out / "isoflop.png").read_bytes().startswith(b"\x89PNG")
    # A run that is missing is run again, the same, and no other.
    before = next(record for record in records if record not in kept)
    stamps = {path: path.stat().st_mtime_ns for path in (out / "records").iterdir()}
    store.path(before.run).unlink()
    console = quiet()
    run_isoflop(isoflop(out, texts), console)
    assert "3 runs, 2 of them finished before" in said(console)
    after = store.get(before.run)
    assert after is not None
    assert (after.end, after.marks, after.curve) == (before.end, before.marks, before.curve)
    assert sum(path.stat().st_mtime_ns != stamp for path, stamp in stamps.items()) == 1
    # What it shows of the claims.
    console = quiet()
    verdicts.run_claims(verdicts.Claims(out), console)
    assert "not run" in said(console)
    found = json.loads((out / "claims.json").read_text())
    assert len(found["claims"]) == len(CLAIMS)
    assert {row["arm"] for row in found["closing"]} == {"dense"}
    assert "**not run**" in (out / "claims.md").read_text()
    assert (out / "gap.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match=r"same configuration, got .*\n.*held_out: 4 there, 8 ask"):
        run_isoflop(isoflop(out, texts, held_out=8), quiet())
    # A record of another text.
    store.add(made_up("mod", 2.0))
    with pytest.raises(ValueError, match=r"runs of one configuration, .*another corpus and held_o"):
        verdicts.run_claims(verdicts.Claims(out), quiet())


def test_runs_of_one_shape_are_compiled_once(texts: str) -> None:
    corpus = read_corpus(texts, length=32)
    for name, programs in (("dense", 1), ("mod", 2)):  # top-k, and then the causal rule
        (arm,) = variants_named([name])
        step = make_step(arm, RECIPE)
        before = step._cached._cache_size()  # pyright: ignore
        for budget, seed, rate in ((2e7, 0, 0.01), (4e7, 1, 0.03)):
            recipe = dataclasses.replace(RECIPE, learning_rate=rate)
            size = dataclasses.replace(REFERENCE, dim=12)
            run = Run(name, size, recipe, budget, seed, 4, corpus.fingerprint)
            perform(run, arm, corpus, lambda taken, loss: None)
        assert step._cached._cache_size() - before == programs  # pyright: ignore


def test_a_group_that_is_held_is_left_to_its_holder(tmp_path: Path) -> None:
    run = made_up("mod", 1.0).run
    with sweeping._held(tmp_path, run) as mine, sweeping._held(tmp_path, run) as other:
        assert (mine, other) == (True, False)
    with sweeping._held(tmp_path, run) as mine:
        assert mine


def test_no_run_begins_when_time_is_up(tmp_path: Path, texts: str) -> None:
    run_isoflop(isoflop(tmp_path / "out", texts, minutes=1e-9), quiet())
    assert Store(tmp_path / "out").all() == []
    assert "nothing to fit" in (tmp_path / "out" / "report.md").read_text()


def test_a_run_that_diverges_is_kept_as_such(
    tmp_path: Path, texts: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverge(*args: object) -> Record:
        raise FloatingPointError("the loss is not finite at step 3")

    monkeypatch.setattr(sweeping, "perform", diverge)
    options = {"arms": ("dense",), "sizes": ("8x2",)}
    run_isoflop(isoflop(tmp_path / "out", texts, **options), quiet())
    monkeypatch.undo()
    console = quiet()
    run_isoflop(isoflop(tmp_path / "out", texts, **options), console)
    assert Store(tmp_path / "out").all() == []
    assert "not finite at step 3" in (tmp_path / "out" / "report.md").read_text()


def test_what_a_sweep_refuses(tmp_path: Path, texts: str) -> None:
    def refusal(**changes: object) -> str:
        with pytest.raises(ValueError, match="must") as caught:
            run_isoflop(isoflop(tmp_path / "new", texts, **changes), quiet())
        assert not (tmp_path / "new").exists()
        return str(caught.value)

    assert "`arms` must name at least one of dense, mod" in refusal(arms=("best",))
    assert "`arms` must not repeat, got mod" in refusal(arms=("mod", "mod"))
    assert "`sizes` must not repeat, got 8x2" in refusal(sizes=("8x2", "8x2"))
    assert "`sizes` must be features and layers, such as 48x6, got '8'" in refusal(sizes=("8",))
    assert "`budgets` must be finite numbers above 0" in refusal(budgets=(-1.0,))
    assert "`budget` must pay for at least 2 steps" in refusal(budgets=(1e5,))
    assert "`seeds` must be at least 1, got 0" in refusal(seeds=0)
    assert "`rates` must name at least one" in refusal(rates=())
    assert "`minutes` must be above 0, got 0" in refusal(minutes=0.0)
    assert "must be given together" in refusal(sizes=())
    assert "`preset` must be one of cpu-hour" in refusal(
        arms=(), sizes=(), budgets=(), preset="none"
    )
    with pytest.raises(ValueError, match=r"`mode-lab ablate` and `mode-lab train` make one"):
        verdicts.run_claims(verdicts.Claims(tmp_path / "nowhere"), quiet())
