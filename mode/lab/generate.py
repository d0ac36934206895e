"""Text from a checkpoint, as it comes, and what was computed for it: `mode-lab generate`."""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import rich.box
from rich.console import Console
from rich.table import Table

import mode

from .data import DOCUMENT_START
from .files import write_atomically
from .plots import plot_generated
from .run import load_run


# Bytes per call: few enough that text appears to flow, enough that calls cost nothing.
_PIECE = 16


@dataclasses.dataclass(frozen=True)
class Generating:
    """Continue a text with a trained model, byte by byte, and say what was computed for it."""

    checkpoint: Path = Path("runs/train")
    """Folder of a `mode-lab train` run; its newest checkpoint is taken."""
    prompt: str = ""
    """Text to continue. By default a new document begins."""
    steps: int = 256
    """Bytes to generate, at most: the end of the document ends the text."""
    temperature: float = 0.8
    """0 takes the likeliest byte, 1 samples from the model's own distribution."""
    top_k: int | None = None
    """Sample from so many likeliest bytes."""
    top_p: float = 1.0
    """Sample from the likeliest bytes that together have this probability."""
    limit: float = 1.0
    """Largest share of the text that a routed layer may take: the size of its cache. Tokens that
    find it full go around, and are counted."""
    seed: int = 0
    """Of the sampling."""
    plot: Path | None = None
    """PNG of which bytes each routed layer computed; by default `generated.png` in the run's
    folder."""


def run_generation(
    generating: Generating, write: Callable[[bytes], object], console: Console
) -> None:
    """`write` the model's bytes as they come, whatever they are; print speed, realised compute and
    the plot's place to `console`.

    **Raises:** `ValueError` for bad settings, or a folder without a checkpoint.
    """
    sampler = mode.Sampler(generating.temperature, generating.top_k, generating.top_p)
    if generating.steps < 1:
        raise ValueError(f"`steps` must be at least 1, got {generating.steps}.")
    arm, size, taken, trained = load_run(generating.checkpoint, console)
    path = generating.plot or generating.checkpoint / "generated.png"
    if not path.parent.is_dir():
        raise ValueError(f"`plot` must be a file in a folder that exists, got {path}.")
    if not arm.samples:
        raise ValueError(
            f"`checkpoint` must be of an arm whose tokens decide for themselves, got {arm.name!r}, "
            "which draws its tokens from whole sequences: there is no text to sample from it."
        )
    model = mode.unrolled(mode.causal(trained, by=arm.rule, limit=generating.limit))
    console.print(f"{arm.name} after {taken} steps", highlight=False)
    prompt = [DOCUMENT_START, *generating.prompt.encode("utf-8", "surrogateescape")]
    total = len(prompt) + generating.steps
    if total > size.length:
        console.print(
            f"{total} bytes are more than the {size.length} it saw at once in training: text may "
            "get worse, and layers may take another share, from there on.",
            highlight=False,
        )
    pieces = _Pieces(model, prompt, generating.steps, sampler, generating.seed)
    write(generating.prompt.encode("utf-8", "surrogateescape"))
    for piece in pieces:
        write(bytes(token for token in piece if token < DOCUMENT_START))
    speed = f"{pieces.speed:.0f} a second after the first {_PIECE}, which compile"
    console.print(
        f"\n{len(pieces.tokens)} bytes{'' if math.isnan(pieces.speed) else f', {speed}'}",
        highlight=False,
    )
    found = mode.entered(model, pieces.decoding)
    if not found:
        console.print("every layer computed every byte: nothing is routed", highlight=False)
        return
    tokens = np.array([*prompt, *pieces.tokens])
    # The last piece may have gone on behind the last byte asked for.
    counts = [np.asarray(part.count)[:, 0, : len(tokens)] for part in found]
    nested = arm.name == "mode-staged"  # the experts' router is inside the depth's
    console.print(_table(found, counts, nested))
    outer = np.concatenate(counts[:: 2 if nested else 1])
    write_atomically(path, lambda beside: plot_generated(beside, tokens, outer, len(prompt)))
    console.print(f"what was computed for which byte: {path}", highlight=False)


class _Pieces:
    """The generated tokens, piece by piece; afterwards their speed, and where the text stands."""

    def __init__(
        self,
        model: mode.Transformer,
        prompt: list[int],
        steps: int,
        sampler: mode.Sampler,
        seed: int,
    ):
        self.model = model
        self.steps = steps
        self.sampler = sampler
        self.keys = jax.random.key(seed)[None]
        # Whole pieces are computed, so that one program serves them all.
        room = len(prompt) + -(-steps // _PIECE) * _PIECE
        self.made: mode.Decoding | mode.Generation = mode.prefill(
            model, jnp.array([prompt]), max_tokens=room
        )
        self.tokens: list[int] = []
        self.speed = float("nan")

    @property
    def decoding(self) -> mode.Decoding:
        """Where the text stands."""
        return self.made if isinstance(self.made, mode.Decoding) else self.made.decoding

    def __iter__(self) -> Iterator[list[int]]:
        after, began = 0, time.perf_counter()
        done = False
        while len(self.tokens) < self.steps and not done:
            made = mode.sample(
                self.model,
                self.made,
                steps=_PIECE,
                sampler=self.sampler,
                keys=self.keys,
                stop=DOCUMENT_START,
            )
            self.made = made
            # As NumPy's: a slice of another length would be another program to compile.
            tokens, lengths, ended = map(np.asarray, (made.tokens, made.lengths, made.done))
            done = bool(ended[0])
            piece = tokens[0, : int(lengths[0])].tolist()[: self.steps - len(self.tokens)]
            if not self.tokens:
                after, began = len(piece), time.perf_counter()
            self.tokens += piece
            yield piece
        computed = len(self.tokens) - after
        self.speed = computed / (time.perf_counter() - began) if computed else float("nan")


def _table(found: list[mode.Entered], counts: list[np.ndarray], nested: bool) -> Table:
    table = Table(box=rich.box.SIMPLE)
    table.add_column("router")
    for name in ("computed, of what came", "trained for", "turned away"):
        table.add_column(name, justify="right")
    for place, (part, count) in enumerate(zip(found, counts, strict=True)):
        inner = nested and place % 2 == 1
        came = counts[place - 1].sum() if inner else count.size
        refused = np.asarray(part.refused)[:, 0].sum()
        table.add_row(
            str(place + 1),
            f"{count.sum() / max(came, 1):.3f}",
            f"{part.trained:.3f}",
            str(refused),
        )
    return table
