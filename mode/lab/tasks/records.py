"""The records of the tasks: one file for each task, arm and seed."""

from pathlib import Path

from ..files import Record, Strict, read_record, write_record
from ..options import Recipe


class Score(Strict):
    """What a model does on sequences that it was not trained on.

    `accuracy` is the fraction of the scored tokens that it predicts; `hits` by class the fraction
    of the tokens that got a slot. `classes` and `selected` are of a few of the sequences.
    """

    accuracy: float
    hits: dict[str, float]
    classes: tuple[tuple[int, ...], ...]
    selected: tuple[tuple[bool, ...], ...]


class TaskSettings(Record):
    """What the results of a folder have in common."""

    format = "mode-lab tasks"
    version = 1

    recipe: Recipe
    density: float
    steps: int | None


class TaskResult(Record):
    """What one arm does on a task: `top_k`, as it was trained, and `causal` where that differs."""

    format = "mode-lab task result"
    version = 1
    remedy = "Delete it, and the same command trains the run again."

    task: str
    arm: str
    seed: int
    top_k: Score
    causal: Score | None

    @property
    def last(self) -> Score:
        """The score that a sampler gets."""
        return self.top_k if self.causal is None else self.causal


def result_path(out: Path, task: str, arm: str, seed: int) -> Path:
    """The file of a result in the folder `out`."""
    return out / "results" / f"{task}_{arm}_{seed}.json"


def read_results(out: Path) -> list[TaskResult]:
    """Reads all results of a folder; raises `ValueError` for a file that is not as it was."""
    results = [read_record(path, TaskResult) for path in sorted((out / "results").glob("*.json"))]
    return sorted(results, key=lambda result: result.seed)


def write_result(out: Path, result: TaskResult) -> None:
    """Writes a result, whole or not at all."""
    path = result_path(out, result.task, result.arm, result.seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_record(path, result)
