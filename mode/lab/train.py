"""Training one arm: a jitted step, twice compiled at most, and a loss that must stay finite."""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

import mode

from .arms import Arm, Size
from .data import Batch, Documents, batches


# Told the steps taken and the latest loss, in bits per byte.
Watch = Callable[[int, float], None]
# Steps between two looks at the loss. Each look waits for the device.
_LOOK = 10


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How every arm is trained."""

    learning_rate: float = 1e-2
    """Peak of the cosine schedule, tuned on the dense arm alone."""
    weight_decay: float = 0.01
    """Of AdamW, on parameters; router state has none."""
    clip: float = 1.0
    """Largest global norm of a gradient."""
    warmup: float = 0.05
    """Share of the steps over which the rate rises from 0."""


class TrainState(eqx.Module):
    """All that a step changes. `mode.causal` swaps the selectors in it, the optimizer's included.

    **Attributes:**

    - `model`: parameters and router state.
    - `optimizer`: of the parameters alone.
    - `step`: steps taken.
    - `key`: of the run; each step folds its number in.
    """

    model: mode.Transformer
    optimizer: PyTree
    step: Int[Array, ""]
    key: PRNGKeyArray


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
    """

    model: mode.Transformer
    losses: list[float]
    step_seconds: float
    seconds: float


def next_byte_loss(
    model: mode.Transformer, batch: Batch, key: PRNGKeyArray
) -> tuple[Float[Array, ""], tuple[mode.Routing, ...]]:
    """Mean cross entropy in nats over the targets that count, and the routings."""
    logits, routings = model(batch.inputs, batch.info, key=key)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.targets)
    return jnp.sum(losses * batch.weights) / jnp.maximum(jnp.sum(batch.weights), 1), routings


def loss_and_gradient(
    arm: Arm, model: mode.Transformer, batch: Batch, key: PRNGKeyArray
) -> tuple[Float[Array, ""], tuple[mode.Routing, ...], PyTree]:
    """The next-byte loss, the routings, and the gradient of that loss and the arm's own.

    This is what a training step computes; `budget` counts the FLOPs of this very function.
    """
    parameters, rest = eqx.partition(model, mode.trainable(model))

    def objective(
        parameters: PyTree,
    ) -> tuple[Float[Array, ""], tuple[Float[Array, ""], tuple[mode.Routing, ...]]]:
        loss, routings = next_byte_loss(eqx.combine(parameters, rest), batch, key)
        extra = jnp.zeros(()) if arm.auxiliary is None else arm.auxiliary(routings)
        return loss + extra, (loss, routings)

    gradient, (loss, routings) = jax.grad(objective, has_aux=True)(parameters)
    return loss, routings, gradient


def make_optimizer(recipe: Recipe, steps: int) -> optax.GradientTransformation:
    """AdamW under a cosine that ends with the last of `steps`, gradients clipped."""
    warmup = min(steps - 1, max(1, round(recipe.warmup * steps)))
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, recipe.learning_rate, warmup, steps, end_value=0.05 * recipe.learning_rate
    )
    return optax.chain(
        optax.clip_by_global_norm(recipe.clip),
        optax.adamw(schedule, b2=0.99, weight_decay=recipe.weight_decay),
    )


def make_step(
    arm: Arm, optimizer: optax.GradientTransformation
) -> Callable[[dict[str, Any], TrainState], tuple[TrainState, Float[Array, ""]]]:
    """One step, jitted: gradient, update, and then the router state moves. The state is donated."""

    @eqx.filter_jit(donate="all-except-first")
    def step(
        sample: dict[str, Int[Array, "batch sample"]], state: TrainState
    ) -> tuple[TrainState, Float[Array, ""]]:
        key = jax.random.fold_in(state.key, state.step)
        loss, routings, gradient = loss_and_gradient(arm, state.model, Batch.of(sample), key)
        parameters = eqx.filter(state.model, mode.trainable(state.model))
        # Inside optax integers meet floats: its business, where strict promotion is switched on.
        with jax.numpy_dtype_promotion("standard"):
            updates, optimizer_state = optimizer.update(gradient, state.optimizer, parameters)
        model = eqx.apply_updates(state.model, updates)
        model = mode.update_state(model, routings)
        return TrainState(model, optimizer_state, state.step + 1, state.key), loss

    return step


def begin(arm: Arm, size: Size, recipe: Recipe, *, steps: int, seed: int) -> TrainState:
    """The state before the first of `steps` steps."""
    model_key, run_key = jax.random.split(jax.random.key(seed))
    built = arm.build(size, key=model_key)
    parameters = eqx.filter(built, mode.trainable(built))
    optimizer = make_optimizer(recipe, steps)
    return TrainState(built, optimizer.init(parameters), jnp.zeros((), jnp.int32), run_key)


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

    **Raises:** `FloatingPointError` where the loss is not finite.
    """
    began = time.perf_counter()
    state = begin(arm, size, recipe, steps=steps, seed=seed) if progress is None else progress.state
    # The last part may be trained under other selectors; the model is returned under its own.
    structure = jax.tree.structure(state)
    stream = batches(documents, length=size.length, batch=size.batch, seed=seed)
    losses: list[float] = []
    if progress is not None:
        stream.set_state(progress.stream)
        losses += progress.losses
    step = make_step(arm, make_optimizer(recipe, steps))
    change = arm.change(steps)
    looks = (_LOOK,) if saving is None else (_LOOK, saving.every)
    taken = len(losses)
    times: list[float] = []
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
            state, latest = _take(step, state, stream, stop - taken)
            if taken > started:
                times.append((time.perf_counter() - start) / len(latest))
            losses += latest
            taken = stop
            _check_finite(arm, losses, taken)
            watch(taken, losses[-1])
            if saving is not None and (taken % saving.every == 0 or taken == steps):
                own = jax.tree.unflatten(structure, jax.tree.leaves(state))
                saving.save(Progress(own, stream.get_state(), list(losses)))
    model = jax.tree.unflatten(structure, jax.tree.leaves(state)).model
    seconds = time.perf_counter() - began
    # Of a run so short that every step compiled, the mean of those.
    step_seconds = sorted(times)[len(times) // 2] if times else seconds / steps
    return Trained(model, losses, step_seconds, seconds)


def _after(taken: int, every: int) -> int:
    """The next multiple of `every`."""
    return (taken // every + 1) * every


def _take(
    step: Callable[[dict[str, Any], TrainState], tuple[TrainState, Float[Array, ""]]],
    state: TrainState,
    stream: Iterator[Any],
    count: int,
) -> tuple[TrainState, list[float]]:
    """So many steps, and their losses in bits per byte: waits for the device once, at the end."""
    losses = []
    for _ in range(count):
        state, loss = step(next(stream), state)
        losses.append(loss)
    return state, [float(loss) / math.log(2) for loss in losses]


def _check_finite(arm: Arm, losses: list[float], taken: int) -> None:
    for place in range(max(0, taken - _LOOK), taken):
        if not math.isfinite(losses[place]):
            raise FloatingPointError(
                f"the loss of arm {arm.name!r} became {losses[place]} at step {place + 1}. Lower "
                "`--recipe.learning-rate`, or try another `--seed`."
            )
