"""Compile for devices that are not there: the real compilers of TPU and GPU, on any machine."""

import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh
from jaxtyping import PyTree

from ._decode import Decoding
from ._hlo import Collective, collectives
from ._precision import is_shaped
from ._sharding import BATCH, DECODING, PARAMETERS, Rule, placement


# What the compiler asks of an H100 SXM5 with 80 GB; the names are XLA's, the numbers the device's.
H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 minor: 0 }
  core_count: 132  fpus_per_core: 128  clock_rate_ghz: 1.98
  threads_per_warp: 32  threads_per_block_limit: 1024  threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
  shared_memory_per_block: 49152  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472  l2_cache_size: 52428800
  device_memory_size: 84978434048  memory_bandwidth: 3352320000000
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 12 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What a compiler made of a program, for each of its devices.

    **Attributes:**

    - `devices`: how many there are.
    - `flops`: by the compiler's own count, in which the body of a loop counts once; `None` where it
        has none, as for CUDA.
    - `argument_bytes`, `output_bytes`, `temporary_bytes`, `code_bytes`: memory of a device.
    - `alias_bytes`: of the outputs, what is written over donated arguments.
    - `collectives`: all of them, in the order of the program.
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
    text: str = dataclasses.field(repr=False)

    @property
    def needed_bytes(self) -> int:
        """Memory of a device for everything at once, as compilers add it up."""
        results = self.output_bytes - self.alias_bytes
        return self.argument_bytes + results + self.temporary_bytes + self.code_bytes

    def count(self, kind: str) -> int:
        """How many collectives of this kind there are."""
        return sum(found.kind == kind for found in self.collectives)


def mesh_for(target: str, axes: Mapping[str, int] | None = None) -> Mesh:
    """A mesh of devices that are not there, to lay arrays out on and to compile for.

    **Arguments:**

    - `target`: `tpu:GENERATION:TOPOLOGY`, such as `tpu:v5e:4x4`, or `cuda:h100`, a single device.
    - `axes`: the sizes of its axes, in order; by default all devices along `data`.

    **Raises:** `ValueError` for an unknown target or axes that do not take all its devices;
    `ImportError` where the compiler is not installed.
    """
    devices = _devices(target)
    axes = {"data": len(devices)} if axes is None else dict(axes)
    if math.prod(axes.values()) != len(devices):
        raise ValueError(
            f"`axes` must take all {len(devices)} devices of {target}, got {axes}, which takes "
            f"{math.prod(axes.values())}."
        )
    types = (AxisType.Auto,) * len(axes)
    return Mesh(np.array(devices).reshape(*axes.values()), tuple(axes), axis_types=types)


