"""The records of a sweep: one file per finished run, named after its configuration.

So no run is repeated, a folder can grow at any time, and two are joined by copying files.
"""

import dataclasses
from pathlib import Path

from ..files import Record, Strict, content_digest, read_record, write_record
from ..folder import check_out
from ..options import Recipe, Size


# Seeds from here on belong to the search of learning rates. No comparison uses these runs.
SEARCH_SEED = 1000


class SweepSettings(Record):
    """What the runs of a folder have in common. `recipe` holds for all but the learning rate, for
    which `rates` and `search_budget` are. Arms are compared at the size `reference`."""

    format = "mode-lab isoflop"
    version = 2

    reference: Size
    rates: tuple[float, ...]
    search_budget: float
    held_out: int
    recipe: Recipe
    corpus: str


class Run(Strict):
    """The configuration of a run. Equal configurations give equal results on one machine.

    `budget` are training FLOPs, `held_out` the most sequences to evaluate on, and `corpus` is the
    fingerprint of the text. At `equal_steps`, the budget is that of the dense arm, whose steps the
    run takes.
    """

    arm: str
    size: Size
    recipe: Recipe
    budget: float
    seed: int
    held_out: int
    corpus: str
    equal_steps: bool = False

    @property
    def name(self) -> str:
        """Name of the record's file: readable, and different for every configuration."""
        digest = content_digest(self.model_dump(mode="json"))[:12]
        arm = f"{self.arm}-equal-steps" if self.equal_steps else self.arm
        return f"{arm}_{shape_name(self.size)}_{self.budget:.3g}_{self.seed}_{digest}"

    @property
    def group(self) -> str:
        """Name of the runs that share their compiled programs: those of one arm and size."""
        return f"{self.arm}_{content_digest(dataclasses.asdict(self.size))[:12]}"

    def at_rate(self, rate: float) -> "Run":
        """Returns this run at another learning rate."""
        recipe = dataclasses.replace(self.recipe, learning_rate=rate)
        return self.model_copy(update={"recipe": recipe})


def shape_name(size: Size) -> str:
    """Returns features and layers of a size, as `32x4`."""
    return f"{size.dim}x{size.depth}"


class Mark(Strict):
    """An evaluation during a run, or at its end.

    `top_k` and `causal` are held-out bits per byte, under the training selection and causally;
    `without` those of the causal model without its routed updates, of arms that may recover.
    `precision` and `recall` of the causal rule against top-k, and the `slots` filled per token
    under that rule, are the outermost router's; `None` where there is none.
    """

    step: int
    top_k: float
    causal: float
    precision: float | None
    recall: float | None
    slots: float | None
    without: float | None = None


class RunRecord(Record):
    """The result of a finished run.

    `forward_flops` are per token, `step_flops` of one step's loss and gradient. `end` evaluates all
    held-out sequences after the last step, `marks` fewer of them during the run. `slots_top_k` are
    filled per token by the outermost router under the training selection. `losses` are means of the
    training loss in bits per byte over equal parts of the run. `seconds` went into `training`, its
    part `waiting` for data, and `evaluating`.
    """

    format = "isoflop run"
    version = 4
    remedy = "Delete it, and the same command trains the run again."

    run: Run
    parameters: int
    forward_flops: float
    step_flops: float
    steps: int
    end: Mark
    slots_top_k: float | None
    marks: tuple[Mark, ...]
    losses: tuple[float, ...]
    seconds: dict[str, float]
    step_seconds: float
    versions: dict[str, str]
    machine: str


class Failure(Record):
    """Why a run gave no result, so that it is not started again."""

    format = "mode-lab failed run"
    version = 1

    run: Run
    reason: str


class Store:
    """The records in a folder."""

    def __init__(self, folder: Path):
        check_out(folder)
        self.folder = folder

    def path(self, run: Run) -> Path:
        """Returns where the record of a run is, or will be."""
        return self.folder / "records" / f"{run.name}.json"

    def failure_path(self, run: Run) -> Path:
        """Returns where the reason is, or would be, why a run gave no result."""
        return self.folder / "failures" / f"{run.name}.json"

    def is_finished(self, run: Run) -> bool:
        """Whether a run ended, with a result or without."""
        return self.path(run).exists() or self.failure_path(run).exists()

    def get(self, run: Run) -> RunRecord | None:
        """Reads the record of a run, if it ended with a result."""
        return read_record(self.path(run), RunRecord) if self.path(run).exists() else None

    def add(self, record: RunRecord) -> None:
        """Writes a record, whole or not at all."""
        path = self.path(record.run)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_record(path, record)

    def fail(self, run: Run, reason: str) -> None:
        """Writes why a run gave no result, so that it is not started again."""
        path = self.failure_path(run)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_record(path, Failure(run=run, reason=reason))

    def failures(self) -> dict[str, str]:
        """Reads why runs gave no result, by the names of the runs."""
        paths = sorted((self.folder / "failures").glob("*.json"))
        return {path.stem: read_record(path, Failure).reason for path in paths}

    def all(self, settings: SweepSettings) -> list[RunRecord]:
        """Reads every record, in the order of their names.

        **Raises:** `ValueError` for a file that is not as it was written, has not the name of its
        run, or belongs to runs of other settings.
        """
        paths = sorted((self.folder / "records").glob("*.json"))
        records = {path: read_record(path, RunRecord) for path in paths}
        wanted = (settings.corpus, settings.held_out, settings.recipe)
        for path, run in ((path, record.run) for path, record in records.items()):
            recipe = run.at_rate(settings.recipe.learning_rate).recipe
            if path.stem != run.name or (run.corpus, run.held_out, recipe) != wanted:
                raise ValueError(
                    f"`out` must hold runs of one corpus, recipe and number of held-out sequences, "
                    f"each named after its run, got {path}. Move it to a folder of its own."
                )
        return list(records.values())
