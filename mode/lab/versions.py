"""What a result was made with."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version


PACKAGES = ("mode-jax", "jax", "equinox", "optax", "grain", "python")


def versions(*names: str) -> dict[str, str]:
    """The versions of those packages that are installed, and of `python`, in the given order."""
    numbers = {}
    for name in names:
        if name == "python":
            numbers[name] = platform.python_version()
            continue
        try:
            numbers[name] = version(name)
        except PackageNotFoundError:
            continue  # a compiler that this result did not need
    return numbers


def machine() -> str:
    """The machine and the kind of device that JAX uses."""
    import jax

    return f"{platform.platform()}, {jax.default_backend()}, {os.cpu_count()} cores"
