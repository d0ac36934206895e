"""What the routers of a trained model do on real text: the command `mode-lab analyze`."""

from functools import partial

import jax
import numpy as np
from rich.console import Console

from .commands import Analysis, Training
from .corpus import Documents, read_corpus, read_documents
from .folder import check_out


def run_analysis(options: Analysis, console: Console) -> None:
    """Analyses a run, prints the results, and saves them with their pictures.

    **Raises:** `ValueError` for bad options, a folder without a checkpoint, or unfit text.
    """
    from .analysis_report import About, write_analysis
    from .data import Sequences
    from .measures import byte_classes
    from .observe import observe
    from .passage import find_passage
    from .routing_map import RoutingMap
    from .run import load_run
    from .summary import summarise

    out = options.checkpoint / "analysis" if options.out is None else options.out
    check_out(out)
    settings, arm, steps, trained = load_run(options.checkpoint, console)
    size = settings.options.size
    look = partial(observe, batch=size.batch, key=jax.random.key(options.seed))
    documents, text, notes = _read_text(options.data, settings.options, settings.corpus)
    source = Sequences(documents, size.length)
    if arm.rule is None:  # nothing is routed, or the selection of training is causal already
        models = {"as trained": trained}
    else:
        models = {"top-k": trained, "causal": arm.causal(trained)}
    count = min(options.sequences, len(source))
    rows = [number * len(source) // count for number in range(count)]
    observations = {name: look(model, source, rows) for name, model in models.items()}
    # Each token knows the one before it, in the same sequence or not; padding does not count.
    tokens = np.array(rows)[:, None] * size.length + np.arange(size.length)
    classes = byte_classes(documents.tokens).take(tokens, mode="clip")
    summary = summarise(observations, classes, seed=options.seed)
    routing_map = None
    if arm.routed is not None:
        passage = find_passage(source)
        counts = {name: look(model, source, passage.rows).counts for name, model in models.items()}
        counts = {name: tuple(map(tuple, passage.cut(n).tolist())) for name, n in counts.items()}
        tokens, starts = tuple(passage.tokens.tolist()), tuple(passage.sequence_starts())
        routing_map = RoutingMap(passage.document, tokens, starts, summary.layers, counts)
    checkpoint = str(options.checkpoint)
    about = About(checkpoint, arm.name, steps, size, text, notes, options.seed)
    write_analysis(out, about, summary, routing_map, console)


def _read_text(
    data: str | None, training: Training, fingerprint: str
) -> tuple[Documents, str, tuple[str, ...]]:
    """Reads documents, names them in a few words, and notes what a reader must know of them."""
    length, note = training.size.length, ""
    if data is not None:
        # All of it: the run holds out nothing of a text that it was not trained on.
        documents, name = read_documents(data), f"all of {data}"
        try:
            corpus = read_corpus(training.data, length=length)
        except ValueError:
            note = "It is not known whether the model was trained on this text: its files are gone."
        else:
            seen = _contents(corpus.train)
            # The run was trained on the first part of a single file.
            start = tuple(seen) if corpus.held_out.names[0].endswith("(end)") else ()
            count = sum(text in seen or text.startswith(start) for text in _contents(documents))
            if count:
                note = (
                    f"The model was trained on {count} of these files: its predictions there are "
                    "better, and their entropy is lower, than on new text."
                )
    else:
        corpus = read_corpus(training.data, length=length)
        documents, name = corpus.held_out, "the run's held-out text"
        if corpus.fingerprint != fingerprint:
            note = (
                "The files of the run have changed since it was trained: some of what is held out "
                "now may have been training text."
            )
    count = len(documents.names)
    name += f" ({count} file{'s' if count > 1 else ''})"
    return documents, name, (note,) if note else ()


def _contents(documents: Documents) -> list[bytes]:
    return [piece[1:].tobytes() for piece in np.split(documents.tokens, documents.starts[1:])]
