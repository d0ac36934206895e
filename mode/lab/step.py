"""One training step: the loss, its gradient, the update, and whether all of it was finite."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

import mode

from .arms import Arm, Size
from .data import Batch
from .devices import in_place


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
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """What a loss or gradient that is not finite does: end the run, or leave the step out and say
    so. Parameters are never updated by it."""


class Schedule(eqx.Module):
    """A learning rate that rises in a line and falls as half a cosine to a twentieth of its peak.

    Its numbers are data of the program, where optax has them as constants: runs of other lengths
    and rates are not compiled anew.

    **Attributes:**

    - `peak`: the highest rate.
    - `warmup`, `steps`: the steps at which it is reached, and of the whole run.
    """

    peak: Float[Array, ""]
    warmup: Int[Array, ""]
    steps: Int[Array, ""]

    @staticmethod
    def of(recipe: Recipe, steps: int) -> "Schedule":
        """Of a recipe, over so many steps."""
        warmup = min(steps - 1, max(1, round(recipe.warmup * steps)))
        peak = jnp.asarray(recipe.learning_rate, jnp.float32)
        return Schedule(peak, jnp.asarray(warmup, jnp.int32), jnp.asarray(steps, jnp.int32))

    def rate(self, step: Int[Array, ""]) -> Float[Array, ""]:
        """The rate after so many steps."""
        done, warmup, steps = (x.astype(jnp.float32) for x in (step, self.warmup, self.steps))
        fallen = jnp.clip((done - warmup) / (steps - warmup), 0, 1)
        cosine = 0.5 * (1 + jnp.cos(jnp.pi * fallen))
        return self.peak * jnp.minimum(done / warmup, _END + (1 - _END) * cosine)


_END = 0.05


class TrainState(eqx.Module):
    """All that a step changes. `mode.causal` swaps the selectors in it, the optimizer's included.

    **Attributes:**

    - `model`: parameters and router state.
    - `optimizer`: of the parameters alone.
    - `step`: steps taken.
    - `key`: of the run; each step folds its number in.
    - `schedule`: of the learning rate.
    """

    model: mode.Transformer
    optimizer: PyTree
    step: Int[Array, ""]
    key: PRNGKeyArray
    schedule: Schedule


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


def make_optimizer(recipe: Recipe) -> optax.GradientTransformation:
    """AdamW of rate 1, gradients clipped; a step scales its updates by the schedule's rate."""
    return optax.chain(
        optax.clip_by_global_norm(recipe.clip),
        optax.adamw(1.0, b2=0.99, weight_decay=recipe.weight_decay),
    )


class Health(eqx.Module):
    """What says how a step went.

    **Attributes:**

    - `loss`: in nats.
    - `finite`: whether it and every gradient are.
    - `logits`, `compute`: of each router, its largest logit and the slots filled per token.
    """

    loss: Float[Array, ""]
    finite: Bool[Array, ""]
    logits: tuple[Float[Array, ""], ...]
    compute: tuple[Float[Array, ""], ...]

    @staticmethod
    def of(
        loss: Float[Array, ""], gradient: PyTree, routings: tuple[mode.Routing, ...]
    ) -> "Health":
        """From what a step computed."""
        leaves = [loss, *jax.tree.leaves(gradient)]
        return Health(
            loss,
            jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in leaves])),
            tuple(jnp.max(jnp.abs(routing.logits)) for routing in routings),
            tuple(mode.routing_metrics(routing).compute for routing in routings),
        )


Step = Callable[[dict[str, Any], TrainState], tuple[TrainState, Health]]


def make_step(arm: Arm, recipe: Recipe) -> Step:
    """One step, jitted: gradient, update, and then the router state moves. The state is donated.

    Where the loss or a gradient is not finite, the step counts and changes nothing. Arms and
    recipes that differ in their schedules alone share one program.
    """
    return _jitted(arm, dataclasses.replace(recipe, learning_rate=1.0, warmup=0.0))


@functools.cache
def _jitted(arm: Arm, recipe: Recipe) -> Step:
    optimizer = make_optimizer(recipe)

    @eqx.filter_jit(donate="all-except-first")
    def step(
        sample: dict[str, Int[Array, "batch sample"]], state: TrainState
    ) -> tuple[TrainState, Health]:
        key = jax.random.fold_in(state.key, state.step)
        loss, routings, gradient = loss_and_gradient(arm, state.model, Batch.of(sample), key)
        health = Health.of(loss, gradient, routings)
        parameters = eqx.filter(state.model, mode.trainable(state.model))
        # Inside optax integers meet floats: its business, where strict promotion is on.
        with jax.numpy_dtype_promotion("standard"):
            updates, moments = optimizer.update(gradient, state.optimizer, parameters)
        rate = state.schedule.rate(state.step)
        model = eqx.apply_updates(state.model, jax.tree.map(lambda update: rate * update, updates))
        model = mode.update_state(model, routings, quantile_rate=arm.quantile_rate)

        def kept(new: Any, old: Any) -> Any:
            # Leaf by leaf: a conditional over all of them would have a GPU copy the whole state.
            return jnp.where(health.finite, new, old) if eqx.is_array(new) else new

        model, moments = jax.tree.map(kept, (model, moments), (state.model, state.optimizer))
        after = TrainState(model, moments, state.step + 1, state.key, state.schedule)
        return in_place(after), health

    return step


def begin(arm: Arm, size: Size, recipe: Recipe, *, steps: int, seed: int) -> TrainState:
    """The state before the first of `steps` steps, spread over the mesh where one is set."""

    def make() -> TrainState:
        model_key, run_key = jax.random.split(jax.random.key(seed))
        built = arm.build(size, key=model_key)
        parameters = eqx.filter(built, mode.trainable(built))
        moments = make_optimizer(recipe).init(parameters)
        started = jnp.zeros((), jnp.int32)
        return TrainState(built, moments, started, run_key, Schedule.of(recipe, steps))

    # As one program, no device ever holds more than its part.
    spread = not jax.sharding.get_abstract_mesh().empty
    return eqx.filter_jit(lambda: in_place(make()))() if spread else make()
