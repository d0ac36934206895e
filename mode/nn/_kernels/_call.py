"""Calls of a function for which some platforms have a kernel, chosen when the program is lowered.

A program compiled ahead of time for another platform gets that platform's kernel. Reverse-mode
derivatives use the kernel's own backward pass. Forward-mode and second derivatives are those of the
default implementation, which any platform runs: kernels have none.

Three primitives do this. `_forward` computes the result and what the backward pass needs of it,
`_backward` the gradients, and `_tangent`, the linear map that the derivative of `_forward` is, is
never run in reverse mode: its transpose is `_backward`. A function with a custom derivative
(`jax.custom_vjp`) would have no forward-mode derivative at all.
"""

import contextlib
import contextvars
import dataclasses
import functools
import importlib
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array


Arrays = tuple[Array, ...]
# `(x, others) -> (result, saved)`: `x` has gradients, `others` none; all begin with a batch axis.
Forward = Callable[[Arrays, Arrays], tuple[Array, Array]]
# `(x, others, result, saved, d_result) -> d_x`.
Backward = Callable[[Arrays, Arrays, Array, Array, Array], Arrays]

_log = logging.getLogger("mode.kernels")
_choices: contextvars.ContextVar[list[str] | None] = contextvars.ContextVar("choices", default=None)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One implementation: its name, and its forward and backward pass."""

    name: str
    forward: Forward
    backward: Backward


@dataclasses.dataclass(frozen=True, eq=False)
class Kernels:
    """The default implementation, for any platform, and those of some platforms, or why they have
    none."""

    default: Kernel
    of_platform: Mapping[str, Kernel | str]
    required: str | None = None

    @property
    def is_default(self) -> bool:
        """Whether no platform has a kernel."""
        return all(isinstance(kernel, str) for kernel in self.of_platform.values())

    def choose(self, platform: str, context: Any) -> Kernel:
        """Returns the kernel for a platform, and says to the log which one it is and why.

        **Raises:** `ValueError` where another one is required.
        """
        chosen = self.of_platform.get(platform, "there is none for this platform")
        if platform == "tpu" and not isinstance(chosen, str) and not _is_manual(context):
            chosen = "the program is for several devices: set the mesh with `jax.set_mesh`"
        if self.required not in (None, getattr(chosen, "name", None)):
            why = chosen if isinstance(chosen, str) else f"that has {chosen.name}"
            raise ValueError(
                f"`implementation` must run on {platform}, got {self.required!r}: {why}. Leave it "
                "out, and each platform gets its own."
            )
        name = f"{self.default.name} ({chosen})" if isinstance(chosen, str) else chosen.name
        _log.debug("attention on %s: %s", platform, name)
        choices = _choices.get()
        if choices is not None and name not in choices:
            choices.append(name)
        return self.default if isinstance(chosen, str) else chosen


@contextlib.contextmanager
def record_choices() -> Iterator[list[str]]:
    """Collects the names of the kernels that are chosen inside, each once, with reasons."""
    choices: list[str] = []
    token = _choices.set(choices)
    try:
        yield choices
    finally:
        _choices.reset(token)


def _is_manual(context: Any) -> bool:
    """Whether a program is for one device, as the partitioner cannot divide kernels of Pallas."""
    axes = context.module_context.axis_context
    if getattr(axes, "num_devices", None) == 1:
        return True
    mesh = getattr(axes, "mesh", None)
    return mesh is not None and set(axes.manual_axes) == set(mesh.axis_names)


def call(kernels: Kernels, x: Arrays, others: Arrays) -> Array:
    """Computes the result of `kernels` for arrays with gradients, and others without any."""
    return _call(_forward, kernels, len(x), *x, *others)[0]


def import_private(name: str, *attributes: str) -> Any | None:
    """Imports a module of JAX that is not public; `None` where it has not these attributes."""
    with contextlib.suppress(ImportError):
        module = importlib.import_module(name)
        if all(hasattr(module, attribute) for attribute in attributes):
            return module
    return None


def _call(primitive: Primitive, kernels: Kernels, count: int, *args: Array) -> list[Array]:
    # The default's program says what the results are and, to `mode.count_flops`, what they cost.
    program = jax.make_jaxpr(_flat(primitive, kernels.default, count))(*args)
    return primitive.bind(*args, program=program, kernels=kernels, count=count)


def _flat(primitive: Primitive, kernel: Kernel, count: int) -> Callable[..., Arrays]:
    """A pass of a kernel as a function of arrays: those with gradients first."""

    def forward(*args: Array) -> Arrays:
        return kernel.forward(args[:count], args[count:])

    def backward(*args: Array) -> Arrays:
        *others, result, saved, d_result = args[count:]
        return kernel.backward(args[:count], tuple(others), result, saved, d_result)

    return forward if primitive is _forward else backward


def _plain(kernels: Kernels, count: int, *args: Array) -> Array:
    """The result by the default implementation, which can be differentiated as it stands."""
    return kernels.default.forward(args[:count], args[count:])[0]


def _make_primitive(name: str) -> Primitive:
    primitive = Primitive(name)
    primitive.multiple_results = True

    @primitive.def_impl
    def run(*args: Array, **params: Any) -> list[Array]:
        return jax.jit(functools.partial(primitive.bind, **params))(*args)

    return primitive


_forward = _make_primitive("mode_attention")
_backward = _make_primitive("mode_attention_backward")
_tangent = _make_primitive("mode_attention_tangent")


def _lower(primitive: Primitive, platform: str) -> Callable[..., Any]:
    def rule(context: Any, *args: Any, kernels: Kernels, count: int, program: Any) -> Any:
        del program
        kernel = kernels.choose(platform, context)
        return mlir.lower_fun(_flat(primitive, kernel, count))(context, *args)

    return rule


for _primitive in (_forward, _backward):
    _primitive.def_abstract_eval(lambda *_, program, **__: program.out_avals)
    mlir.register_lowering(_primitive, _lower(_primitive, "cpu"))
    for _platform in ("cuda", "tpu"):
        mlir.register_lowering(_primitive, _lower(_primitive, _platform), platform=_platform)


def _forward_jvp(primals: Any, tangents: Any, *, kernels: Kernels, count: int, program: Any) -> Any:
    del program
    result, saved = _call(_forward, kernels, count, *primals)
    given = [ad.instantiate_zeros(tangent) for tangent in tangents[:count]]
    params = {"kernels": kernels, "count": count}
    (d_result,) = _tangent.bind(*primals, result, saved, *given, **params)
    # What is saved is read by the backward pass alone, whose own derivative does not need it.
    return [result, saved], [d_result, jnp.zeros_like(saved)]


def _tangent_function(kernels: Kernels, count: int) -> Callable[..., Arrays]:
    def tangent(*args: Array) -> Arrays:
        primals, given = args[: -count - 2], args[-count:]
        others = primals[count:]
        plain = functools.partial(_plain, kernels, count)
        return (jax.jvp(lambda *x: plain(*x, *others), primals[:count], given)[1],)

    return tangent


def tangent_program(equation: Any) -> Any | None:
    """The program of a forward-mode derivative, which its equation does not hold: it is seldom run,
    and would be traced in every reverse-mode derivative. `None` for any other equation."""
    if equation.primitive is not _tangent:
        return None
    avals = [variable.aval for variable in equation.invars]
    return jax.make_jaxpr(_tangent_function(**equation.params))(*avals)


def _tangent_transpose(d_results: Any, *args: Any, kernels: Kernels, count: int) -> list[Any]:
    (d_result,) = d_results
    primals = args[:-count]
    if type(d_result) is ad.Zero:
        return [None] * len(args)
    gradients = _call(_backward, kernels, count, *primals, d_result)
    return [None] * len(primals) + list(gradients)


def _backward_function(kernels: Kernels, count: int) -> Callable[..., Arrays]:
    def gradients(*args: Array) -> Arrays:
        primals, d_result = args[:-3], args[-1]
        others = primals[count:]
        plain = functools.partial(_plain, kernels, count)
        return jax.vjp(lambda *x: plain(*x, *others), *primals[:count])[1](d_result)

    return gradients


def _jvp_of(make: Callable[[Kernels, int], Callable[..., Arrays]]) -> Callable[..., Any]:
    """The derivative of a primitive as that of a function of the same arrays."""

    def rule(primals: Any, tangents: Any, *, kernels: Kernels, count: int, **_: Any) -> Any:
        given = [ad.instantiate_zeros(tangent) for tangent in tangents]
        results, d_results = jax.jvp(make(kernels, count), tuple(primals), tuple(given))
        return list(results), list(d_results)

    return rule


_tangent.def_abstract_eval(lambda *args, kernels, count: [args[-count - 2]])
mlir.register_lowering(
    _tangent,
    lambda context, *args, kernels, count: mlir.lower_fun(_tangent_function(kernels, count))(
        context, *args
    ),
)
ad.primitive_jvps[_forward] = _forward_jvp
ad.primitive_jvps[_backward] = _jvp_of(_backward_function)
ad.primitive_jvps[_tangent] = _jvp_of(_tangent_function)
ad.primitive_transposes[_tangent] = _tangent_transpose


def _batch(primitive: Primitive) -> Callable[..., Any]:
    """Makes one axis of the mapped axis and that of the batch, which all arrays begin with."""

    def rule(args: Any, axes: Any, *, kernels: Kernels, count: int, **_: Any) -> Any:
        size = next(x.shape[a] for x, a in zip(args, axes, strict=True) if a is not None)
        fronts = [batching.bdim_at_front(x, axis, size) for x, axis in zip(args, axes, strict=True)]
        folded = [x.reshape(-1, *x.shape[2:]) for x in fronts]
        if primitive is _tangent:
            results = _tangent.bind(*folded, kernels=kernels, count=count)
        else:
            results = _call(primitive, kernels, count, *folded)
        return [x.reshape(size, -1, *x.shape[1:]) for x in results], [0] * len(results)

    return rule


for _primitive in (_forward, _backward, _tangent):
    batching.primitive_batchers[_primitive] = _batch(_primitive)
