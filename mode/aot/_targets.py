"""Targets to compile for: their names, their devices, and meshes of these."""

import contextlib
import importlib.util
import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jax.sharding import AxisType, Mesh


# The properties of an H100 SXM5 with 80 GB that the compiler needs, under XLA's names.
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


def mesh_for(target: str, axes: Mapping[str, int] | None = None) -> Mesh:
    """Makes a mesh of a target's devices, which this machine need not have.

    **Arguments:**

    - `target`: `tpu:GENERATION:TOPOLOGY`, such as `tpu:v5e:4x4`, or `cuda:h100`, a single device.
    - `axes`: names and sizes of the axes, in order; by default all devices along `data`.

    **Returns:** a mesh of type `Auto`, for shardings and shapes. Nothing can be allocated on it.

    **Raises:** `ValueError` for an unknown target, or axes whose sizes do not multiply to the
    number of its devices; `ImportError` if the compiler is not installed.
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


def _devices(target: str) -> Sequence[Any]:
    from jax.experimental.topologies import get_topology_desc  # is not free: at first use

    if target == "cuda:h100":
        _need("jax_plugins.xla_cuda13", "aot-gpu", target)
        return get_topology_desc("", "cuda", topology="1x1x1", target_config=H100).devices
    match = re.fullmatch(r"tpu:(\w+):(\d+(?:x\d+)+)", target)
    if match is None:
        raise ValueError(
            "`target` must be `tpu:GENERATION:TOPOLOGY`, such as `tpu:v5e:4x4`, or `cuda:h100`, "
            f"got {target!r}."
        )
    _need("libtpu", "aot-tpu", target)
    # Or the compiler queries the network about the TPU that this machine is a part of, and lets one
    # process at a time compile.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-16")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    generation, sides = match[1], [int(side) for side in match[2].split("x")]
    # The compiler ends the process if these have longer sides.
    if generation in ("v5e", "v6e") and max(sides) > 16:
        raise ValueError(
            f"`target` must have sides of at most 16 for {generation}, got {target!r}. The largest "
            f"is tpu:{generation}:16x16."
        )
    # The host of a single chip has that chip alone; the hosts of larger topologies have four.
    single = {"chips_per_host_bounds": (1, 1, 1)} if math.prod(sides) == 1 else {}
    try:
        return get_topology_desc(target.removeprefix("tpu:"), "tpu", **single).devices
    except RuntimeError as error:
        raise ValueError(
            f"`target` must be a topology that exists, as `tpu:v5e:4x4`, got {target!r}: {error}"
        ) from error


def _need(module: str, extra: str, target: str) -> None:
    with contextlib.suppress(ModuleNotFoundError):  # of the package around the module
        if importlib.util.find_spec(module) is not None:
            return
    raise ImportError(
        f"compiling for {target} needs {module}, which the extra `{extra}` installs: in a clone, "
        f'`pip install ".[{extra}]"`, or `uv run --extra {extra} ...`.'
    )
