"""What routing is worth: arms at equal steps in an ablation, and the task that ends it."""

import dataclasses
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from mode.lab import ablate
from mode.lab.commands import Ablation, Rereport, Tasks
from mode.lab.files import read_record
from mode.lab.options import Size
from mode.lab.recovery import recovery
from mode.lab.report import Results
from mode.lab.tables import Tables
from mode.lab.tasks.arms import TaskSize, train_and_score
from tests.lab.helpers import quiet, repeating_texts, said


SIZE = Size(dim=8, depth=2, heads=1, length=96, batch=2, experts=2, noop=1)


def test_recovery() -> None:
    """1 at the dense loss, 0 at that of the blocks left out, undefined where those are no worse."""
    assert recovery(2.0, dense=2.0, left_out=2.4) == 1
    assert recovery(2.4, dense=2.0, left_out=2.4) == 0
    assert recovery(2.5, dense=2.0, left_out=2.4) == pytest.approx(-0.25)
    assert np.isnan(recovery(2.0, dense=2.4, left_out=2.4))


def test_an_ablation_ends_with_recovery_and_recall(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs of equal steps beside those of equal FLOPs; dense is the same run in both."""
    usual = ablate._recall
    # (Which arms it has is the next test's.)
    fewer = {"steps": 2, "arms": ("dense", "random")}
    monkeypatch.setattr(ablate, "_recall", lambda a: dataclasses.replace(usual(a), **fewer))
    small = partial(train_and_score, size=TaskSize(dim=8, heads=2, batch=4))
    monkeypatch.setattr("mode.lab.tasks.command.train_and_score", small)
    texts, out = repeating_texts(tmp_path), tmp_path / "out"
    arms = ("mod", "dense", "left-out", "moe")
    ablation = Ablation(out, texts, 0.02, arms, held_out=4, size=SIZE)
    console = quiet()
    ablate.run_ablation(ablation, console)
    assert sorted(path.name for path in (out / "equal-steps").iterdir()) == ["left-out", "mod"]
    results = read_record(out / "results.json", Results)
    assert [result.arm.name for result in results.arms] == ["dense", "left-out", "mod", "moe"]
    steps = {result.arm.name: result.settings.options.steps for result in results.equal_steps}
    assert steps == dict.fromkeys(
        ("dense", "left-out", "mod"), results.arms[0].settings.options.steps
    )
    assert results.arms[2].settings.options.steps > steps["mod"]
    assert results.equal_steps[0] == results.arms[0]
    text = (out / "report.md").read_text()
    assert "## What the routed blocks are worth" in text
    assert "without its updates" in text
    shown = said(console)
    assert "recovery" in shown
    assert "recall: 4 pairs" in shown
    assert (out / "recall" / "recall.png").exists()
    tables = read_record(out / "report.json", Tables).tables
    assert tables["recovery"]["arm"] == ("dense", "left-out", "mod")
    assert tables["equal FLOPs"]["arm"] == ("dense", "left-out", "mod", "moe")
    # Of each router, of which the dense arm has none.
    slots = tables["equal FLOPs"]["slots / token, causal"]
    assert slots[0] == []
    assert slots[2] == [router.compute_causal for router in results.arms[2].evaluation.routers]
    console = quiet()
    ablate.run_ablation(ablation, console)
    assert "mod, equal steps: finished before, kept." in said(console)
    console = quiet()
    ablate.run_rereport(Rereport(out), console)
    assert "recovery" in said(console)
    assert "recall: 4 pairs" in said(console)


def test_recall_has_the_arms_of_the_readme() -> None:
    """One seed of four arms, in a folder of its own, with the recipe of the tasks."""
    tasks = ablate._recall(Ablation(Path("a")))
    assert tasks == Tasks(Path("a/recall"), arms=("dense", "oracle", "learned", "random"), seeds=1)
