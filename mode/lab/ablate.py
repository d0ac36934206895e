"""The ablation: every arm in turn, at equal training FLOPs, and a report of those that finished.

Each arm is a run of `mode-lab train` in a folder of its own.
"""

import dataclasses
from pathlib import Path

import jax
from rich.console import Console

from .arms import NAMES, arm_named, arms_named
from .budget import flops_per_step, steps_for, training_budget
from .checkpoint import TrainSettings
from .commands import Ablation as Ablation, Rereport, Tasks, Training
from .console import progress, say_progress
from .data import read_corpus
from .files import Record
from .folder import check_out, claim, read_settings, settings_format
from .options import absolute_glob, command_line
from .report import write_report
from .run import load_result, train_arm
from .tasks.command import train_tasks
from .tasks.records import TaskSettings
from .tasks.report import report_tasks


# The two comparisons: runs that spend equal training FLOPs, and runs of equal steps.
EQUAL_FLOPS, EQUAL_STEPS = "equal FLOPs", "equal steps"
_RECALL = "recall"  # the folder of the task


class AblationSettings(Record):
    """The settings of an ablation, and the fingerprint of its text."""

    format = "mode-lab ablate"
    version = 1

    options: Ablation
    corpus: str

    def runs(self, out: Path) -> dict[str, dict[str, TrainSettings]]:
        """The settings of all runs, by comparison and arm, in the folder `out` of the ablation.

        At equal steps, those of the dense arm, are the runs that say what part of the worth of the
        routed blocks an arm recovers.

        **Raises:** `ValueError` for a budget of less than two steps.
        """
        names = self.options.arms
        runs = {EQUAL_FLOPS: {name: self._run(out / "arms", name, name) for name in names}}
        if {"dense", "left-out"} <= set(names):
            some = [name for name in names if name == "left-out" or arm_named(name).recovers]
            equal = {name: self._run(out / "equal-steps", name, "dense") for name in some}
            runs[EQUAL_STEPS] = {"dense": runs[EQUAL_FLOPS]["dense"], **equal}
        return runs

    def _run(self, folder: Path, name: str, steps_of: str) -> TrainSettings:
        arm, size = arm_named(steps_of), self.options.size
        budget = training_budget(self.options.budget, size)
        steps = steps_for(arm, budget, flops_per_step(arm, size, self.options.recipe))
        alike = ("data", "seed", "held_out", "size", "recipe")
        shared = {field: getattr(self.options, field) for field in alike}
        options = Training(folder / name, name, steps, save_every=steps, keep=1, **shared)
        return TrainSettings(options=options, corpus=self.corpus)


def run_ablation(ablation: Ablation, console: Console) -> None:
    """Trains what is not finished, saves each arm before the next begins, and reports.

    **Raises:** `ValueError` for bad settings, `FloatingPointError` for a loss that is not finite.
    """
    names = tuple(arm.name for arm in arms_named(ablation.arms))
    out = ablation.out
    check_out(out)
    corpus = read_corpus(ablation.data, length=ablation.size.length)
    options = dataclasses.replace(ablation, data=absolute_glob(ablation.data), arms=names)
    settings = AblationSettings(options=options, corpus=corpus.fingerprint)
    runs = settings.runs(out)  # before anything is written
    claim(out, settings, besides=("out", "data", "arms", "recall"))
    budget = f"{training_budget(ablation.budget, ablation.size):.3g} training FLOPs for every arm"
    say_progress(console, f"{corpus}; {budget}.")
    each = {run.options.out: run for group in runs.values() for run in group.values()}
    pending = []
    for folder, run in each.items():
        if load_result(folder, run) is None:
            pending.append(run.options)
        else:
            say_progress(console, f"{_title(run.options)}: finished before, kept.")
    with progress(console, len(pending)) as bars:
        for training in pending:
            title = _title(training)
            with bars.arm(title, training.steps) as watch:
                result = train_arm(training, corpus, console, watch)
            steps = f"{training.steps} steps in {result.seconds:.0f} s"
            say_progress(console, f"{title}: {steps}, {result.held_out}.")
            jax.clear_caches()  # as the number of programs that a process can hold is bounded
    if ablation.recall:
        train_tasks(_recall(ablation), console)
    report(out, console)


def _recall(ablation: Ablation) -> Tasks:
    """The task of an ablation, in a folder of its own: what is known beside what is measured."""
    arms = ("dense", "oracle", "learned", "random")
    return Tasks(ablation.out / _RECALL, arms=arms, seeds=1)


def _title(training: Training) -> str:
    note = f", {EQUAL_STEPS}" if training.out.parent.name == "equal-steps" else ""
    return f"{training.arm}{note}"


def run_rereport(rereport: Rereport, console: Console) -> None:
    """Reports again on the ablation or the sweep in a folder, whichever it holds.

    **Raises:** `ValueError` where there is neither.
    """
    from .evidence.records import SweepSettings
    from .evidence.report import report_sweep

    out = rereport.out
    reports = {
        AblationSettings.format: report,
        SweepSettings.format: report_sweep,
        TaskSettings.format: report_tasks,
    }
    there = settings_format(out)
    if there not in reports:
        raise ValueError(
            "`out` must be the folder of `mode-lab ablate`, `tasks` or `isoflop`, got "
            f"{out}, of {there!r}."
        )
    reports[there](out, console)


def report(out: Path, console: Console) -> None:
    """Writes the table and the files of all arms that finished in `out`.

    **Raises:** `ValueError` where there is no run, or no arm has finished.
    """
    settings = read_settings(out, AblationSettings)
    finished = tuple(name for name in NAMES if (out / "arms" / name / "result.json").exists())
    options = dataclasses.replace(settings.options, out=out, arms=finished or NAMES)
    command = command_line("ablate", options)
    if not finished:
        raise ValueError(
            f"`out` must hold at least one finished arm, got {out}. Run `{command}` to train them."
        )
    runs = AblationSettings(options=options, corpus=settings.corpus).runs(out)
    results = {
        comparison: [r for run in group.values() if (r := load_result(run.options.out, run))]
        for comparison, group in runs.items()
    }
    write_report(out, results[EQUAL_FLOPS], results.get(EQUAL_STEPS, []), command, console)
    if (out / _RECALL).exists():
        report_tasks(out / _RECALL, console)
