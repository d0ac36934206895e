"""A short run of `mode-lab train`, and what it leaves behind."""

from pathlib import Path

import mode
from mode.lab import run
from mode.lab.files import read_record
from mode.lab.options import Recipe, Size
from tests.lab.helpers import quiet


SIZE = Size(dim=8, depth=2, heads=1, length=64, batch=2, experts=2, noop=1)
STEPS = 25
FLAGS = [
    *("--size.dim", "8", "--size.depth", "2", "--size.heads", "1", "--size.length", "64"),
    *("--size.batch", "2", "--size.experts", "2", "--size.noop", "1", "--steps", str(STEPS)),
    *("--held-out", "4", "--save-every", "7"),
]


def training(out: Path, texts: str, arm: str = "mod", steps: int = STEPS) -> run.Training:
    """Makes the options of a run."""
    return run.Training(
        out, arm, steps, texts, held_out=4, save_every=7, size=SIZE, recipe=Recipe()
    )


def losses(out: Path) -> tuple[float, ...]:
    """Reads the losses of a finished run."""
    return read_record(out / "result.json", run.TrainResult).losses


def saved(out: Path) -> mode.Transformer:
    """Loads the newest model of a finished run."""
    loaded = run.load_run(out, quiet())
    assert loaded.steps == STEPS
    return loaded.model
