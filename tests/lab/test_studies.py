"""The scripts of benchmarks/evidence: their tables, and the arms that they can build."""

import dataclasses
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import equinox as eqx
import jax
import pytest

from mode.lab.arms import ALL_ARMS
from mode.lab.evidence.frame import Runs, to_frame
from mode.lab.evidence.presets import PRESETS, SWEEP_ARMS, sizes_like
from mode.lab.evidence.sweep import list_runs
from mode.lab.options import Recipe
from mode.lab.tasks.records import Score, TaskResult
from tests.lab.records import REFERENCE, made_up, pairs


EVIDENCE = Path(__file__).parents[2] / "benchmarks/evidence"


def script(name: str) -> ModuleType:
    """A script of benchmarks/evidence, as a module."""
    spec = importlib.util.spec_from_file_location(name, EVIDENCE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def studies() -> ModuleType:
    return script("studies")


def test_the_gap_is_ranked_by_causal_loss_beside_the_slots(studies: ModuleType) -> None:
    records = [*pairs("mod", "mod-after", 0.05, gap=0.1), made_up("moe", 0.0)]
    table = studies.gap(Runs.of(to_frame(records), REFERENCE))
    assert list(zip(table["arm"], table["budget"], strict=True)) == [
        *(("mod", 1e8), ("mod-after", 1e8)),
        *(("mod", 3e8), ("mod-after", 3e8)),
    ]
    assert table["gap"].isna().tolist() == [True, False, True, False]
    assert table["gap"][1] == "+0.1000 (+0.1000 to +0.1000, 3 runs)"
    assert table["slots"].tolist() == pytest.approx([0.125] * 4)


def test_the_leak_is_by_group_and_by_layers(studies: ModuleType) -> None:
    short = dataclasses.replace(REFERENCE, length=16, batch=4)
    deep = dataclasses.replace(REFERENCE, depth=6)
    records = [made_up("mod-after", 2.0, gap=0.02, seed=seed) for seed in range(2)]
    records += [made_up("mod-after", 2.0, gap=0.2, size=short, seed=seed) for seed in range(2)]
    records += [made_up("mod-after", 2.0, gap=0.1, size=deep)]
    table = studies.leaks(Runs.of(to_frame(records), REFERENCE))
    assert {(row.field, row.value): row.gap for row in table.itertuples()} == {
        ("length", 16): pytest.approx(100 * 0.2 / 1.8),
        ("length", 32): pytest.approx(100 * 0.02 / 1.98),
        ("depth", 2): pytest.approx(100 * 0.02 / 1.98),
        ("depth", 6): pytest.approx(100 * 0.1 / 1.9),
    }


def test_arms_are_compared_with_the_default_seed_by_seed(studies: ModuleType) -> None:
    better, worse = (pairs("mod", name, d) for name, d in (("mod-half", -0.02), ("dense", 0.3)))
    other = made_up("mod-every", 0.0)
    runs = Runs.of(to_frame([*worse, *better, made_up("moe", 0.0), other]), REFERENCE)
    table = studies.against_default(runs)
    assert table["arm"].tolist() == ["mod-half", "dense"]
    texts = table["causal loss minus that of mod"].tolist()
    assert [text.split()[0] for text in texts] == ["-0.0200", "+0.3000"]
    assert all("6 runs" in text for text in texts)


def test_the_gain_of_learning_is_by_size_and_budget(studies: ModuleType) -> None:
    (wide,) = sizes_like(REFERENCE, "24x2")
    long = dataclasses.replace(REFERENCE, length=64)
    records = [
        *pairs("mod", "mod-random", 0.05),
        *(made_up("mod", 2.0, size=wide, seed=s) for s in (0, 1)),
        *(made_up("mod-random", 1.9, size=wide, seed=s) for s in (1, 2)),
        *(made_up(arm, 1.0, size=long) for arm in ("mod", "mod-random")),
    ]
    table = studies.gain_of_learning(Runs.of(to_frame(records), REFERENCE))
    rows = [(row.shape, row.budget, row.gain.split()[0], row.steps) for row in table.itertuples()]
    assert rows == [
        ("16x2", 1e8, "+0.0500", 10),
        ("16x2", 3e8, "+0.0500", 10),
        ("24x2", 1e8, "-0.1000", 10),
    ]


def test_arms_are_compared_at_every_batch(studies: ModuleType) -> None:
    small = dataclasses.replace(REFERENCE, batch=1)
    records = [
        *pairs("mod", "mod-random", 0.05),
        *(made_up("mod", 2.0, size=small, seed=seed) for seed in (0, 1)),
        *(made_up("dense", 2.1, size=small, seed=seed) for seed in (0, 1)),
    ]
    table = studies.by_batch(Runs.of(to_frame(records), REFERENCE)).set_index(
        ["budget", "sequences in a batch"]
    )
    assert table.loc[(1e8, 1), "dense minus mod"] == "+0.1000 (+0.1000 to +0.1000, 2 runs)"
    assert str(table.loc[(1e8, REFERENCE.batch), "mod-random minus mod"]).startswith("+0.0500")
    assert table["mod-random minus mod"].isna().tolist() == [True, False, False]


def test_arms_of_the_studies_can_be_built() -> None:
    more_runs = script("more_runs")
    preset = more_runs.studies(PRESETS["cpu-hour"], (), 3, ("gap", "leak"))
    arms = preset.grids[0].arms
    names = [arm.name for arm in (*arms, *SWEEP_ARMS)]
    assert len(names) == len(set(names))
    for arm in arms:
        eqx.filter_eval_shape(lambda arm=arm: arm.build(preset.reference, key=jax.random.key(0)))
    # Of 15 arms at 2 budgets, and of 2 at 7 other sizes, with 3 seeds each.
    runs = list_runs(preset.grids, preset.settings(Recipe(), "text"))
    assert len(runs) == 3 * (15 * 2 + 2 * 7)
    forms = more_runs.studies(PRESETS["cpu-hour"], (), 5, ("forms",))
    # All arms at the smaller budget, and two at the other one.
    runs = list_runs(forms.grids, forms.settings(Recipe(), "text"))
    assert len(runs) == 5 * (len(ALL_ARMS) + 2)
    batch = more_runs.studies(PRESETS["cpu-hour"], (), 3, ("batch",))
    runs = list_runs(batch.grids, batch.settings(Recipe(), "text"))
    assert {run.size.batch for run in runs} == {4, 16}
    assert len(runs) == 3 * 4 * 2 * 2


def test_the_table_of_forms_is_by_seed() -> None:
    forms = script("forms")
    records = [
        made_up(arm, loss + 0.1 * seed, seed=seed)
        for arm, loss in (("dense", 2.5), ("mod", 2.25), ("mod-queries", 2.0))
        for seed in range(6)
    ]
    table = forms.losses(Runs.of(to_frame(records), REFERENCE), 1e8)
    assert list(table["arm"]) == ["mod-queries", "mod", "dense"]
    assert table["causal"].tolist() == pytest.approx([2.2, 2.45, 2.7])  # of the first five seeds
    assert table["minus dense"][0] == "-0.5000 (-0.5000 to -0.5000, 5 runs)"
    assert table["minus dense"].isna().tolist() == [False, False, True]


def test_what_an_arm_found_is_read_by_its_name_in_the_tasks() -> None:
    forms = script("forms")
    score = Score(accuracy=0.5, hits={}, classes=(), selected=())
    hits = {"value": 0.9, "question": 1.0, "filler": 0.1}
    better = score.model_copy(update={"accuracy": 0.75, "hits": hits})
    results = [
        TaskResult(task=task, arm=arm, seed=seed, top_k=score, causal=better)
        for task, arm, seed in (
            ("recall", "learned", 0),
            ("recall", "learned", 1),
            ("s3", "learned", 0),
        )
    ]
    expected = {"recall, by seed": "0.75 0.75", "value": "0.90", "question": "1.00"}
    assert forms.found(results, "mod") == expected | {"filler": "0.10"}
    assert forms.found(results, "moe") == dict.fromkeys([*expected, "filler"])


def test_what_is_said_of_runs_is_what_their_records_say() -> None:
    """Every table of EVIDENCE.md is the one that is computed from the archive."""
    command = [sys.executable, str(EVIDENCE / "tables.py")]
    subprocess.run(command, check=True)


def routers(*options: str) -> str:
    """What the study of routers prints."""
    command = [sys.executable, str(EVIDENCE / "routers"), *options]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_what_is_said_of_routers_is_what_their_records_say() -> None:
    """Every table of the study is in ROUTERS.md as it is computed from the records."""
    text = (EVIDENCE.parent / "ROUTERS.md").read_text()
    tables = [part for part in routers("--table").split("\n\n") if part.startswith("|")]
    assert len(tables) == 3
    for table in tables:
        assert table.strip() in text


def test_recoveries_and_uses_are_by_seed(tmp_path: Path) -> None:
    """Of made-up records: the part of the worth, and an interval over the seeds."""
    same = {"bench": "text", "depth": 2, "steps": 9, "rate": 0.01}
    arms = {"dense": (2.0, 0.0), "left-out": (2.4, 0.0), "default": (2.1, 0.5)}
    rows = [
        {**same, "variant": arm, "seed": seed, "bits": bits + seed, "use": use}
        for arm, (bits, use) in arms.items()
        for seed in range(2)
    ]
    path = tmp_path / "results.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = routers("--table", "--out", str(path)).splitlines()
    (line,) = [line for line in lines if line.startswith("| default")]
    assert "+75 (+75 to +75, 2 runs)" in line
    assert "0.5000 (0.5000 to 0.5000, 2 runs)" in line
