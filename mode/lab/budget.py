"""Equal training FLOPs: the number of steps of each arm, counted on the program it runs."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp

import mode

from .arms import ARMS, Arm, Size
from .data import Batch, shape_of_batch
from .step import loss_and_gradient


# A budget of 1 is what the dense arm spends on this many steps.
DENSE_STEPS = 350


@functools.cache
def flops_per_step(arm: Arm, size: Size) -> int:
    """FLOPs of one training step's loss and gradient. The optimizer's few are left out."""
    arguments = (arm.shapes(size), shape_of_batch(size.length, size.batch), jax.random.key(0))
    return mode.count_flops(
        lambda model, sample, key: loss_and_gradient(arm, model, Batch.of(sample), key), *arguments
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
    return budget * DENSE_STEPS * flops_per_step(ARMS[0], size)


def steps_for(arm: Arm, flops: float, per_step: int) -> int:
    """The number of steps whose FLOPs come nearest to a budget; raises `ValueError` below 2."""
    steps = round(flops / per_step)
    if steps < 2:
        raise ValueError(
            f"`budget` must pay for at least 2 steps of every arm, got {flops:.3g} FLOPs, "
            f"{flops / per_step:.2f} steps of {arm.name!r}: at least {2 * per_step:.3g} are needed."
        )
    return steps
