"""Compiles programs for devices that this machine does not have, and says if memory is short."""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from .. import parallel
from .._dtypes import is_shaped
from ..nn import record_choices
from ._hlo import Collective, parse_collectives
from ._targets import H100, mesh_for


class OutOfMemory(RuntimeError):
    """Raised for a program that needs more memory than a device of the target has.

    **Attributes:** `needed`, `available`: bytes on one device.
    """

    def __init__(self, message: str, needed: int, available: int):
        RuntimeError.__init__(self, message)
        self.needed, self.available = needed, available

    @staticmethod
    def read(error: Exception) -> "OutOfMemory | None":
        """Reads both sizes off an error of a compiler; `None` for an error of another kind."""
        if isinstance(error, OutOfMemory):
            return error
        text, size = str(error), r"([\d.]+[KMGT]?)"
        match = re.search(rf"Used {size} of {size} hbm", text)
        match = match or re.search(rf"\({size}\) exceeds .*?\({size}\)", text)
        if "RESOURCE_EXHAUSTED" not in text or match is None:
            return None
        return OutOfMemory(text, *map(_bytes, match.groups()))


def _bytes(size: str) -> int:
    return int(float(size.rstrip("KMGT")) * 1024 ** (1 + "KMGT".find(size[-1])))


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A compiled program, and what each of its devices needs to run it.

    **Attributes:**

    - `devices`: number of devices.
    - `flops`: by the compiler's own count, in which the body of a loop counts once; `None` if the
        compiler does not count, as that for CUDA.
    - `argument_bytes`, `output_bytes`, `temporary_bytes`, `code_bytes`: memory of a device.
    - `alias_bytes`: those of the outputs that are written over donated arguments.
    - `collectives`: all of them, in the order of the program.
    - `kernels`: the kernels of attention, by name, each once; those of the default with the reason.
    - `text`: the optimized program.
    """

    devices: int
    flops: float | None
    argument_bytes: int
    output_bytes: int
    temporary_bytes: int
    code_bytes: int
    alias_bytes: int
    collectives: tuple[Collective, ...]
    kernels: tuple[str, ...]
    text: str = dataclasses.field(repr=False)

    @property
    def needed_bytes(self) -> int:
        """Memory that a device needs in all, as compilers add it up."""
        results = self.output_bytes - self.alias_bytes
        return self.argument_bytes + results + self.temporary_bytes + self.code_bytes

    def count(self, kind: str) -> int:
        """Number of collectives of a kind, such as `all-to-all`."""
        return sum(collective.kind == kind for collective in self.collectives)


def compile_for(
    target: str,
    function: Callable[..., Any],
    *args: Any,
    axes: Mapping[str, int] | None = None,
    rules: Sequence[parallel.Rules] | None = None,
    donate: Sequence[int] = (),
) -> Compiled:
    """Compiles `function(*args)` with XLA for a target that this machine need not have.

    **Arguments:**

    - `target`, `axes`: as `mesh_for` takes them.
    - `args`: modules, arrays, or shapes (`jax.ShapeDtypeStruct`); nothing is allocated. Values that
        are not arrays are constants of the program.
    - `rules`: as `named_shardings` takes them, for each argument. By default `DECODE_RULES` for a
        `DecodeState`, `BATCH_RULES` for an array or a tree of integers, else `PARAMETER_RULES`.
    - `donate`: indices of the arguments whose memory results may use.

    **Raises:** `OutOfMemory`; `ValueError` for a program that calls back to Python, or `rules` of
    another number than the arguments; what `mesh_for` raises; else the compiler's own error.

        model = mode.mod_transformer(256, 512, depth=8, num_heads=8, key=jax.random.key(0))
        tokens = jax.ShapeDtypeStruct((16, 512), jnp.int32)
        compiled = mode.aot.compile_for("tpu:v5e:4x4", lambda m, t: m(t)[0], model, tokens)
        assert compiled.count("all-to-all") == 0
    """
    rules = [_rules_for(arg) for arg in args] if rules is None else rules
    if len(rules) != len(args):
        raise ValueError(
            f"`rules` must have an entry for each of the {len(args)} arguments of `function`, got "
            f"{len(rules)}. `PARAMETER_RULES` is for modules, `BATCH_RULES` for batches."
        )
    mesh = mesh_for(target, axes)
    arrays, constants = eqx.partition(args, is_shaped)
    pairs = zip(arrays, rules, strict=True)
    shapes = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        arrays,
        tuple(parallel.named_shardings(tree, mesh, rule) for tree, rule in pairs),
    )

    def run(*arrays: PyTree) -> PyTree:
        return eqx.filter(function(*eqx.combine(arrays, constants)), eqx.is_array)

    try:
        with jax.set_mesh(mesh), record_choices() as kernels:
            compiled = jax.jit(run, donate_argnums=tuple(donate)).lower(*shapes).compile()
    except RuntimeError as error:
        out_of_memory = OutOfMemory.read(error)
        if out_of_memory is not None:
            raise out_of_memory from error
        if "Unknown backend" not in str(error):
            raise
        raise ValueError(
            f"`function` must not call back to Python to be compiled for {target}, which is not "
            "there to be called from. Checks at run time, such as that of `mode.decode_step`, are "
            "left out if the environment has EQX_ON_ERROR=off."
        ) from error
    memory = compiled.memory_analysis()
    assert memory is not None
    text = compiled.as_text() or ""
    return Compiled(
        devices=mesh.size,
        flops=(compiled.cost_analysis() or {}).get("flops"),
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        code_bytes=memory.generated_code_size_in_bytes,
        alias_bytes=memory.alias_size_in_bytes,
        collectives=tuple(parse_collectives(text)),
        kernels=tuple(kernels),
        text=text,
    )


def _rules_for(arg: Any) -> parallel.Rules:
    if any("caches" in array.roles for array in parallel.array_roles(arg)):
        return parallel.DECODE_RULES
    shaped = [leaf for leaf in jax.tree.leaves(arg) if is_shaped(leaf)]
    integers = all(jnp.issubdtype(leaf.dtype, jnp.integer) for leaf in shaped)
    return parallel.BATCH_RULES if is_shaped(arg) or integers else parallel.PARAMETER_RULES


def device_memory_bytes(target: str) -> int:
    """Returns the memory that programs may use on each device of a target, in bytes.

    For a TPU this is what its compiler allows. For an H100 it is all that the driver has: JAX
    decides when it starts how much of it to take. Takes targets as `mesh_for` does.

    >>> import mode
    >>> mode.aot.device_memory_bytes("cuda:h100")
    84978434048
    """
    if target == "cuda:h100":
        return int(H100.partition("device_memory_size: ")[2].split()[0])
    # The error for an array that fits no device says how much memory there is.
    array = jax.ShapeDtypeStruct((mesh_for(target).size * 2**10, 2**30), jnp.float32)
    try:
        compile_for(target, lambda x: x + 1, array)
    except OutOfMemory as error:
        return error.available
    raise RuntimeError(f"the compiler of {target} did not report how much memory a device has.")
