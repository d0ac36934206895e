"""What a trained model's routers learned, over real text: the command `mode-lab analyze`."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Int
from rich.console import Console

import mode

from .analysis_report import About, Shown, write_analysis
from .arms import Arm
from .data import Documents, Sequences, read_corpus, read_documents
from .evaluate import causal_model
from .files import read_settings
from .measures import byte_classes
from .observe import observe
from .passage import find_passage
from .run import load_run
from .summary import summarise


@dataclasses.dataclass(frozen=True)
class Analyzing:
    """Show what the routers of a trained model learned: who is computed, where, and how that goes
    with the kind of byte and with how uncertain the prediction is.

    Everything is shown twice: under the selection of training, which sees the future, and under
    the causal rule, as a sampler would have it.
    """

    checkpoint: Path = Path("runs/train")
    """Folder of a `mode-lab train` run; its newest checkpoint is taken."""
    data: str | None = None
    """Files to read, all of them, a quoted glob such as "texts/**/*.txt". By default the run's own
    held-out text."""
    sequences: int = 512
    """Sequences of the run's length, at most; evenly spread over the text."""
    out: Path | None = None
    """Folder for the pictures, analysis.md and analysis.json; by default `analysis` in the run's
    folder."""
    seed: int = 0
    """Of random routing, and of the bootstrap."""


def run_analysis(analyzing: Analyzing, console: Console) -> None:
    """Analyse, print what was found, and save it with its pictures.

    **Raises:** `ValueError` for bad settings, a folder without a checkpoint, or unfit text.
    """
    if analyzing.sequences < 1:
        raise ValueError(f"`sequences` must be at least 1, got {analyzing.sequences}.")
    out = analyzing.checkpoint / "analysis" if analyzing.out is None else analyzing.out
    if out.exists() and not out.is_dir():
        raise ValueError(f"`out` must be a folder or not exist yet, got the file {out}.")
    arm, size, steps, trained = load_run(analyzing.checkpoint, console)
    text = _text(analyzing, size.length)
    source = Sequences(text.documents, size.length)
    places = _spread(len(source), analyzing.sequences)
    key = jax.random.key(analyzing.seed)
    models = _selections(arm, trained)
    observed = {
        name: observe(model, source, places, batch=size.batch, key=key)
        for name, model in models.items()
    }
    classes = _classes_at(text.documents, places, size.length)
    summaries = summarise(observed, classes, seed=analyzing.seed)
    shown = None
    if arm.routed is not None:
        passage = find_passage(source)
        taken = {
            name: passage.of(
                observe(model, source, passage.places, batch=size.batch, key=key).taken
            )
            for name, model in models.items()
        }
        shown = Shown(passage, taken)
    about = About(analyzing.checkpoint, arm, steps, size, text.said, text.notes, analyzing.seed)
    write_analysis(out, about, summaries, shown, console)


def _selections(arm: Arm, trained: mode.Transformer) -> dict[str, mode.Transformer]:
    """The model under each selection that there is to compare."""
    if arm.rule is None:  # nothing is routed, or the selection of training is causal as it is
        return {"as trained": trained}
    return {"top-k": trained, "causal": causal_model(arm, trained)}


@dataclasses.dataclass(frozen=True)
class _Text:
    """Documents, what they are in a few words, and what to know of them."""

    documents: Documents
    said: str
    notes: tuple[str, ...]


def _text(analyzing: Analyzing, length: int) -> _Text:
    settings = read_settings(analyzing.checkpoint)
    if analyzing.data is not None:
        # All of it: the model learned nothing from it that would have to be held out.
        documents = read_documents(analyzing.data)
        said = f"all of {analyzing.data} ({_files(documents)})"
        return _Text(documents, said, _trained_on(documents, settings, length))
    corpus = read_corpus(settings["data"], length=length)
    notes = ()
    if corpus.fingerprint != settings["corpus"]:
        notes = (
            "The files that the run was trained on have changed since, so that some of what is "
            "held out now may not have been then.",
        )
    said = f"the run's held-out text ({_files(corpus.held_out)})"
    return _Text(corpus.held_out, said, notes)


def _files(documents: Documents) -> str:
    count = len(documents.names)
    return f"{count} file{'s' if count > 1 else ''}"


def _trained_on(documents: Documents, settings: dict[str, Any], length: int) -> tuple[str, ...]:
    """Whether the text is the run's own training text: its predictions would be too good."""
    try:
        corpus = read_corpus(settings["data"], length=length)
    except ValueError:
        return ("Whether the model was trained on this text is not known: its files are gone.",)
    seen = _contents(corpus.train)
    # Of a single file, the first part was trained on.
    single = len(seen) == 1 and settings["data"] is not None
    count = sum(
        content in seen or (single and content.startswith(tuple(seen)))
        for content in _contents(documents)
    )
    if not count:
        return ()
    return (
        f"The model was trained on {count} of these files: its predictions there are better, and "
        "their entropy lower, than on text that is new to it.",
    )


def _contents(documents: Documents) -> list[bytes]:
    return [piece[1:].tobytes() for piece in np.split(documents.tokens, documents.starts[1:])]


def _spread(count: int, wanted: int) -> list[int]:
    """So many numbers below `count`, evenly spread, none twice."""
    kept = min(count, wanted)
    return [place * count // kept for place in range(kept)]


def _classes_at(
    documents: Documents, places: list[int], length: int
) -> Int[np.ndarray, "sequences tokens"]:
    """Of the inputs of sequences; each token knows the one before it, cut or not."""
    classes = byte_classes(documents.tokens)
    at = np.array(places)[:, None] * length + np.arange(length)
    return classes[np.minimum(at, len(classes) - 1)]  # padding, which does not count
