"""Text from a checkpoint, as it comes, and what was computed for it: `mode-lab generate`."""

import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from jaxtyping import Int
from rich.console import Console

import mode

from .commands import Generating as Generating
from .console import say, say_progress
from .corpus import DOCUMENT_START
from .observe import router_places
from .routing_map import plot_generated
from .run import load_run
from .tables import to_console, write_tables


# Bytes per call: few enough that text appears to flow, enough that calls cost nothing.
_PIECE = 16
Write = Callable[[bytes], object]


def _to_stdout(text: bytes) -> None:
    sys.stdout.buffer.write(text)
    sys.stdout.buffer.flush()


def run_generation(generating: Generating, console: Console, write: Write = _to_stdout) -> None:
    """Writes the model's bytes as they come; prints speed, computed tokens and the plot's path,
    and saves the computed tokens as JSON, too.

    **Raises:** `ValueError` for bad settings, or a folder without a checkpoint.
    """
    path = generating.plot or generating.checkpoint / "generated.png"
    if generating.plot is not None and not path.parent.is_dir():
        raise ValueError(f"`plot` must be a file in a folder that exists, got {path}.")
    settings, arm, step, trained = load_run(generating.checkpoint, console)
    if not arm.samples:
        raise ValueError(
            f"`checkpoint` must be of an arm that routes tokens one by one, got {arm.name!r}, "
            "which selects tokens of whole sequences at random: no text can be sampled from it."
        )
    say_progress(console, f"{arm.name} after {step} steps")
    text = generating.prompt.encode()
    prompt = [DOCUMENT_START, *text]
    total, length = len(prompt) + generating.steps, settings.options.size.length
    if total > length:
        more = f"{total} bytes are more than the {length} of a sequence in training: text may get"
        say(console, f"{more} worse, and layers may select another fraction, from there on.")
    model = mode.unstack_layers(arm.causal(trained, max_capacity=generating.max_capacity))
    write(text)
    tokens, speed, routings = _generate(model, prompt, generating, write)
    after = f", {speed:.0f} a second after the first {_PIECE}, which compile" if speed else ""
    say_progress(console, f"\n{len(tokens)} bytes{after}")
    if not routings:
        say(console, "every layer computed every byte: nothing is routed")
        return
    table = _table(model, routings)
    console.print(to_console(table, dict.fromkeys(table.columns[1:3], ".3f")))
    # Behind the picture's own name: a folder of a run has other JSON files.
    write_tables(path.with_suffix(".routers.json"), {"routers": table})
    places = zip(router_places(model), routings, strict=True)
    outer = [(place.layers, both) for place, both in places if not place.nested]
    layers = [layer for some, _ in outer for layer in some]
    counts = np.concatenate([_counts(*both) for _, both in outer])
    about = f"{arm.name} after {step} steps."
    plot_generated(path, np.array([*prompt, *tokens]), counts, len(prompt), layers, about)
    say(console, f"what was computed for which byte: {path}")


def _generate(
    model: mode.Transformer, prompt: list[int], generating: Generating, write: Write
) -> tuple[list[int], float, list[tuple[mode.Routing, mode.Routing]]]:
    """The new tokens, their number per second (0 where all compiled), and of each router the
    routings of the prompt, `[layers, 1, tokens]`, and of the new tokens, `[tokens, layers, 1, 1]`.
    """
    sampler = mode.Sampler(generating.temperature, generating.top_k, generating.top_p)
    keys, steps = jax.random.key(generating.seed)[None], generating.steps
    # Whole pieces are computed, so that one program serves them all.
    room = len(prompt) + -(-steps // _PIECE) * _PIECE
    state, given = mode.prefill(model, jnp.array([prompt]), max_tokens=room)
    tokens: list[int] = []
    pieces, compiled, began = [], 0, time.perf_counter()
    while len(tokens) < steps and DOCUMENT_START not in tokens:
        piece = mode.continue_generation(
            model, state, steps=_PIECE, sampler=sampler, keys=keys, stop_token=DOCUMENT_START
        )
        state = piece.state
        # As NumPy arrays: a slice of another length would be another program to compile.
        new, lengths, routings = jax.device_get((piece.tokens, piece.lengths, piece.routings))
        one = new[0, : int(lengths[0])].tolist()[: steps - len(tokens)]
        write(bytes(token for token in one if token < DOCUMENT_START))
        tokens += one
        # The last piece may have gone on behind the last byte that was requested.
        pieces.append(jax.tree.map(lambda leaf, count=len(one): leaf[:count], routings))
        if not compiled:
            compiled, began = len(tokens), time.perf_counter()
    speed = (len(tokens) - compiled) / (time.perf_counter() - began)
    joined = jax.tree.map(lambda *leaves: jnp.asarray(np.concatenate(leaves)), *pieces)
    return tokens, speed, list(zip(given, joined, strict=True))


def _counts(*both: mode.Routing) -> Int[np.ndarray, "layers tokens"]:
    """By how many experts of a router that is not nested each token was selected."""
    prompt, new = (np.asarray(routing.selected).sum(-1) for routing in both)
    return np.concatenate([prompt[:, 0], new[:, :, 0, 0].T], axis=1)


def _table(
    model: mode.Transformer, routings: list[tuple[mode.Routing, mode.Routing]]
) -> pd.DataFrame:
    rows = []
    for place, router, both in zip(
        router_places(model), mode.routers(model), routings, strict=True
    ):
        computed = sum(int(routing.num_filled.sum()) for routing in both)
        reached = sum(int(routing.valid.sum()) for routing in both)
        dropped = sum(int(routing.num_dropped.sum()) for routing in both)
        rows.append((place.name, computed / max(reached, 1), float(router.capacity), dropped))
    names = ["router", "computed, of tokens that reached it", "capacity in training", "dropped"]
    return pd.DataFrame(rows, columns=pd.Index(names))
