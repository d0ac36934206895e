"""One arm of a healing, from its last checkpoint to its result."""

import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PRNGKeyArray

import mode
from mode._types import Scalar

from .. import interrupts
from ..checkpoint import Checkpoints
from ..corpus import Corpus
from ..data import Batch, Sample, batches, held_out_batches
from ..files import read_record, write_record, write_stream
from ..folder import check_same
from ..step import next_byte_loss
from .options import Healing
from .records import HealNotes, HealResult, HealSettings
from .teacher import Teacher
from .train import HealState, Phase, make_step, plan_phases, rates


# Tokens from which thresholds are calibrated at the end.
_CALIBRATION = 2**13
# Options that decide nothing of a run: where its files are, and which other arms there are.
BESIDES = ("out", "data", "model", "arms", "save_every", "held_out")
Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Source:
    """What all arms share: the dense model, its loss on held-out text, the text, the settings."""

    dense: mode.Transformer
    corpus: Corpus
    samples: list[Sample]
    dense_loss: float
    settings: HealSettings


def make_source(dense: mode.Transformer, corpus: Corpus, settings: HealSettings) -> Source:
    """Cuts the held-out text and evaluates the dense model on it."""
    options = settings.options
    sizes = {"length": options.length, "batch": options.batch, "sequences": options.held_out}
    samples = held_out_batches(corpus.held_out, **sizes)
    loss, _ = evaluate(dense, samples, jax.random.key(options.seed))
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


def heal_arm(source: Source, arm: str, out: Path, say: Say) -> HealResult:
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
    if saved:
        notes = None
    else:
        converted, _ = evaluate(model, source.samples, key)
        notes = HealNotes(arm=arm, settings=source.settings, losses=(), converted=converted)
        say(
            f"{arm}: {converted:.3f} nats per token after conversion, "
            f"dense {source.dense_loss:.3f}."
        )
    shape = (total, options.batch, options.length, options.top)
    teacher = Teacher(source.dense, out.parent / "teacher", shape) if total else None
    out.mkdir(parents=True, exist_ok=True)
    state: Any = None
    before: Phase | None = None
    for number, phase in enumerate(phases, 1):
        last = phases[number].first if number < len(phases) else total
        if saved > last:
            continue
        if before is None or before.part != phase.part:
            model = mode.with_capacity(model, phase.capacities) if phase.capacities else model
            state = HealState.begin(model, phase.part)
        else:
            state = mode.with_capacity(state, phase.capacities) if phase.capacities else state
        if phase.first < saved <= last:
            restored = checkpoints.newest(state, say)
            assert restored is not None
            _, state, notes = restored
            check_same(out, notes.settings, source.settings, besides=BESIDES)
            say(f"{arm}: goes on from step {saved}.")
        assert notes is not None
        assert teacher is not None
        state, notes = _run_phase(
            source, (phase, last, phases, total), state, notes, teacher, checkpoints, say
        )
        model, before = state.model, phase
        if phase.part == "routers" and notes.routers is None:
            loss, _ = evaluate(model, source.samples, key)
            notes = notes.model_copy(update={"routers": loss})
            say(f"{arm}: {loss:.3f} after the steps of routers alone.")
    assert notes is not None
    return _finish(source, model, notes, out, began)


def _run_phase(
    source: Source,
    span: tuple[Phase, int, list[Phase], int],
    state: HealState,
    notes: HealNotes,
    teacher: Teacher,
    checkpoints: Checkpoints[HealNotes],
    say: Say,
) -> tuple[HealState, HealNotes]:
    """Runs a phase from where it stands to its last step."""
    phase, last, phases, total = span
    options, arm = source.settings.options, notes.arm
    same = [other for other in phases if other.part == phase.part]
    begin = same[0].first
    later = [other.first for other in phases if other.first > same[-1].first]
    factors = rates(options, (later[0] if later else total) - begin)
    step = make_step(options, phase.is_causal)
    stream = batches(
        source.corpus.train, length=options.length, batch=options.batch, seed=options.seed
    )
    done, losses = len(notes.losses), list(notes.losses)
    for _ in range(done):  # cutting a batch takes less than a millisecond
        next(stream)
    keys = jax.random.key(options.seed + 1)
    with interrupts.deferred():
        for number in range(done, last):
            sample = {name: jnp.asarray(x) for name, x in next(stream).items()}
            targets = teacher.targets(number, Batch.of(sample))
            factor = jnp.asarray(factors[number - begin])
            given = (factor, sample, targets, jax.random.fold_in(keys, number))
            state, loss = step(given, state)
            losses.append(float(loss))
            if not math.isfinite(losses[-1]):
                raise FloatingPointError(
                    f"the loss of arm {arm!r} is not finite at step {number + 1}. Lower "
                    "`--learning-rate` or `--router-rate`."
                )
            is_stopped = bool(interrupts.received())
            if is_stopped or (number + 1) % options.save_every == 0 or number + 1 == last:
                notes = notes.model_copy(update={"losses": tuple(losses)})
                checkpoints.save(number + 1, state, notes)
                recent = np.mean(losses[-min(20, options.save_every) :])
                say(f"{arm}: step {number + 1} of {total}, {recent:.3f} nats from the dense model.")
            if is_stopped:
                raise KeyboardInterrupt
    return state, notes


def _finish(
    source: Source, model: mode.Transformer, notes: HealNotes, out: Path, began: float
) -> HealResult:
    """Evaluates a trained arm under both rules, and saves its parameters and its result."""
    options, arm, key = (
        source.settings.options,
        notes.arm,
        jax.random.key(source.settings.options.seed),
    )
    healed, _ = evaluate(model, source.samples, key)
    causal = capacity = None
    if arm == "learned":
        model = _calibrated(source, model)
        causal, capacity = evaluate(mode.make_causal(model), source.samples, key)
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


def _calibrated(source: Source, model: mode.Transformer) -> mode.Transformer:
    options = source.settings.options
    stream = batches(
        source.corpus.train, length=options.length, batch=options.batch, seed=options.seed + 1
    )
    count = math.ceil(_CALIBRATION / (options.batch * options.length))
    made = [Batch.of(next(stream)) for _ in range(count)]
    return mode.calibrate_thresholds(model, *((batch.inputs, batch.info) for batch in made))


@eqx.filter_jit
def _loss(
    model: mode.Transformer, sample: dict[str, Int[Array, "batch sample"]], key: PRNGKeyArray
) -> tuple[Scalar, Scalar, Scalar]:
    batch = Batch.of(sample)
    loss, routings = next_byte_loss(model, batch, key)
    # Without routers, every token is computed.
    compute = [mode.routing_metrics(routing).compute for routing in routings]
    mean = jnp.mean(jnp.stack(compute)) if compute else jnp.ones(())
    return loss, jnp.sum(batch.weights), mean


def evaluate(
    model: mode.Transformer, samples: list[Sample], key: PRNGKeyArray
) -> tuple[float, float]:
    """The loss in nats per token, and the mean fraction of the tokens that routed layers select."""
    rows = []
    for number, sample in enumerate(samples):
        arrays = {name: jnp.asarray(x) for name, x in sample.items()}
        rows.append(jax.device_get(_loss(model, arrays, jax.random.fold_in(key, number))))
    losses, weights, compute = np.array(rows, float).T
    return float(np.sum(losses * weights) / np.sum(weights)), float(np.mean(compute))
