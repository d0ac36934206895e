"""Equal training FLOPs: the number of steps of each arm, counted on the program it runs."""

import functools
from fractions import Fraction

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import mode

from .arms import ARMS, Arm, Size
from .data import Batch, shape_of_batch
from .step import Recipe, loss_and_gradient, stages


# A budget of 1 is what the dense arm spends on this many steps.
DENSE_STEPS = 350
# Steps of a training in which every stage of a schedule has its exact fraction, nearly.
_LONG = 10**6


@functools.cache
def flops_per_step(arm: Arm, size: Size, recipe: Recipe) -> float:
    """FLOPs of a training step's loss and gradient, the mean over a training.

    Steps in which routed layers have more slots than their capacity cost more. The optimizer's few
    FLOPs are left out.
    """
    bounds = stages(recipe, arm.shapes(size), _LONG)
    lengths = np.diff([*bounds, _LONG])
    each = [_flops_at(arm, size, capacities) for capacities in bounds.values()]
    return float(np.average(each, weights=lengths))


@functools.cache
def _flops_at(arm: Arm, size: Size, capacities: tuple[Fraction, ...]) -> int:
    model = mode.with_capacity(arm.shapes(size), capacities)
    arguments = (model, shape_of_batch(size.length, size.batch), jax.random.key(0))
    return mode.count_flops(
        lambda model, sample, key: loss_and_gradient(arm, Recipe(), model, Batch.of(sample), key),
        *arguments,
    ).total


@functools.cache
def forward_flops_per_token(arm: Arm, size: Size) -> float:
    """FLOPs of a forward pass under the training selection, per token."""
    tokens = jax.ShapeDtypeStruct((1, size.length), jnp.int32)
    arguments = (arm.shapes(size), tokens, jax.random.key(0))
    counted = mode.count_flops(lambda model, tokens, key: model(tokens, key=key)[0], *arguments)
    return counted.total / size.length


def parameter_count(model: mode.Transformer) -> int:
    """Counts the parameters of a model, or of its shapes."""
    parameters = eqx.filter(model, mode.is_trainable(model))
    return sum(leaf.size for leaf in jax.tree.leaves(parameters))


def training_budget(budget: float, size: Size) -> float:
    """The FLOPs of a budget, which scales those of the default."""
    return budget * DENSE_STEPS * flops_per_step(ARMS[0], size, Recipe())


def steps_for(arm: Arm, flops: float, per_step: float) -> int:
    """The number of steps whose FLOPs come nearest to a budget; raises `ValueError` below 2."""
    steps = round(flops / per_step)
    if steps < 2:
        raise ValueError(
            f"`budget` must pay for at least 2 steps of every arm, got {flops:.3g} FLOPs, "
            f"{flops / per_step:.2f} steps of {arm.name!r}: at least {2 * per_step:.3g} are needed."
        )
    return steps
