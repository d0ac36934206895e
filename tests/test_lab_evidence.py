"""The isoFLOP laboratory: stores, presets, and sweeps that train."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mode.lab.__main__ import main
from mode.lab.data import read_corpus
from mode.lab.evidence import sweep as sweeping, verdicts
from mode.lab.evidence.claims import CLAIMS
from mode.lab.evidence.grids import PRESETS, Grid, Preset, sized
from mode.lab.evidence.perform import check_budget, perform
from mode.lab.evidence.records import Record, Run, Store
from mode.lab.evidence.runs import Runs
from mode.lab.evidence.sweep import Isoflop, run_isoflop
from mode.lab.evidence.variants import VARIANTS, variants_named
from mode.lab.step import Recipe, make_step
from tests.lab import quiet, repeating_texts, said
from tests.records import REFERENCE, made_up


RECIPE = Recipe(learning_rate=0.01)


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


# Runs that train.


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> str:
    return repeating_texts(tmp_path_factory.mktemp("texts"))


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
    # The report alone, without the claims.
    (out / "report.md").unlink()
    assert main(["report", "--out", str(out)]) == 0
    assert "| 2e+08 | dense | 3 x 1 |" in (out / "report.md").read_text()
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

    assert "`arms` must be one or more of dense, mod" in refusal(arms=("best",))
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
    with pytest.raises(ValueError, match=r"`mode-lab ablate`, `train` and `isoflop` make one"):
        verdicts.run_claims(verdicts.Claims(tmp_path / "nowhere"), quiet())
