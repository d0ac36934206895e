"""The ablation: every arm in turn, at equal training FLOPs, and a report of those that finished.

Each arm is a run of `mode-lab train` in a folder of its own.
"""

import dataclasses
from pathlib import Path

from rich.console import Console

from .arms import NAMES, arm_named, arms_named
from .budget import flops_per_step, steps_for, training_budget
from .checkpoint import TrainSettings
from .commands import Ablation as Ablation, Rereport, Training
from .console import progress, say
from .data import read_corpus
from .files import Record
from .folder import check_out, claim, read_settings, settings_format
from .options import absolute_glob, command_line
from .report import write_report
from .run import load_result, train_arm


class AblationSettings(Record):
    """The settings of an ablation, and the fingerprint of its text."""

    format = "mode-lab ablate"
    version = 1

    options: Ablation
    corpus: str

    def arm(self, out: Path, name: str) -> TrainSettings:
        """The settings of an arm's run, in the folder `out` of the ablation.

        **Raises:** `ValueError` for a budget of less than two steps.
        """
        budget = training_budget(self.options.budget, self.options.size)
        per_step = flops_per_step(arm_named(name), self.options.size)
        steps = steps_for(arm_named(name), budget, per_step)
        alike = ("data", "seed", "held_out", "size", "recipe")
        shared = {field: getattr(self.options, field) for field in alike}
        options = Training(out / "arms" / name, name, steps, save_every=steps, keep=1, **shared)
        return TrainSettings(options=options, corpus=self.corpus)


def run_ablation(ablation: Ablation, console: Console) -> None:
    """Trains what is not finished, saves each arm before the next begins, and reports.

    **Raises:** `ValueError` for bad settings, `FloatingPointError` for a loss that is not finite.
    """
    names = [arm.name for arm in arms_named(ablation.arms)]
    out = ablation.out
    check_out(out)
    corpus = read_corpus(ablation.data, length=ablation.size.length)
    options = dataclasses.replace(ablation, data=absolute_glob(ablation.data))
    settings = AblationSettings(options=options, corpus=corpus.fingerprint)
    arms = {name: settings.arm(out, name) for name in names}  # before anything is written
    claim(out, settings, besides=("out", "data", "arms"))
    budget = f"{training_budget(ablation.budget, ablation.size):.3g} training FLOPs for every arm"
    say(console, f"{corpus}; {budget}.")
    pending = [name for name in names if load_result(out / "arms" / name, arms[name]) is None]
    for name in names:
        if name not in pending:
            say(console, f"{name}: finished before, kept.")
    with progress(console, len(pending)) as bars:
        for name in pending:
            training = arms[name].options
            with bars.arm(name, training.steps) as watch:
                result = train_arm(training, corpus, console, watch)
            steps = f"{training.steps} steps in {result.seconds:.0f} s"
            say(console, f"{name}: {steps}, {result.held_out}.")
    report(out, console)


def run_rereport(rereport: Rereport, console: Console) -> None:
    """Reports again on the ablation or the sweep in a folder, whichever it holds.

    **Raises:** `ValueError` where there is neither.
    """
    from .evidence.records import SweepSettings
    from .evidence.report import report_sweep

    out = rereport.out
    there = settings_format(out)
    if there not in (SweepSettings.format, AblationSettings.format):
        raise ValueError(
            f"`out` must be the folder of `mode-lab ablate` or `isoflop`, got {out}, of {there!r}."
        )
    is_sweep = there == SweepSettings.format
    (report_sweep if is_sweep else report)(out, console)


def report(out: Path, console: Console) -> None:
    """Writes the table and the files of all arms that finished in `out`.

    **Raises:** `ValueError` where there is no run, or no arm has finished.
    """
    settings = read_settings(out, AblationSettings)
    finished = [name for name in NAMES if (out / "arms" / name / "result.json").exists()]
    results = [load_result(out / "arms" / name, settings.arm(out, name)) for name in finished]
    options = dataclasses.replace(settings.options, out=out, arms=tuple(finished) or NAMES)
    command = command_line("ablate", options)
    if not finished:
        raise ValueError(
            f"`out` must hold at least one finished arm, got {out}. Run `{command}` to train them."
        )
    write_report(out, [result for result in results if result], command, console)
