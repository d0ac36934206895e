"""One training step: the loss, its gradient, the update, and whether all of it was finite."""

import dataclasses
import functools
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree, UInt32

import mode
from mode._types import Scalar
from mode.routing import Routings

from .arms import Arm
from .data import Batch
from .devices import in_place
from .options import Recipe as Recipe, Size


def learning_rates(recipe: Recipe, steps: int) -> Float[np.ndarray, " steps"]:
    """The rate of each step: it rises in a line and falls as half a cosine to a twentieth.

    Rates are given to a step as data: runs of other lengths and rates share its program.
    """
    peak, warmup = recipe.learning_rate, min(steps - 1, max(1, round(recipe.warmup * steps)))
    schedule = optax.warmup_cosine_decay_schedule(0.0, peak, warmup, steps, peak / 20)
    return np.asarray(jax.vmap(schedule)(jnp.arange(steps, dtype=jnp.float32)))


def routing_cost(recipe: Recipe, routings: Routings) -> Scalar:
    """The recipe's cost of the weights of Mixture-of-Depths routers, the mean over all layers."""
    costs = [mode.router_l1_loss(routing) for routing in routings if routing.logits.shape[-1] == 1]
    return recipe.router_cost * jnp.mean(jnp.stack(costs)) if costs else jnp.zeros(())


def stages(recipe: Recipe, model: PyTree, steps: int) -> dict[int, tuple[Fraction, ...]]:
    """The capacities of all routers from each step on that changes them; that of step 0 always.

    A training too short for the stages of the recipe has fewer.
    """
    own = tuple(router.capacity for router in mode.routers(model))
    count = min(recipe.ramp_stages, math.floor(recipe.ramp * steps))
    if not own or not count:
        return {0: own}
    return mode.capacity_schedule(model, steps, until=recipe.ramp, stages=count)


class TrainState(eqx.Module):
    """All that a step changes. `Arm.causal_in_training` swaps the selectors in all of it.

    `step` is the number of steps done, `skipped` how many of the last of them in a row were
    skipped, and `key` the data of the run's key, into which each step folds its number.
    """

    model: mode.Transformer
    optimizer: PyTree
    step: Int[Array, ""]
    skipped: Int[Array, ""]
    key: UInt32[Array, " data"]


def next_byte_loss(
    model: mode.Transformer, batch: Batch, key: PRNGKeyArray
) -> tuple[Scalar, Routings]:
    """Mean cross entropy in nats over the targets that count, and the routings."""
    logits, routings = model(batch.inputs, batch.info, key=key)
    return cross_entropy(logits, batch), routings


