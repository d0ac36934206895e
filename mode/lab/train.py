"""Training one arm: a jitted step, twice compiled at most, and a loss that must stay finite."""

import dataclasses
import math
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.sharding import Mesh

import mode

from .arms import Arm, Size
from .data import Documents, batches
from .devices import feed
from .step import Health, Recipe, TrainState, begin, make_step


# Told the steps taken and the latest loss, in bits per byte.
Watch = Callable[[int, float], None]
# Steps between two looks at the loss. Each look waits for the device.
_LOOK = 10
# Steps left out in a row after which something is wrong for good.
_MOST_SKIPPED = 10


@dataclasses.dataclass(frozen=True)
class Progress:
    """Where a run stands: with it, training goes on as if it had not been interrupted.

    **Attributes:**

    - `state`: under the selectors it was built with.
    - `stream`: where the data stands, as the iterator says it.
    - `losses`: of every step so far, in bits per byte.
    """

    state: TrainState
    stream: dict[str, Any]
    losses: list[float]


@dataclasses.dataclass(frozen=True)
class Saving:
    """Told how a run stands every so many steps, and at the end."""

    every: int
    save: Callable[[Progress], None]


@dataclasses.dataclass(frozen=True)
class Trained:
    """What training an arm gave.

    **Attributes:**

    - `model`: with the selectors it was built with.
    - `losses`: of every step, in bits per byte.
    - `step_seconds`: median time of a step, compilation left out.
    - `seconds`: of the training since it was last begun, compilation included.
    - `waiting_seconds`: of these, how long it waited for data.
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
    progress: Progress | None = None,
    saving: Saving | None = None,
    mesh: Mesh | None = None,
) -> Trained:
    """Train `arm` for exactly `steps` steps.

    **Arguments:**

    - `documents`: what to train on.
    - `steps`: at least 2.
    - `seed`: of parameters, data order and random routing; arms with one seed see one data order.
    - `watch`: called every few steps.
    - `progress`: where an earlier run of the same arguments stood; every loss and parameter comes
        out as it would have without the interruption.
    - `saving`: keeps the progress.
    - `mesh`: the one that is set, if any; of every batch, each process reads its own rows.

    **Raises:** `FloatingPointError` where the loss or a gradient is not finite, with the step and
    what the routers did; under `on_nonfinite="skip"` only after ten such steps in a row.
    """
    began = time.perf_counter()
    state = begin(arm, size, recipe, steps=steps, seed=seed) if progress is None else progress.state
    # The last part may be trained under other selectors; the model is returned under its own.
    structure = jax.tree.structure(state)
    stream = batches(
        documents,
        length=size.length,
        batch=size.batch,
        seed=seed,
        part=jax.process_index(),
        parts=jax.process_count(),
    )
    losses: list[float] = []
    if progress is not None:
        stream.set_state(progress.stream)
        losses += progress.losses
    step = make_step(arm, recipe)
    change = arm.change(steps)
    looks = (_LOOK,) if saving is None else (_LOOK, saving.every)
    taken, skipped = len(losses), 0
    times: list[float] = []
    waits: list[float] = []
    for first, last in ((0, change), (change, steps)):
        if taken >= last:
            continue
        if first:
            state = mode.causal(state, by=arm.rule, limit=None)
        started = max(first, taken)
        while taken < last:
            # The first step of a phase compiles, and is looked at alone.
            stop = taken + 1 if taken == started else min(last, *(_after(taken, n) for n in looks))
            start = time.perf_counter()
            state, healths = _take(step, state, _timed(stream, waits), mesh, stop - taken)
            if taken > started:
                times.append((time.perf_counter() - start) / len(healths))
            skipped = _checked(arm, recipe, healths, taken, skipped)
            losses += [float(health.loss) / math.log(2) for health in healths]
            taken = stop
            watch(taken, losses[-1])
            if saving is not None and (taken % saving.every == 0 or taken == steps):
                own = jax.tree.unflatten(structure, jax.tree.leaves(state))
                saving.save(Progress(own, stream.get_state(), list(losses)))
    model = jax.tree.unflatten(structure, jax.tree.leaves(state)).model
    seconds = time.perf_counter() - began
    # Of a run so short that every step compiled, the mean of those.
    step_seconds = sorted(times)[len(times) // 2] if times else seconds / steps
    return Trained(model, losses, step_seconds, seconds, sum(waits, start=0.0))


def _timed(stream: Iterator[Any], waits: list[float]) -> Iterator[Any]:
    """The same batches; adds to `waits` how long each took to come."""
    while True:
        began = time.perf_counter()
        sample = next(stream)
        waits.append(time.perf_counter() - began)
        yield sample


def _after(taken: int, every: int) -> int:
    """The next multiple of `every`."""
    return (taken // every + 1) * every


def _take(
    step: Callable[[dict[str, Any], TrainState], tuple[TrainState, Health]],
    state: TrainState,
    stream: Iterator[Any],
    mesh: Mesh | None,
    count: int,
) -> tuple[TrainState, list[Health]]:
    """So many steps, and how they went: waits for the device once, at the end."""
    healths = []
    for _ in range(count):
        state, health = step(feed(next(stream), mesh), state)
        healths.append(health)
    return state, jax.device_get(healths)


def _checked(arm: Arm, recipe: Recipe, healths: list[Health], taken: int, skipped: int) -> int:
    """How many of the last steps in a row were skipped; what stops the run stops it here."""
    for place, health in enumerate(healths, taken + 1):
        skipped = 0 if health.finite else skipped + 1
        if health.finite:
            continue
        what = "a gradient" if math.isfinite(health.loss) else f"the loss ({health.loss})"
        said = f"{what} of arm {arm.name!r} is not finite at step {place}"
        if recipe.on_nonfinite == "skip" and skipped < _MOST_SKIPPED:
            warnings.warn(f"{said}, which is left out", stacklevel=3)
            continue
        routers = "; ".join(
            f"router {number}: largest logit {logit:.3g}, {compute:.3f} slots per token"
            for number, (logit, compute) in enumerate(
                zip(health.logits, health.compute, strict=True), 1
            )
        )
        raise FloatingPointError(
            f"{said}{f' ({routers})' if routers else ''}. Its update was left out. Lower "
            "`--recipe.learning-rate`, or try another `--seed`; `--recipe.on-nonfinite skip` "
            "leaves such steps out."
        )
    return skipped
