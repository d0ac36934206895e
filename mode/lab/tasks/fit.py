"""Training on data of the device: one program for each stage, without a loop in Python."""

from collections.abc import Callable
from typing import TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray, PyTree

import mode
from mode._types import Scalar
from mode.routing import Routings

from ..options import Recipe
from ..step import apply_gradient, learning_rates, make_optimizer, routing_cost, stages


Model = TypeVar("Model")
# Of the model, the data of a step and a key: the loss, and the routings.
Objective = Callable[[Model, PyTree, PRNGKeyArray], tuple[Scalar, Routings]]


def fit(
    model: Model, objective: Objective, data: PyTree, recipe: Recipe, *, key: PRNGKeyArray
) -> Model:
    """Trains `model` with one step for each entry on the leading axis of `data`.

    The recipe's cost of routing and its schedule of capacities are those of `mode-lab train`.
    """
    steps = jax.tree.leaves(data)[0].shape[0]
    structure = jax.tree.structure(model)
    optimizer = make_optimizer(recipe)
    moments = optimizer.init(eqx.filter(model, mode.is_trainable(model)))
    each = (data, learning_rates(recipe, steps), jax.random.split(key, steps))

    @eqx.filter_jit
    def run(model: Model, moments: PyTree, each: PyTree) -> tuple[Model, PyTree]:
        arrays, rest = eqx.partition(model, eqx.is_array)

        def step(state: PyTree, now: PyTree) -> tuple[PyTree, None]:
            (arrays, moments), (data, rate, key) = state, now
            model = eqx.combine(arrays, rest)
            parameters, others = eqx.partition(model, mode.is_trainable(model))

            def loss(parameters: PyTree) -> tuple[Scalar, Routings]:
                value, routings = objective(eqx.combine(parameters, others), data, key)
                return value + routing_cost(recipe, routings), routings

            gradient, routings = jax.grad(loss, has_aux=True)(parameters)
            model, moments = apply_gradient(optimizer, model, moments, gradient, rate)
            model = mode.update_router_state(model, routings)
            return (eqx.filter(model, eqx.is_array), moments), None

        (arrays, moments), _ = jax.lax.scan(step, (arrays, moments), each)
        return eqx.combine(arrays, rest), moments

    schedule = stages(recipe, model, steps)
    bounds = [*schedule, steps]
    # Of one length, so that a stage is compiled once.
    size = int(np.gcd.reduce(np.diff(bounds)))
    for first in range(0, steps, size):
        if first in schedule:
            model, moments = mode.with_capacity((model, moments), schedule[first])
        part = jax.tree.map(lambda leaf, first=first: jnp.asarray(leaf[first : first + size]), each)
        model, moments = run(model, moments, part)
    return jax.tree.unflatten(structure, jax.tree.leaves(model))
