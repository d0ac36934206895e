"""One arm of a healing, from its last checkpoint to its result."""

import dataclasses
import itertools
import math
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

import mode
from mode._types import Scalar
from mode.routing import Routings

from .. import interrupts
from ..checkpoint import Checkpoints
from ..console import say, say_progress
from ..corpus import Corpus
from ..data import Batch, Sample, batches, held_out_batches
from ..evaluate import held_out_loss
from ..files import read_record, write_record, write_stream
from ..folder import check_same
from ..train import calibrate
from .options import Healing
from .records import HealNotes, HealResult, HealSettings
from .teacher import Teacher
from .train import HealState, Phase, make_step, plan_phases, rates


# Options that decide nothing of a run: where its files are, and which other arms there are.
BESIDES = ("out", "data", "model", "arms", "save_every", "held_out")


@dataclasses.dataclass(frozen=True)
class Source:
    """What all arms share: the dense model, its loss on held-out text, the text, the settings."""

    dense: mode.Transformer
    corpus: Corpus
    samples: list[Sample]
    dense_loss: float
    settings: HealSettings

    def stream(self, seed: int) -> Iterator[Sample]:
        """Makes the batches of a training, in the order of a seed."""
        options = self.settings.options
        return batches(self.corpus.train, length=options.length, batch=options.batch, seed=seed)


def make_source(dense: mode.Transformer, corpus: Corpus, settings: HealSettings) -> Source:
    """Cuts the held-out text and evaluates the dense model on it."""
    options = settings.options
    sizes = {"length": options.length, "batch": options.batch, "sequences": options.held_out}
    samples = held_out_batches(corpus.held_out, **sizes)
    loss, *_ = held_out_loss(dense, samples, jax.random.key(options.seed))
    return Source(dense, corpus, samples, loss, settings)


def make_arm(options: Healing, dense: mode.Transformer, arm: str) -> mode.Transformer:
    """The model of an arm before any training."""
    if arm == "left-out":
        layers = mode.list_layers(dense)
        kept = [layer for n, layer in enumerate(layers) if n not in options.layers]
        return mode.with_layers(dense, kept)
    selectors = {"random": mode.RandomChoice(), "strided": mode.Strided()}
    return mode.pretrained.convert(
        dense,
        options.layers,
        capacity=options.capacity,
        form=options.form,
        select=selectors.get(arm, mode.ExpertChoice()),
        key=jax.random.fold_in(jax.random.key(options.seed), 1),
    )


def heal_arm(source: Source, arm: str, out: Path, console: Console) -> HealResult:
    """Trains an arm in its folder, from where it stands, and saves model and result.

    **Raises:** `FloatingPointError` for a loss that is not finite; `KeyboardInterrupt` after the
    save of a run that a signal stopped.
    """
    options, began = source.settings.options, time.perf_counter()
    if (out / "result.json").exists():
        result = read_record(out / "result.json", HealResult)
        check_same(out, result.settings, source.settings, besides=BESIDES)
        return result
    model = make_arm(options, source.dense, arm)
    key = jax.random.key(options.seed)
    total, phases = plan_phases(options, model, arm)
    checkpoints = Checkpoints(out / "checkpoints", 1, HealNotes)
    saved = checkpoints.steps[-1] if checkpoints.steps else 0
    notes: Any = None  # those of the checkpoint, where there is one
    if not saved:
        converted, *_ = held_out_loss(model, source.samples, key)
        notes = HealNotes(arm=arm, settings=source.settings, losses=(), converted=converted)
        after = f"{converted:.3f} nats per token after conversion"
        say_progress(console, f"{arm}: {after}, dense {source.dense_loss:.3f}.")
    shape = (total, options.batch, options.length, options.top)
    teacher = Teacher(source.dense, out.parent / "teacher", shape) if total else None
    out.mkdir(parents=True, exist_ok=True)
    # Cutting the batches of the steps before takes less than a millisecond each.
    stream = itertools.islice(source.stream(options.seed), saved, None)
    state: Any = None
    for phase in phases:
        if saved > phase.last:
            continue
        if state is None or phase.first == phase.steps[0]:
            model = mode.with_capacity(model, phase.capacities) if phase.capacities else model
            state = HealState.begin(model, phase.part, options)
        else:
            state = mode.with_capacity(state, phase.capacities) if phase.capacities else state
        if phase.first < saved:
            restored = checkpoints.newest(state, partial(say, console))
            assert restored is not None
            _, state, notes = restored
            check_same(out, notes.settings, source.settings, besides=BESIDES)
            say_progress(console, f"{arm}: goes on from step {saved}.")
        assert teacher is not None
        run = _Run(options, teacher, checkpoints, stream, total, console)
        state, notes = run.phase(phase, state, notes)
        model = state.model
        if phase.part == "routers" and notes.routers is None:
            loss, *_ = held_out_loss(model, source.samples, key)
            notes = notes.model_copy(update={"routers": loss})
            say_progress(console, f"{arm}: {loss:.3f} after the steps of routers alone.")
    return _finish(source, model, notes, out, began)


