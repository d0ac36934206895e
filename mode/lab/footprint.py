"""What a training step needs on each device: counted from shapes, and reported by the compiler.

Nothing is allocated. `texts/plan.md` says what the numbers are.
"""

import inspect
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType
from jaxtyping import PyTree

import mode

from .arms import Arm
from .budget import parameter_count
from .data import Batch, shape_of_batch
from .options import Recipe, Size
from .step import TrainState, begin, make_step, next_byte_loss


class Program:
    """The training step of `mode-lab train` for an arm and a size, sharded by the same rules.

    **Raises:** `ValueError` for sizes that no model can have.
    """

    def __init__(self, arm: Arm, size: Size):
        self.size = size
        recipe = Recipe()
        self.state: TrainState = eqx.filter_eval_shape(begin, arm, size, recipe, seed=0)
        # A batch and a learning rate.
        self.given = (shape_of_batch(size.length, size.batch), jax.ShapeDtypeStruct((), np.float32))
        # The function itself: the target's compiler is given what it is jitted with.
        self.step: Callable[..., Any] = inspect.unwrap(make_step(arm, recipe))
        self.flops = mode.count_flops(self.step, self.given, self.state).total
        self.activation_bytes = _activation_bytes(self.state.model, size)

    def count(self, axes: Mapping[str, int]) -> dict[str, int | float]:
        """Counts what each device of a mesh with these axes needs.

        **Raises:** `ValueError` for arrays that do not divide over it.
        """
        devices, types = math.prod(axes.values()), (AxisType.Auto,) * len(axes)
        mesh = AbstractMesh(tuple(axes.values()), tuple(axes), axis_types=types)
        model = self.state.model
        parameter_bytes = _bytes_on_device(eqx.filter(model, mode.is_trainable(model)), mesh)
        batch_bytes = _bytes_on_device(self.given[0], mesh, mode.BATCH_RULES)
        return {
            "parameters": parameter_count(model),
            "flops": self.flops / devices,
            "argument_bytes": _bytes_on_device(self.state, mesh) + batch_bytes,
            "parameter_bytes": parameter_bytes,
            "optimizer_bytes": _bytes_on_device(self.state.optimizer, mesh),
            "gradient_bytes": parameter_bytes,
            "activation_bytes": self.activation_bytes // devices,
        }

    def compile(
        self, target: str, axes: Mapping[str, int]
    ) -> tuple[dict[str, int | float], dict[str, str]]:
        """Lets the compiler of `target` compile it for a mesh with these axes.

        **Returns:** numbers, and the exchanges between devices. Of a program for which there is too
        little memory, the compiler says no more than how much it needs.
        """
        began = time.perf_counter()
        arguments = (self.step, self.given, self.state)
        rules = (mode.BATCH_RULES, mode.PARAMETER_RULES)
        try:
            program = mode.aot.compile_for(target, *arguments, axes=axes, rules=rules, donate=(1,))
        except mode.aot.OutOfMemory as over:
            return {"needed_bytes": over.needed, "seconds": time.perf_counter() - began}, {}
        numbers = {
            "argument_bytes": program.argument_bytes,
            "temporary_bytes": program.temporary_bytes,
            "result_bytes": program.output_bytes - program.alias_bytes,
            "code_bytes": program.code_bytes,
            "needed_bytes": program.needed_bytes,
            "seconds": time.perf_counter() - began,
        } | ({} if program.flops is None else {"flops": program.flops})
        sizes: dict[str, list[int]] = {}
        for one in program.collectives:
            name = f"{one.kind} ({one.times or '?'} a step each)"
            sizes.setdefault(name, []).append(one.bytes * (one.times or 1))
        return numbers, {name: f"{len(n)}, {sum(n):,} bytes" for name, n in sorted(sizes.items())}


def _bytes_on_device(
    tree: PyTree, mesh: AbstractMesh, rules: tuple[mode.ShardingRule, ...] = mode.PARAMETER_RULES
) -> int:
    """The bytes of a tree's arrays on the device that has most of them."""
    shapes, _ = eqx.partition(tree, lambda leaf: hasattr(leaf, "dtype"))
    sizes = jax.tree.map(
        lambda leaf, sharding: math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize,
        shapes,
        mode.named_shardings(shapes, mesh, rules),
    )
    return sum(jax.tree.leaves(sizes))


def _activation_bytes(model: mode.Transformer, size: Size) -> int:
    """The bytes that automatic differentiation keeps for the backward pass and that grow with the
    batch. (Parameters and their copies in another dtype do not grow: they are no activations.)"""

    def residuals(model: mode.Transformer, sample: dict[str, Any]) -> list[Any]:
        parameters, rest = eqx.partition(model, mode.is_trainable(model))

        def loss(parameters: PyTree) -> tuple[Any, Any]:
            whole = eqx.combine(parameters, rest)
            return next_byte_loss(whole, Batch.of(sample), jax.random.key(0))

        _, backward, _ = jax.vjp(loss, parameters, has_aux=True)
        return [leaf for leaf in jax.tree.leaves(backward) if eqx.is_array(leaf)]

    def kept(batch: int) -> int:
        leaves = eqx.filter_eval_shape(residuals, model, shape_of_batch(size.length, batch))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)

    return size.batch * (kept(4) - kept(2)) // 2