def cross_entropy(logits: Float[Array, "batch tokens vocab"], batch: Batch) -> Scalar:
    """Mean cross entropy of given logits in nats over the targets that count."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.targets)
    return jnp.sum(losses * batch.weights) / jnp.maximum(jnp.sum(batch.weights), 1)


def loss_and_gradient(
    arm: Arm, recipe: Recipe, model: mode.Transformer, batch: Batch, key: PRNGKeyArray
) -> tuple[Scalar, Routings, PyTree]:
    """The next-byte loss, the routings, and the gradient of that loss, the arm's and the cost.

    A training step computes this; `budget` counts the FLOPs of this very function.
    """
    parameters, rest = eqx.partition(model, mode.is_trainable(model))

    def objective(parameters: PyTree) -> tuple[Scalar, tuple[Scalar, Routings]]:
        loss, routings = next_byte_loss(eqx.combine(parameters, rest), batch, key)
        extra = jnp.zeros(()) if arm.auxiliary is None else arm.auxiliary(routings)
        return loss + extra + routing_cost(recipe, routings), (loss, routings)

    gradient, (loss, routings) = jax.grad(objective, has_aux=True)(parameters)
    return loss, routings, gradient


def make_optimizer(recipe: Recipe) -> optax.GradientTransformation:
    """AdamW of rate 1 on clipped gradients; a step multiplies its updates by the rate."""
    return optax.chain(
        optax.clip_by_global_norm(recipe.clip),
        optax.adamw(1.0, b2=0.99, weight_decay=recipe.weight_decay),
    )


def apply_gradient(
    optimizer: optax.GradientTransformation,
    model: PyTree,
    moments: PyTree,
    gradient: PyTree,
    rate: Scalar,
) -> tuple[PyTree, PyTree]:
    """Takes one step of an optimizer of rate 1 at another rate: the model and the moments."""
    parameters = eqx.filter(model, mode.is_trainable(model))
    # optax mixes integers and floats, which strict promotion refuses.
    with jax.numpy_dtype_promotion("standard"):
        updates, moments = optimizer.update(gradient, moments, parameters)
    updates = jax.tree.map(lambda update: rate * update, updates)
    return eqx.apply_updates(model, updates), moments


class Health(eqx.Module):
    """How a step went: the loss in nats, whether it and every gradient are finite, how many of the
    last steps in a row were skipped, and of each router its largest logit and the slots filled per
    token."""

    loss: Scalar
    finite: Bool[Array, ""]
    skipped: Int[Array, ""]
    logits: tuple[Scalar, ...]
    compute: tuple[Scalar, ...]


Step = Callable[[tuple[dict[str, Any], Any], TrainState], tuple[TrainState, Health]]


def make_step(arm: Arm, recipe: Recipe) -> Step:
    """One step of a batch and a learning rate, jitted. The state is donated.

    Where the loss or a gradient is not finite, the step counts and changes nothing. (This guards
    the router state too, which `optax.apply_if_finite` would not.) Recipes that differ in their
    schedules alone share one program.
    """
    same = {"learning_rate": 1.0, "warmup": 0.0, "ramp": 0.0, "ramp_stages": 1}
    return _jitted(arm, dataclasses.replace(recipe, **same))


@functools.cache
def _jitted(arm: Arm, recipe: Recipe) -> Step:
    optimizer = make_optimizer(recipe)

    @eqx.filter_jit(donate="all-except-first")
    def step(
        given: tuple[dict[str, Int[Array, "batch sample"]], Scalar], state: TrainState
    ) -> tuple[TrainState, Health]:
        sample, rate = given
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        loss, routings, gradient = loss_and_gradient(
            arm, recipe, state.model, Batch.of(sample), key
        )
        leaves = jax.tree.leaves((loss, gradient))
        finite = jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in leaves]))
        model, moments = apply_gradient(optimizer, state.model, state.optimizer, gradient, rate)
        model = mode.update_router_state(model, routings, quantile_rate=arm.quantile_rate)

        def select(new: Any, old: Any) -> Any:
            # Leaf by leaf: a conditional over all of them would have a GPU copy the whole state.
            return jnp.where(finite, new, old) if eqx.is_array(new) else new

        model, moments = jax.tree.map(select, (model, moments), (state.model, state.optimizer))
        skipped = jnp.where(finite, 0, state.skipped + 1)
        logits = tuple(jnp.max(jnp.abs(routing.logits)) for routing in routings)
        compute = tuple(mode.routing_metrics(routing).compute for routing in routings)
        health = Health(loss, finite, skipped, logits, compute)
        return in_place(TrainState(model, moments, state.step + 1, skipped, state.key)), health

    return step


def begin(arm: Arm, size: Size, recipe: Recipe, *, seed: int) -> TrainState:
    """The state before the first step, sharded over the mesh where one is set."""

    def make() -> TrainState:
        model_key, run_key = jax.random.split(jax.random.key(seed))
        model = arm.build(size, key=model_key)
        moments = make_optimizer(recipe).init(eqx.filter(model, mode.is_trainable(model)))
        zero = jnp.zeros((), jnp.int32)
        return TrainState(model, moments, zero, zero + 0, jax.random.key_data(run_key))

    # As one program, no device ever holds more than its part.
    sharded = not jax.sharding.get_abstract_mesh().empty
    return eqx.filter_jit(lambda: in_place(make()))() if sharded else make()