def compiles_for(
    target: str,
    function: Callable[..., Any],
    *args: Any,
    axes: Mapping[str, int] | None = None,
    rules: Sequence[tuple[Rule, ...]] | None = None,
    donate: Sequence[int] = (),
) -> Compiled:
    """Compile `function(*args)` with XLA for a target, on a machine that has no such device.

    **Arguments:**

    - `target`, `axes`: as `mesh_for` takes them.
    - `function`: what is to be compiled.
    - `args`: its arguments: modules, arrays, or shapes (`jax.ShapeDtypeStruct`); nothing is
        allocated on the target. What is no array is a constant of the program.
    - `rules`: of `placement`, for each argument. By default `DECODING` for a `Decoding`, `BATCH`
        for a bare array or a tree of integers, `PARAMETERS` for everything else.
    - `donate`: places of the arguments whose memory results may use.

    **Raises:** what the compiler does, for a program that it refuses; `ValueError` for one that
    calls back to Python; and as `mesh_for`.

    The extras `aot-tpu` and `aot-gpu` install the compilers. Set `JAX_PLATFORMS=cpu` where one is
    installed and there is no such device, or JAX looks for it when it starts.

        model = mode.mod_decoder(256, 512, depth=8, num_heads=8, key=jax.random.key(0))
        tokens = jax.ShapeDtypeStruct((16, 512), jnp.int32)
        compiled = mode.testing.compiles_for("tpu:v5e:4x4", lambda m, t: m(t)[0], model, tokens)
        assert compiled.count("all-to-all") == 0
    """
    mesh = mesh_for(target, axes)
    rules = [_rules_for(arg) for arg in args] if rules is None else rules
    placed = [
        _placed(arg, placement(arg, mesh, rule)) for arg, rule in zip(args, rules, strict=True)
    ]
    parts = [eqx.partition(arg, is_shaped) for arg in placed]

    def run(*arrays: PyTree) -> PyTree:
        whole = (eqx.combine(part, rest) for part, (_, rest) in zip(arrays, parts, strict=True))
        return eqx.filter(function(*whole), eqx.is_array)

    with jax.set_mesh(mesh):
        jitted = jax.jit(run, donate_argnums=tuple(donate))
        try:
            compiled = jitted.lower(*(part for part, _ in parts)).compile()
        except RuntimeError as error:
            if "Unknown backend" not in str(error):
                raise
            raise ValueError(
                f"`function` must not call back to Python to be compiled for {target}, which is "
                "not there to be called from. Checks at run time, such as that of `mode.step`, "
                "are left out where the environment says EQX_ON_ERROR=off."
            ) from error
    costs = compiled.cost_analysis()
    memory = compiled.memory_analysis()
    assert memory is not None
    text = compiled.as_text() or ""
    return Compiled(
        devices=mesh.size,
        flops=None if not costs else costs.get("flops"),
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        code_bytes=memory.generated_code_size_in_bytes,
        alias_bytes=memory.alias_size_in_bytes,
        collectives=tuple(collectives(text)),
        text=text,
    )


def _devices(target: str) -> Sequence[Any]:
    platform, _, rest = target.partition(":")
    if platform == "tpu" and re.fullmatch(r"\w+:\d+(x\d+)+", rest):
        _need("libtpu", "aot-tpu", target)
        # Without these the compiler asks the network which TPU this machine is a part of, and lets
        # one process at a time compile.
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-16")
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
        return _tpu(rest, target)
    if target == "cuda:h100":
        _need("jax_plugins.xla_cuda13", "aot-gpu", target)
        return topologies.get_topology_desc(
            topology_name="", platform="cuda", topology="1x1x1", target_config=H100
        ).devices
    raise ValueError(
        f"`target` must be `tpu:GENERATION:TOPOLOGY`, such as `tpu:v5e:4x4`, or `cuda:h100`, got "
        f"{target!r}."
    )


def _tpu(topology: str, target: str) -> Sequence[Any]:
    generation, _, shape = topology.partition(":")
    sides = [int(side) for side in shape.split("x")]
    # The compiler ends the process where these have longer sides.
    if generation in ("v5e", "v6e") and max(sides) > 16:
        raise ValueError(
            f"`target` must have sides of at most 16 for {generation}, got {target!r}. The largest "
            f"is tpu:{generation}:16x16."
        )
    # A single chip is a host of its own; larger topologies are of hosts of four.
    alone = {"chips_per_host_bounds": (1, 1, 1)} if math.prod(sides) == 1 else {}
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology, **alone).devices
    except RuntimeError as error:
        raise ValueError(
            f"`target` must be a topology that there is, such as `tpu:v5e:4x4`, got {target!r}: "
            f"{error}"
        ) from error


def _need(module: str, extra: str, target: str) -> None:
    try:
        found = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        found = None
    if found is None:
        raise ImportError(
            f"compiling for {target} needs {module}, which the extra `{extra}` installs: in a "
            f'clone, `pip install ".[lab,{extra}]"`, or `uv run --extra lab --extra {extra} ...`.'
        )


def _rules_for(arg: Any) -> tuple[Rule, ...]:
    if isinstance(arg, Decoding):
        return DECODING
    shaped = [leaf for leaf in jax.tree.leaves(arg) if is_shaped(leaf)]
    integers = all(jnp.issubdtype(leaf.dtype, jnp.integer) for leaf in shaped)
    return BATCH if is_shaped(arg) or integers else PARAMETERS


def _placed(arg: PyTree, where: PyTree) -> PyTree:
    def place(leaf: Any, sharding: Any) -> Any:
        if sharding is None:
            return leaf
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(place, arg, where)