@dataclasses.dataclass(frozen=True)
class _Run:
    """What all phases of an arm share."""

    options: Healing
    teacher: Teacher
    checkpoints: Checkpoints[HealNotes]
    stream: Iterator[Sample]
    total: int
    console: Console

    def phase(
        self, phase: Phase, state: HealState, notes: HealNotes
    ) -> tuple[HealState, HealNotes]:
        """Runs a phase from where it stands to its last step."""
        options, arm, losses = self.options, notes.arm, list(notes.losses)
        begin, end = phase.steps
        factors, step = rates(end - begin), make_step(options, phase.is_causal)
        keys = jax.random.key(options.seed + 1)
        with interrupts.deferred():
            for number in range(len(losses), phase.last):
                sample = {name: jnp.asarray(x) for name, x in next(self.stream).items()}
                targets = self.teacher.targets(number, Batch.of(sample))
                factor = jnp.asarray(factors[number - begin])
                given = (factor, sample, targets, jax.random.fold_in(keys, number))
                state, loss = step(given, state)
                losses.append(float(loss))
                if not math.isfinite(losses[-1]):
                    raise FloatingPointError(
                        f"the loss of arm {arm!r} is not finite at step {number + 1}. Lower "
                        "`--learning-rate` or `--router-rate`."
                    )
                done, is_stopped = number + 1, bool(interrupts.received())
                if is_stopped or done % options.save_every == 0 or done == phase.last:
                    notes = notes.model_copy(update={"losses": tuple(losses)})
                    self.checkpoints.save(done, state, notes)
                    recent = np.mean(losses[-min(20, options.save_every) :])
                    far = f"{recent:.3f} nats from the dense model"
                    say_progress(self.console, f"{arm}: step {done} of {self.total}, {far}.")
                if is_stopped:
                    raise KeyboardInterrupt
        return state, notes


def _finish(
    source: Source, model: mode.Transformer, notes: HealNotes, out: Path, began: float
) -> HealResult:
    """Evaluates a trained arm under both rules, and saves its parameters and its result."""
    options, arm = source.settings.options, notes.arm
    key = jax.random.key(options.seed)
    healed, *_ = held_out_loss(model, source.samples, key)
    causal = capacity = None
    if arm == "learned":
        # Another part of the text than that of the first steps.
        stream = source.stream(options.seed + 1)
        model = calibrate(model, stream, options.batch * options.length)
        causal, _, routings = held_out_loss(mode.make_causal(model), source.samples, key)
        capacity = float(np.mean(_compute(routings)))
    write_stream(out / "model.eqx", lambda file: eqx.tree_serialise_leaves(file, model))
    tokens = jax.ShapeDtypeStruct((1, options.length), jnp.int32)
    result = HealResult(
        arm=arm,
        settings=source.settings,
        dense=source.dense_loss,
        converted=notes.converted,
        routers=notes.routers,
        healed=healed,
        causal=causal,
        capacity_causal=capacity,
        flops=mode.count_flops(model, tokens, key=key).total / options.length,
        flops_dense=mode.count_flops(source.dense, tokens).total / options.length,
        losses=notes.losses,
        seconds=time.perf_counter() - began,
    )
    write_record(out / "result.json", result)
    return result


@eqx.filter_jit
def _compute(routings: Routings) -> list[Scalar]:
    """The fraction of the tokens that each router selected."""
    return [mode.routing_metrics(routing).compute for routing in routings]
