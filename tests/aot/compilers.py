"""Marks of the tests that need a compiler, which the extras `aot-tpu` and `aot-gpu` install."""

import importlib.util
import os

import pytest


# The tests run here; the devices they compile for are elsewhere.
os.environ.setdefault("JAX_PLATFORMS", "cpu")


def _has(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package around it
        return False


TPU = pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="needs the extra aot-tpu")
GPU = pytest.mark.skipif(
    not importlib.util.find_spec("jax_plugins"), reason="needs the extra aot-gpu"
)
CUDNN = pytest.mark.skipif(
    not (importlib.util.find_spec("jax_plugins") and _has("nvidia.cudnn")),
    reason="needs the extra aot-gpu, which has cuDNN",
)
