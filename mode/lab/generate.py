"""Text from a checkpoint, as it comes, and what was computed for it: `mode-lab generate`."""

import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from jaxtyping import Int
from rich.console import Console

import mode

from .commands import Generating as Generating
from .console import say
from .corpus import DOCUMENT_START
from .observe import router_places
from .options import check_options
from .routing_map import plot_generated
from .run import load_run
from .tables import to_console


# Bytes per call: few enough that text appears to flow, enough that calls cost nothing.
_PIECE = 16


def _to_stdout(text: bytes) -> None:
    sys.stdout.buffer.write(text)
    sys.stdout.buffer.flush()


def run_generation(
    generating: Generating, console: Console, write: Callable[[bytes], object] = _to_stdout
) -> None:
    """Writes the model's bytes as they come; prints speed, computed tokens and the plot's path.

    **Raises:** `ValueError` for bad settings, or a folder without a checkpoint.
    """
    generating = check_options(generating)
    path = generating.plot or generating.checkpoint / "generated.png"
    if generating.plot is not None and not path.parent.is_dir():
        raise ValueError(f"`plot` must be a file in a folder that exists, got {path}.")
    settings, arm, step, trained = load_run(generating.checkpoint, console)
    if not arm.samples:
        raise ValueError(
            f"`checkpoint` must be of an arm that routes tokens one by one, got {arm.name!r}, "
            "which selects tokens of whole sequences at random: no text can be sampled from it."
        )
    say(console, f"{arm.name} after {step} steps")
    text = generating.prompt.encode()
    prompt = [DOCUMENT_START, *text]
    total, length = len(prompt) + generating.steps, settings.options.size.length
    if total > length:
        say(
            console,
            f"{total} bytes are more than the {length} of a sequence in training: text may get "
            "worse, and layers may select another fraction, from there on.",
        )
    model = mode.unstack_layers(arm.causal(trained, max_capacity=generating.max_capacity))
    write(text)
    generated = _generate(model, prompt, generating, write)
    speed = generated.speed
    after = f", {speed:.0f} a second after the first {_PIECE}, which compile" if speed else ""
    say(console, f"\n{len(generated.tokens)} bytes{after}")
    if not mode.routers(model):
        say(console, "every layer computed every byte: nothing is routed")
        return
    places = router_places(model)
    console.print(_table(model, generated))
    outer = [
        (layer, row)
        for number, place in enumerate(places)
        if not place.nested
        for layer, row in zip(place.layers, _counts(generated, number), strict=True)
    ]
    layers, counts = [layer for layer, _ in outer], np.stack([row for _, row in outer])
    about = f"{arm.name} after {step} steps."
    tokens = np.array([*prompt, *generated.tokens])
    plot_generated(path, tokens, counts, len(prompt), layers, about)
    say(console, f"what was computed for which byte: {path}")


class _Generated(NamedTuple):
    """The new tokens, their number per second (0 where all compiled), the routings of the prompt,
    `[layers, 1, tokens]`, and those of the new tokens, `[tokens, layers, 1, 1]`."""

    tokens: list[int]
    speed: float
    prompt: tuple[mode.Routing, ...]
    new: tuple[mode.Routing, ...]


def _generate(
    model: mode.Transformer,
    prompt: list[int],
    generating: Generating,
    write: Callable[[bytes], object],
) -> _Generated:
    sampler = mode.Sampler(generating.temperature, generating.top_k, generating.top_p)
    keys, steps = jax.random.key(generating.seed)[None], generating.steps
    # Whole pieces are computed, so that one program serves them all.
    room = len(prompt) + -(-steps // _PIECE) * _PIECE
    state, prompt_routings = mode.prefill(model, jnp.array([prompt]), max_tokens=room)
    tokens: list[int] = []
    pieces = []
    compiled, began = 0, time.perf_counter()
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
    joined = jax.tree.map(lambda *leaves: np.concatenate(leaves), *pieces)
    return _Generated(tokens, speed, jax.device_get(prompt_routings), joined)


def _counts(generated: _Generated, number: int) -> Int[np.ndarray, "layers tokens"]:
    """By how many experts of a router that is not nested each token was selected."""
    prompt, new = (
        np.asarray(jax.tree.map(jnp.asarray, some[number]).selected).sum(-1)
        for some in (generated.prompt, generated.new)
    )
    return np.concatenate([prompt[:, 0], new[:, :, 0, 0].T], axis=1)


def _table(model: mode.Transformer, generated: _Generated) -> object:
    rows = []
    for place, router, *both in zip(
        router_places(model), mode.routers(model), generated.prompt, generated.new, strict=True
    ):
        some = [jax.tree.map(jnp.asarray, routing) for routing in both]
        computed = sum(int(routing.num_filled.sum()) for routing in some)
        reached = sum(int(routing.valid.sum()) for routing in some)
        rows.append(
            {
                "router": place.name,
                "computed, of tokens that reached it": computed / max(reached, 1),
                "capacity in training": float(router.capacity),
                "dropped": sum(int(routing.num_dropped.sum()) for routing in some),
            }
        )
    formats = {"computed, of tokens that reached it": ".3f", "capacity in training": ".3f"}
    return to_console(pd.DataFrame(rows), formats)
