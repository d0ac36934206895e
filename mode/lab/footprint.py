"""What a training step needs on each device: counted from shapes, and said by the compiler.

The program is the one that `mode-lab train` runs: its step, its state, donated, laid out by the
same rules. Nothing is allocated.
"""

import dataclasses
import inspect
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import jax
from jax.sharding import AbstractMesh, AxisType, Mesh
from jaxtyping import PyTree

import mode
from mode.testing import Collective, Exceeded, compiles_for

from .arms import Arm, Size
from .budget import parameter_count
from .data import Batch, shape_of_batch
from .step import Recipe, TrainState, begin, make_step, next_byte_loss


# Of a run of which nothing but the state's shapes is wanted: they do not depend on it.
_STEPS = 1000


@dataclasses.dataclass(frozen=True)
class Counted:
    """What is known without a compiler, on one device, in bytes but for the first two and the last.

    **Attributes:**

    - `parameters`: of the whole model.
    - `flops`: of the whole step on one device: loss, gradient and update, as `count_flops` counts.
    - `parameter_bytes`: its part of the parameters.
    - `optimizer_bytes`: of the optimizer's state.
    - `other_bytes`: of router state, keys and the batch.
    - `gradient_bytes`: of the gradient, which lies as the parameters do. All of it is there at
        once, as its norm is clipped before the first update.
    - `activation_bytes`: of what the forward pass keeps for the backward pass.
    """

    parameters: int
    flops: float
    parameter_bytes: int
    optimizer_bytes: int
    other_bytes: int
    gradient_bytes: int
    activation_bytes: int

    @property
    def argument_bytes(self) -> int:
        """What a step is given: it cannot run where this does not fit."""
        return self.parameter_bytes + self.optimizer_bytes + self.other_bytes


@dataclasses.dataclass(frozen=True)
class Said:
    """What the compiler says, on one device.

    **Attributes:**

    - `needed_bytes`: all together; of a program that it refused, what it said when it did.
    - `argument_bytes`, `temporary_bytes`, `result_bytes`, `code_bytes`: the parts of it, results
        but for those written over the state; `None` where it refused.
    - `flops`: its own count, in which the body of a loop counts once; `None` where it has none.
    - `collectives`: exchanges between devices.
    - `seconds`: that it took.
    """

    needed_bytes: int
    argument_bytes: int | None
    temporary_bytes: int | None
    result_bytes: int | None
    code_bytes: int | None
    flops: float | None
    collectives: tuple[Collective, ...]
    seconds: float


class Program:
    """The training step of an arm at a size.

    **Arguments:**

    - `arm`, `size`: what is trained.

    **Raises:** `ValueError` for sizes that no model can have.
    """

    def __init__(self, arm: Arm, size: Size):
        for name in ("batch", "length"):
            if getattr(size, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(size, name)}.")
        self.arm = arm
        self.size = size
        recipe = Recipe()
        self.state: TrainState = eqx.filter_eval_shape(
            begin, arm, size, recipe, steps=_STEPS, seed=0
        )
        self.sample = shape_of_batch(size.length, size.batch)
        # The function itself: what it is jitted with is given to the target's compiler instead.
        self.step: Callable[..., Any] = inspect.unwrap(make_step(arm, recipe))
        self.flops = mode.count_flops(self.step, self.sample, self.state).total
        self.activation_bytes = _activation_bytes(self.state.model, size)

    def counted(self, axes: Mapping[str, int]) -> Counted:
        """On each device of a mesh with these axes.

        **Raises:** `ValueError` for arrays that do not divide over it.
        """
        devices = math.prod(axes.values())
        mesh = AbstractMesh(
            tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes)
        )
        model, optimizer = self.state.model, self.state.optimizer
        parameters = eqx.filter(model, mode.trainable(model))
        state = bytes_on_device(self.state, mesh)
        batch = bytes_on_device(self.sample, mesh, mode.BATCH)
        parameter_bytes = bytes_on_device(parameters, mesh)
        optimizer_bytes = bytes_on_device(optimizer, mesh)
        return Counted(
            parameters=parameter_count(model),
            flops=self.flops / devices,
            parameter_bytes=parameter_bytes,
            optimizer_bytes=optimizer_bytes,
            other_bytes=state + batch - parameter_bytes - optimizer_bytes,
            gradient_bytes=parameter_bytes,
            activation_bytes=self.activation_bytes // devices,
        )

    def compiled(self, target: str, axes: Mapping[str, int]) -> Said:
        """What the compiler of `target` makes of it on a mesh with these axes.

        **Raises:** as `mode.testing.compiles_for`, but for too little memory.
        """
        began = time.perf_counter()
        try:
            found = compiles_for(target, self.step, self.sample, self.state, axes=axes, donate=(1,))
        except RuntimeError as error:
            over = Exceeded.read(error)
            if over is None:
                raise
            seconds = time.perf_counter() - began
            return Said(over.needed, None, None, None, None, None, (), seconds)
        return Said(
            needed_bytes=found.needed_bytes,
            argument_bytes=found.argument_bytes,
            temporary_bytes=found.temporary_bytes,
            result_bytes=found.output_bytes - found.alias_bytes,
            code_bytes=found.code_bytes,
            flops=found.flops,
            collectives=found.collectives,
            seconds=time.perf_counter() - began,
        )


def bytes_on_device(
    tree: PyTree, mesh: Mesh | AbstractMesh, rules: tuple[mode.Rule, ...] = mode.PARAMETERS
) -> int:
    """Of the arrays of a tree, on the device that has most of them."""
    where = mode.placement(tree, mesh, rules)
    sizes = jax.tree.map(
        lambda leaf, sharding: (
            0
            if sharding is None
            else math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        ),
        tree,
        where,
    )
    return sum(size for size in jax.tree.leaves(sizes) if isinstance(size, int))


def _activation_bytes(model: mode.Transformer, size: Size) -> int:
    """What automatic differentiation keeps for the backward pass and what grows with the batch.

    What does not grow, parameters and their copies in another dtype, is no activation. A compiler
    may keep less, by computing again, or more, by padding.
    """

    def kept(batch: int) -> int:
        def residuals(model: mode.Transformer, sample: dict[str, Any]) -> list[Any]:
            parameters, rest = eqx.partition(model, mode.trainable(model))
            _, backward, _ = jax.vjp(
                lambda parameters: next_byte_loss(
                    eqx.combine(parameters, rest), Batch.of(sample), jax.random.key(0)
                ),
                parameters,
                has_aux=True,
            )
            return [leaf for leaf in jax.tree.leaves(backward) if eqx.is_array(leaf)]

        found = eqx.filter_eval_shape(residuals, model, shape_of_batch(size.length, batch))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in found)

    return size.batch * (kept(4) - kept(2)) // 2
