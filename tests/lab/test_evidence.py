"""The isoFLOP laboratory: records, presets, and what a sweep runs."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from mode.lab.commands import Claims
from mode.lab.data import read_corpus
from mode.lab.evidence import sweep as sweeping
from mode.lab.evidence.commands import chosen, run_claims, run_isoflop
from mode.lab.evidence.perform import perform
from mode.lab.evidence.presets import PRESETS, SWEEP_ARMS, Grid, Preset, sizes_like, sweep_arms
from mode.lab.evidence.records import Run, RunRecord, Store
from mode.lab.evidence.sweep import list_runs, list_search, step_count, with_rates
from mode.lab.files import DamagedFile, lock
from mode.lab.folder import claim
from mode.lab.options import Recipe, check_options
from mode.lab.step import make_step
from tests.lab.helpers import quiet, said
from tests.lab.records import REFERENCE, SETTINGS, made_up
from tests.lab.runs import isoflop


# Records.


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    store = Store(tmp_path)
    record = made_up("mod", 2.0)
    assert not store.is_finished(record.run)
    store.add(record)
    assert store.is_finished(record.run)
    assert store.all(SETTINGS) == [record] == [store.get(record.run)]
    failed = made_up("dense", 1.0).run
    store.fail(failed, "the loss is not finite")
    assert store.is_finished(failed)
    assert store.get(failed) is None
    assert store.failures() == {failed.name: "the loss is not finite"}


def test_names_differ_for_every_configuration() -> None:
    run = made_up("mod", 2.0).run
    others: list[dict[str, object]] = [
        {"seed": 1},
        {"budget": 1.001e8},
        {"corpus": "other"},
        {"held_out": 9},
        {"recipe": Recipe(clip=0.5)},
        {"size": dataclasses.replace(REFERENCE, capacity=0.25)},
    ]
    runs = [run, *(run.model_copy(update=update) for update in others)]
    assert len({run.name for run in runs}) == 7
    assert len({run.group for run in runs}) == 2  # the size alone needs other programs


def test_what_a_store_refuses(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    record = made_up("mod", 2.0)
    store.add(record)
    path = store.path(record.run)
    content = path.read_text()
    path.write_text(content[: len(content) // 2])
    with pytest.raises(DamagedFile, match="the same command trains the run again"):
        store.all(SETTINGS)
    path.write_text(content)
    for other in ({"corpus": "other"}, {"held_out": 9}, {"recipe": Recipe(clip=0.5)}):
        with pytest.raises(ValueError, match=r"runs of one corpus, recipe and number of held-out"):
            store.all(SETTINGS.model_copy(update=other))
    assert store.all(SETTINGS.model_copy(update={"recipe": Recipe(learning_rate=0.5)})) == [record]
    (path.parent / "copy.json").write_text(content)
    with pytest.raises(ValueError, match=r"each named after its run, got .*copy.json"):
        store.all(SETTINGS)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="`out` must be a folder"):
        Store(tmp_path / "file")


# Presets and runs.


@pytest.mark.parametrize("name", PRESETS)
def test_presets_pay_for_their_runs(name: str) -> None:
    preset = PRESETS[name]
    settings = preset.settings(Recipe(), "text")
    runs = list_runs(preset.grids, settings)
    search = list_search(runs, settings)
    names = [run.name for run in (*runs, *search)]
    assert len(names) == len(set(names))
    smallest = min(runs, key=lambda run: (run.budget, -run.size.dim))
    assert step_count(preset.arms[smallest.arm], smallest) >= 2
    tokens = {size.length * size.batch for grid in preset.grids for size in grid.sizes}
    assert len(tokens) == 1, "as many tokens in every step"


def test_arms_differ_from_one_another() -> None:
    names = [arm.name for arm in SWEEP_ARMS]
    assert len(names) == len(set(names))
    after, every = sweep_arms("mod-after", "mod-every")
    assert (after.under_rule, every.every) == (0.0, 1)


def test_every_arm_is_trained_at_the_rate_that_was_best_for_the_dense_one(tmp_path: Path) -> None:
    sizes = sizes_like(REFERENCE, "8x2", "16x2")
    grid = Grid(sweep_arms("dense", "mod"), sizes, (1e8, 2e8), 2)
    preset = Preset("", REFERENCE, (grid, grid), rates=(0.01, 0.02, 0.04), held_out=8)
    settings = preset.settings(Recipe(weight_decay=0.1), "text")
    runs, store = list_runs(preset.grids, settings), Store(tmp_path)
    search = list_search(runs, settings)
    assert (len(runs), len(search)) == (16, 6)
    assert with_rates(runs, search, settings, store) == []
    best = {8: 0.02, 16: 0.04}
    for run in search:
        assert (run.arm, run.seed, run.budget) == ("dense", 1000, 1e8)
        rate = run.recipe.learning_rate
        loss = 2.0 if rate == best[run.size.dim] else 3.0
        if rate == 0.01:
            store.fail(run, "not finite")
        else:
            store.add(made_up("dense", loss).model_copy(update={"run": run}))
    for run in with_rates(runs, search, settings, store):
        assert run.recipe == Recipe(learning_rate=best[run.size.dim], weight_decay=0.1)


def test_a_size_that_trains_at_no_rate_is_named(tmp_path: Path) -> None:
    grids = (Grid(sweep_arms("dense"), (REFERENCE,), (1e8,), 1),)
    settings = Preset("", REFERENCE, grids, (0.5, 1.0)).settings(Recipe(), "text")
    runs, store = list_runs(grids, settings), Store(tmp_path)
    search = list_search(runs, settings)
    for run in search:
        store.fail(run, "not finite")
    with pytest.raises(ValueError, match=r"`rates` must hold one at which the dense arm of 16x2"):
        with_rates(runs, search, settings, store)


# Runs that train.


def test_runs_of_one_shape_are_compiled_once(texts: str) -> None:
    corpus = read_corpus(texts, length=32)
    size = dataclasses.replace(REFERENCE, dim=12)
    for arm, programs in zip(sweep_arms("dense", "mod"), (1, 2), strict=True):
        step = make_step(arm, Recipe())  # of mod one for top-k, and one for the causal rule
        before = step._cached._cache_size()  # pyright: ignore
        for budget, seed, rate in ((2e7, 0, 0.01), (4e7, 1, 0.03)):
            run = made_up(arm.name, 0.0, size=size, budget=budget, seed=seed, rate=rate).run
            perform(run, arm, step_count(arm, run), corpus, lambda step, loss: None)
        assert step._cached._cache_size() - before == programs  # pyright: ignore


def test_a_group_that_another_process_trains_is_left_to_it(
    tmp_path: Path, texts: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    trained: list[str] = []

    def record_name(run: Run, *_: object) -> RunRecord:
        trained.append(run.arm)
        return made_up(run.arm, 2.0).model_copy(update={"run": run})

    monkeypatch.setattr(sweeping, "perform", record_name)
    options = isoflop(out, texts, arms=("dense", "mod"), sizes=("8x2",))
    preset = chosen(options)
    settings = preset.settings(Recipe(), read_corpus(texts, length=32).fingerprint)
    dense, mod = list_runs(preset.grids, settings)
    claim(out, settings)
    (out / "locks").mkdir()

    def finish_mod(seconds: float) -> None:
        Store(out).add(made_up("mod", 2.0).model_copy(update={"run": mod}))

    monkeypatch.setattr(sweeping.time, "sleep", finish_mod)
    with lock(out / "locks" / f"{mod.group}.lock") as is_mine:
        assert is_mine
        run_isoflop(options, quiet())
    assert trained == ["dense"]
    assert len(Store(out).all(settings)) == 2
    assert dense.group != mod.group


def test_no_run_starts_when_time_is_up(tmp_path: Path, texts: str) -> None:
    out = tmp_path / "out"
    console = quiet()
    run_isoflop(isoflop(out, texts, minutes=1e-9), console)
    assert not (out / "records").exists()
    assert "0 runs: see" in said(console)
    with pytest.raises(ValueError, match="`out` must hold at least one finished run"):
        run_claims(Claims(out), quiet())


def test_a_run_that_diverges_is_not_started_again(
    tmp_path: Path, texts: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverge(*args: object) -> RunRecord:
        raise FloatingPointError("the loss is not finite at step 3")

    out = tmp_path / "out"
    monkeypatch.setattr(sweeping, "perform", diverge)
    options = {"arms": ("dense",), "sizes": ("8x2",)}
    run_isoflop(isoflop(out, texts, **options), quiet())
    monkeypatch.undo()
    run_isoflop(isoflop(out, texts, **options), quiet())
    assert not (out / "records").exists()
    assert "not finite at step 3" in (out / "report.md").read_text()


def test_what_a_sweep_refuses(tmp_path: Path, texts: str) -> None:
    def refusal(**changes: Any) -> str:
        with pytest.raises(ValueError, match="must") as caught:
            run_isoflop(check_options(isoflop(tmp_path / "new", texts, **changes)), quiet())
        assert not (tmp_path / "new").exists()
        return str(caught.value)

    assert "`arms` must be of dense, left-out, mod" in refusal(arms=("best",))
    assert "`arms` must be one or more, each once, got ('mod', 'mod')" in refusal(
        arms=("mod", "mod")
    )
    assert "`sizes` must be one or more, each once, got ()" in refusal(sizes=())
    assert "`sizes` must be features and layers, such as 48x6, got '8'" in refusal(sizes=("8",))
    assert "`budgets.0` must be above 0, got -1" in refusal(budgets=(-1.0,))
    assert "`budget` must pay for at least 2 steps" in refusal(budgets=(1e5,))
    assert "`seeds` must be at least 1, got 0" in refusal(seeds=0)
    assert "`rates` must be one or more" in refusal(rates=())
    assert "`minutes` must be above 0, got 0" in refusal(minutes=0.0)
    none = {"arms": (), "sizes": (), "budgets": ()}
    assert "`preset` must be one of cpu-hour" in refusal(**none, preset="none")
    with pytest.raises(ValueError, match=r"`mode-lab ablate`, `train` and `isoflop` make one"):
        run_claims(Claims(tmp_path / "nowhere"), quiet())
