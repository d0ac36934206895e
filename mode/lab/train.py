"""Training one arm: a jitted step, compiled for each stage, and a loss that must stay finite."""

import dataclasses
import itertools
import math
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import equinox as eqx
import jax
import numpy as np
from jax.sharding import Mesh

import mode

from .arms import Arm, Size
from .console import Watch
from .data import Batch, Documents, Sample, batches
from .devices import feed, on_any
from .step import Health, Recipe, TrainState, begin, learning_rates, make_step, stages


# Tokens from which thresholds are calibrated at the end.
_CALIBRATION = 2**13
# Skipped steps in a row after which the run ends.
_MOST_SKIPPED = 10


@dataclasses.dataclass(frozen=True)
class Progress:
    """The point a run has reached: from it, training goes on as if it had not been interrupted.

    The state has the selectors the model was built with, `stream` is the position in the data, and
    losses are those of every step so far, in bits per byte.
    """

    state: TrainState
    stream: dict[str, Any]
    losses: list[float]


@dataclasses.dataclass(frozen=True)
class Saving:
    """Saves progress every so many steps, at the end, and where `stop` says to end early."""

    every: int
    save: Callable[[Progress], None]
    stop: Callable[[], object] = lambda: False


@dataclasses.dataclass(frozen=True)
class Trained:
    """The model with the selectors it was built with, losses in bits per byte, and times.

    `step_seconds` is the median time of a step, compilation left out; `seconds` that of the
    training since it was begun or continued, of which `waiting_seconds` went into waiting for data.
    """

    model: mode.Transformer
    losses: list[float]
    step_seconds: float
    seconds: float
    waiting_seconds: float


