"""What a result was made with."""

import platform
from importlib.metadata import PackageNotFoundError, version


def versions(*names: str) -> dict[str, str]:
    """Of packages, those that are installed, and of `python`, in the order of the names."""
    found = {}
    for name in names:
        if name == "python":
            found[name] = platform.python_version()
            continue
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue  # a compiler that this one did not need
    return found
