"""Ahead-of-time compilation for devices that this machine does not have.

The real compilers of TPU and GPU run on any machine: they say whether they accept a program, how
much memory it needs on each device, and what moves between devices.

The extras `aot-tpu` and `aot-gpu` install the compilers. Set `JAX_PLATFORMS=cpu` if a compiler is
installed and its device is absent, or JAX searches for the device when it starts.
"""

from ._compile import (
    Compiled as Compiled,
    OutOfMemory as OutOfMemory,
    compile_for as compile_for,
    device_memory_bytes as device_memory_bytes,
)
from ._hlo import Collective as Collective
from ._targets import mesh_for as mesh_for
