"""The command `mode-lab tasks`: every arm of a task and seed in turn, and a report of all."""

import itertools

import jax
from rich.console import Console

from ..commands import Tasks
from ..console import progress, say_progress
from ..folder import claim
from ..options import TASK_ARMS
from .arms import train_and_score
from .records import Score, TaskResult, TaskSettings, read_results, result_path, write_result
from .report import report_tasks
from .sequences import task_named


def run_tasks(tasks: Tasks, console: Console) -> None:
    """Trains what is not finished, each run saved before the next begins, and reports.

    **Raises:** `ValueError` for an unknown task or arm, or a folder of other settings.
    """
    train_tasks(tasks, console)
    report_tasks(tasks.out, console)


def train_tasks(tasks: Tasks, console: Console) -> None:
    """Trains the runs that the folder does not hold.

    **Raises:** `ValueError` as `run_tasks`.
    """
    unknown = [arm for arm in tasks.arms if arm not in TASK_ARMS]
    if unknown or not tasks.arms or not tasks.tasks:
        raise ValueError(
            f"`tasks` and `arms` must each name at least one, `arms` of {', '.join(TASK_ARMS)}, "
            f"got {', '.join(unknown) or 'none'}."
        )
    chosen = [task_named(name, density=tasks.density) for name in tasks.tasks]
    settings = TaskSettings(recipe=tasks.recipe, density=tasks.density, steps=tasks.steps)
    claim(tasks.out, settings)
    runs = list(itertools.product(chosen, range(tasks.seeds), tasks.arms))
    read_results(tasks.out)  # damaged files are found before hours of training
    missing = [
        (task, seed, arm)
        for task, seed, arm in runs
        if not result_path(tasks.out, task.name, arm, seed).exists()
    ]
    with progress(console, len(missing)) as bars:
        for task, seed, arm in missing:
            steps = tasks.steps or task.steps
            with bars.arm(f"{task.name} {arm}", steps):
                top_k, causal = train_and_score(task, arm, tasks.recipe, steps=steps, seed=seed)
            result = TaskResult(task=task.name, arm=arm, seed=seed, top_k=top_k, causal=causal)
            write_result(tasks.out, result)
            words = _in_words(result.last)
            say_progress(console, f"{task.name}, seed {seed}, {arm}: {words}")
            jax.clear_caches()  # no run shares programs, and a process can hold some thousand


def _in_words(score: Score) -> str:
    hits = "".join(f", {name} {hits:.2f}" for name, hits in score.hits.items())
    return f"accuracy {score.accuracy:.3f}{hits and f'; slots for{hits[1:]}'}"
