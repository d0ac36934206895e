"""Short runs of `mode-lab train`, what they leave behind, and a short sweep."""

import io
from pathlib import Path
from typing import Any

import equinox as eqx

import mode
from mode.lab import generate, run, train
from mode.lab.arms import arm_named
from mode.lab.checkpoint import Checkpoints, Notes, TrainSettings
from mode.lab.commands import Isoflop
from mode.lab.data import read_corpus
from mode.lab.files import read_record
from mode.lab.folder import claim
from mode.lab.options import Recipe, Size
from mode.lab.step import begin
from tests.lab.helpers import quiet, said
from tests.lab.records import REFERENCE


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


def untrained(out: Path, texts: str, arm: str, size: Size = SIZE) -> Path:
    """Makes the folder of a run whose model is as it was before its first step."""
    corpus = read_corpus(texts, length=size.length)
    options = run.Training(out, arm, steps=2, data=texts, size=size)
    settings = TrainSettings(options=options, corpus=corpus.fingerprint)
    claim(out, settings)
    # Jitted, as some hundred small programs take longer to compile than one.
    state = eqx.filter_jit(begin)(arm_named(arm), size, options.recipe, seed=0)
    notes = Notes(settings=settings, stream={}, losses=(8.0, 8.0))
    Checkpoints(out / "checkpoints", 1).save(2, state, notes)
    return out


def generated(out: Path, **options: Any) -> tuple[bytes, str]:
    """Samples from a run: the text, and what is printed."""
    stream, console = io.BytesIO(), quiet()
    generate.run_generation(generate.Generating(out, **options), console, stream.write)
    return stream.getvalue(), said(console)


def losses(out: Path) -> tuple[float, ...]:
    """Reads the losses of a finished run."""
    return read_record(out / "result.json", run.TrainResult).losses


def saved(out: Path) -> mode.Transformer:
    """Loads the newest model of a finished run."""
    loaded = run.load_run(out, quiet())
    assert loaded.steps == STEPS
    return loaded.model


def trained(texts: str, arm: str, size: Size, recipe: Recipe, **options: Any) -> train.Trained:
    """Trains twelve steps, without a folder."""
    documents = read_corpus(texts, length=size.length).train
    rest = {"steps": 12, "seed": 0, "watch": lambda step, loss: None, **options}
    return train.train(arm_named(arm), size, recipe, documents, **rest)


def isoflop(out: Path, texts: str, **changes: Any) -> Isoflop:
    """Makes the options of a sweep."""
    options: dict[str, Any] = {
        "arms": ("dense",),
        "sizes": ("8x2", "16x2", "24x2"),
        "budgets": (2e8,),
        "seeds": 1,
        "rates": (0.01,),
        "held_out": 4,
        "base": REFERENCE,
    }
    return Isoflop(out=out, data=texts, **{**options, **changes})
