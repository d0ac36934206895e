"""Counts the floating-point operations of a program: one pass over its traced form."""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.extend.core as jex
import jax.numpy as jnp
from jax.interpreters import partial_eval
from jaxtyping import PyTree

from .._dtypes import is_shaped
from ..nn._kernels import tangent_program


# Primitives that cost one operation per number that comes out of them, or goes into them.
_PER_RESULT = re.compile(
    "add|sub|mul|div|max|min|neg|abs|sign|rem|add_any|square|integer_pow|clamp|select_n|logistic"
)
_PER_OPERAND = re.compile("reduce_(sum|max|min|prod)|cum(sum|max|prod|logsumexp)")
_SCOPE = re.compile(r"mode\.\w+")


@dataclasses.dataclass(frozen=True)
class Flops:
    """The floating-point operations of a program.

    **Attributes:**

    - `matmul`: those in matrix products and convolutions.
    - `other`: all others.
    - `parts`: both, by the innermost named scope, such as `mode.Attention` or `mode.Router`; `""`
        for work outside every layer of this library.
    """

    matmul: int
    other: int
    parts: dict[str, int]

    @property
    def total(self) -> int:
        """Number of all floating-point operations."""
        return self.matmul + self.other


def count_flops(function: Callable[..., PyTree], *args: Any, **kwargs: Any) -> Flops:
    """Counts the floating-point operations of `function(*args, **kwargs)` without running it.

    `function` may be a layer, a model, a whole training step. Among its arguments,
    `jax.ShapeDtypeStruct` may stand for arrays; other values are passed on as they are.
    `help(mode.flops)` states the convention.

    >>> import jax, jax.numpy as jnp, mode
    >>> block = mode.TransformerBlock(32, num_heads=4, key=jax.random.key(0))
    >>> routed = mode.MixtureOfDepths(block, 32, capacity=0.125, key=jax.random.key(1))
    >>> x = jax.ShapeDtypeStruct((1, 64, 32), jnp.float32)
    >>> parts = [mode.count_flops(layer, x).parts for layer in (routed, mode.Residual(block))]
    >>> parts[0]["mode.SwiGLUFeedForward"] / parts[1]["mode.SwiGLUFeedForward"]
    0.125
    """
    arrays, static = eqx.partition((function, args, kwargs), is_shaped)

    def run(arrays: PyTree) -> PyTree:
        function, args, kwargs = eqx.combine(arrays, static)
        return eqx.filter(function(*args, **kwargs), eqx.is_array)

    jaxpr = jax.jit(run).trace(arrays).jaxpr.jaxpr
    # The compiler removes dead code, which is often half of the forward pass of a gradient.
    jaxpr, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    counted = _count(jaxpr, "")
    parts: Counter[str] = Counter()
    for (part, _), flops in counted.items():
        parts[part] += flops
    matmul = sum(flops for (_, in_matmul), flops in counted.items() if in_matmul)
    return Flops(matmul, counted.total() - matmul, dict(+parts))


def _count(jaxpr: jex.Jaxpr | jex.ClosedJaxpr, scope: str) -> Counter[tuple[str, bool]]:
    """Counts the operations of each part inside `scope`, apart for those in matrix products."""
    counted: Counter[tuple[str, bool]] = Counter()
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        scopes = _SCOPE.findall(str(eqn.source_info.name_stack))
        part = scopes[-1] if scopes else scope
        if name in ("dot_general", "conv_general_dilated"):
            counted[part, True] += _product_flops(eqn)
        elif name == "cond":
            branches = [_count(branch, part) for branch in eqn.params["branches"]]
            counted.update(max(branches, key=Counter.total))
        elif _PER_RESULT.fullmatch(name):
            each = 3 if name == "logistic" else 1  # 1 / (1 + exp(-x))
            counted[part, False] += each * _floats(eqn.outvars)
        elif _PER_OPERAND.fullmatch(name):
            counted[part, False] += _floats(eqn.invars)
        elif name.startswith("scatter-add"):
            counted[part, False] += _floats(eqn.invars[2:])
        elif (program := tangent_program(eqn)) is not None:
            counted.update(_count(program, part))
        elif not name.startswith(("scatter", "reduce")):
            repeats = eqn.params["length"] if name == "scan" else 1
            # The programs inside: of a scan, a call, a checkpoint, a custom gradient.
            for inner in jax.tree.leaves(eqn.params):
                if isinstance(inner, jex.ClosedJaxpr | jex.Jaxpr):
                    for kind, flops in _count(inner, part).items():
                        counted[kind] += repeats * flops
    return counted


def _floats(variables: list[Any]) -> int:
    """Counts the floating-point numbers in `variables`."""
    avals = [variable.aval for variable in variables]
    return sum(math.prod(a.shape) for a in avals if jnp.issubdtype(a.dtype, jnp.floating))


def _product_flops(eqn: Any) -> int:
    """Counts a multiply-add for each number of the result and each that is summed for it."""
    lhs, rhs = (variable.aval.shape for variable in eqn.invars)
    numbers = eqn.params["dimension_numbers"]
    if eqn.primitive.name == "dot_general":
        summed = math.prod(lhs[axis] for axis in numbers[0][0])
    else:
        summed = math.prod(rhs) // rhs[numbers.rhs_spec[0]]
    return 2 * math.prod(eqn.outvars[0].aval.shape) * summed
