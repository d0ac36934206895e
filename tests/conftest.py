"""The strict regime: no silent promotion of dtypes or ranks, several devices, checked types."""

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest


if jax.__version_info__ < (0, 11) and importlib.util.find_spec("libtpu") is None:
    # Fused loops by XLA's older emitter, which compiles in half the time. Later versions have one
    # emitter, and end the process at an unknown flag; so do the TPU's compilers of later versions.
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_use_fusion_emitters=false"
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_num_cpu_devices", 8)


# How this process compiled, last of all.
_compiled_quickly = [False]


@pytest.fixture(autouse=True, scope="module")
def _compiler(request: pytest.FixtureRequest) -> Iterator[None]:
    """Compile quickly, but for files that say `OPTIMISED = True`: what they test depends on it."""
    quick = not getattr(request.module, "OPTIMISED", False)
    if quick != _compiled_quickly[-1]:
        jax.clear_caches()  # another file may have compiled the same programs the other way
        _compiled_quickly.append(quick)
    jax.config.update("jax_disable_most_optimizations", quick)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
    _drop_programs()


def _drop_programs() -> None:
    """Forget compiled programs where they take half the memory mappings that a process may have:
    the compiler crashes when there are no more."""
    maps, limit = Path("/proc/self/maps"), Path("/proc/sys/vm/max_map_count")
    if maps.exists() and limit.exists():
        with maps.open() as lines:
            count = sum(1 for _ in lines)
        if 2 * count > int(limit.read_text()):
            jax.clear_caches()