def train(
    arm: Arm,
    size: Size,
    recipe: Recipe,
    documents: Documents,
    *,
    steps: int,
    seed: int,
    watch: Watch,
    look: int = 10,
    progress: Progress | None = None,
    saving: Saving | None = None,
    mesh: Mesh | None = None,
) -> Trained:
    """Trains `arm` for exactly `steps` steps, at least 2.

    `seed` is of parameters, data order and random routing. `watch` is called every `look` steps,
    which waits for the device. With the `progress` of an earlier run of the same arguments, every
    loss and parameter comes out as without the interruption. Where a `mesh` is set, each process
    reads its own rows of every batch.

    **Raises:** `FloatingPointError` where the loss or a gradient is not finite, with the step and
    what the routers did; under `on_nonfinite="skip"` only after ten such steps in a row.
    `KeyboardInterrupt` after the save of a run that `saving` stopped.
    """
    began = time.perf_counter()
    state = begin(arm, size, recipe, seed=seed) if progress is None else progress.state
    # The last steps may be trained under other selectors; the model is returned with its own.
    structure = jax.tree.structure(state)
    stream = _own_batches(documents, size, seed)
    losses = [] if progress is None else list(progress.losses)
    if progress is not None:
        stream.set_state(progress.stream)
    times, waits = [], []
    step, rates = make_step(arm, recipe), learning_rates(recipe, steps)
    every = steps if saving is None else saving.every
    changes = _changes(arm, recipe, state, steps)
    for first, last in itertools.pairwise([*changes, steps]):
        changed = changes[first](state)
        if len(losses) > first:  # it was changed before it was saved: only its structure was not
            changed = jax.tree.unflatten(jax.tree.structure(changed), jax.tree.leaves(state))
        state = changed
        if len(losses) >= last:
            continue
        compiled = False
        while (done := len(losses)) < last:
            # The first step of a phase compiles, and is looked at alone.
            until = min(last, *((done // n + 1) * n for n in (look, every)))
            count = until - done if compiled else 1
            start = time.perf_counter()
            healths = []
            for rate in rates[done : done + count]:
                before = time.perf_counter()
                sample = next(stream)
                waits.append(time.perf_counter() - before)
                state, health = step((feed(sample, mesh), rate), state)
                healths.append(health)
            healths = jax.device_get(healths)
            if compiled:
                times.append((time.perf_counter() - start) / count)
            compiled = True
            losses += [float(health.loss) / math.log(2) for health in healths]
            _check(arm, recipe, healths, done)
            watch(len(losses), losses[-1])
            if len(losses) == steps:
                state = jax.tree.unflatten(structure, jax.tree.leaves(state))
                calibrated = _calibrated(arm, state.model, documents, size, seed, mesh)
                state = eqx.tree_at(lambda s: s.model, state, calibrated)
            if saving is None:
                continue
            stop = on_any(bool(saving.stop()))
            if stop or len(losses) % every == 0 or len(losses) == steps:
                own = jax.tree.unflatten(structure, jax.tree.leaves(state))
                saving.save(Progress(own, stream.get_state(), list(losses)))
            if stop and len(losses) < steps:
                raise KeyboardInterrupt
    model = jax.tree.unflatten(structure, jax.tree.leaves(state)).model
    seconds = time.perf_counter() - began
    # Of a run so short that every step compiled, the mean of those.
    step_seconds = float(np.median(times)) if times else seconds / steps
    return Trained(model, losses, step_seconds, seconds, sum(waits, start=0.0))


def _changes(
    arm: Arm, recipe: Recipe, state: TrainState, steps: int
) -> dict[int, Callable[[TrainState], TrainState]]:
    """What changes in the state before which steps: capacities, and the causal rule at the end."""
    changes: dict[int, Callable[[TrainState], TrainState]] = {}
    for first, capacities in stages(recipe, state.model, steps).items():
        changes[first] = partial(mode.with_capacity, capacity=capacities)
    if (end := arm.change(steps)) < steps:
        before = changes.get(end, lambda state: state)
        changes[end] = lambda state: arm.causal_in_training(before(state))
    return dict(sorted(changes.items()))


def _own_batches(documents: Documents, size: Size, seed: int) -> Any:
    """The rows of every batch that this process reads."""
    rows = {"part": jax.process_index(), "parts": jax.process_count()}
    return batches(documents, length=size.length, batch=size.batch, seed=seed, **rows)


def _calibrated(
    arm: Arm,
    model: mode.Transformer,
    documents: Documents,
    size: Size,
    seed: int,
    mesh: Mesh | None,
) -> mode.Transformer:
    """The model with thresholds of the routers as they are now, if they are what it is for."""
    if not isinstance(arm.rule, mode.QuantileThreshold):
        return model
    stream = _own_batches(documents, size, seed + 1)
    return calibrate(model, stream, size.batch * size.length, mesh)


def calibrate(
    model: mode.Transformer, stream: Iterator[Sample], tokens: int, mesh: Mesh | None = None
) -> mode.Transformer:
    """Sets thresholds of the routers from some thousand tokens, of so many in a batch."""
    to_batch = eqx.filter_jit(Batch.of)
    made = [to_batch(feed(next(stream), mesh)) for _ in range(math.ceil(_CALIBRATION / tokens))]
    return mode.calibrate_thresholds(model, *((batch.inputs, batch.info) for batch in made))


def _check(arm: Arm, recipe: Recipe, healths: list[Health], done: int) -> None:
    """Warns of skipped steps, or ends the run by a `FloatingPointError`."""
    for number, health in enumerate(healths, done + 1):
        if health.finite:
            continue
        what = "a gradient" if math.isfinite(health.loss) else f"the loss ({health.loss})"
        message = f"{what} of arm {arm.name!r} is not finite at step {number}"
        if recipe.on_nonfinite == "skip" and health.skipped < _MOST_SKIPPED:
            warnings.warn(f"{message}, which is skipped", stacklevel=3)
            continue
        pairs = enumerate(zip(health.logits, health.compute, strict=True), 1)
        routers = "; ".join(
            f"router {place}: largest logit {logit:.3g}, {compute:.3f} slots per token"
            for place, (logit, compute) in pairs
        )
        raise FloatingPointError(
            f"{message}{f' ({routers})' if routers else ''}. Its update was skipped. Lower "
            "`--recipe.learning-rate`, or try another `--seed`; `--recipe.on-nonfinite skip` "
            "skips such steps."
        )
