"""What a result was made with."""

import contextlib
import os
import platform
from importlib.metadata import PackageNotFoundError, version

import jax


PACKAGES = ("mode-jax", "jax", "equinox", "optax", "grain", "python")


def versions(*names: str) -> dict[str, str]:
    """The versions of those packages that are installed, and of `python`, in the given order."""
    numbers = {}
    for name in names:
        with contextlib.suppress(PackageNotFoundError):
            numbers[name] = platform.python_version() if name == "python" else version(name)
    return numbers


def machine() -> str:
    """The machine and the kind of device that JAX uses."""
    return f"{platform.platform()}, {jax.default_backend()}, {os.cpu_count()} cores"
