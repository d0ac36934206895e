"""The strict regime: no silent promotion of dtypes or ranks, several devices, checked types."""

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

import jax
import jaxtyping
import pytest


if jax.__version_info__ < (0, 11) and importlib.util.find_spec("libtpu") is None:
    # Fused loops by XLA's older emitter, which compiles in half the time. Later versions have one
    # emitter, and end the process at an unknown flag; so do the TPU's compilers of later versions.
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_use_fusion_emitters=false"
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_num_cpu_devices", 8)


def _is_optimized(item: pytest.Item) -> bool:
    return item.get_closest_marker("optimized") is not None


def pytest_configure(config: pytest.Config) -> None:
    """Declares the mark."""
    config.addinivalue_line("markers", "optimized: compiled as users compile, in more time")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Runs tests that compile alike one after the other: they may share programs."""
    items.sort(key=_is_optimized)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Has LLVM optimize only the programs of tests with the mark `optimized`.

    Without it, compiling takes a quarter of the time, which is most of what a test takes. The mark
    is for claims of equal bits and of causality, which are to hold in the programs that users run.
    This runs before every fixture, as one of the session may train what a test compares bit for
    bit.
    """
    optimized = _is_optimized(item)
    if jax.config.read("jax_disable_most_optimizations") == optimized:
        jax.clear_caches()  # another test may have compiled the same programs the other way
    jax.config.update("jax_disable_most_optimizations", not optimized)


@pytest.fixture(autouse=True, scope="module")
def _few_programs() -> Iterator[None]:
    """Keeps the number of compiled programs low, file by file."""
    yield
    _drop_programs()


@pytest.fixture
def without_type_checks() -> Iterator[None]:
    """Turns off the suite's type hook, which would raise first: users do not have it."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def _drop_programs() -> None:
    """Drops compiled programs that take half of the memory mappings which a process may have.

    The compiler crashes when there are no more.
    """
    maps, most = Path("/proc/self/maps"), Path("/proc/sys/vm/max_map_count")
    if maps.exists() and most.exists():
        with maps.open() as lines:
            count = sum(1 for _ in lines)
        if 2 * count > int(most.read_text()):
            jax.clear_caches()
