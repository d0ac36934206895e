"""How much memory the devices of a target have, as their compilers say."""

import dataclasses
import re

import jax
import jax.numpy as jnp

from ._targets import H100, compiles_for, mesh_for


@dataclasses.dataclass(frozen=True)
class Exceeded:
    """What a TPU's compiler says of a program that takes more memory than there is.

    **Attributes:**

    - `needed`, `available`: bytes on one device.
    """

    needed: int
    available: int

    @staticmethod
    def read(error: Exception) -> "Exceeded | None":
        """`None` for an error of another kind."""
        text = str(error)
        size = r"([\d.]+)([KMGT]?)"
        for pattern in (rf"Used {size} of {size} hbm", rf"\({size}\) exceeds .*?\({size}\)"):
            found = re.search(pattern, text)
            if "RESOURCE_EXHAUSTED" in text and found is not None:
                units = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}
                needed, available = (
                    int(float(found[place]) * 2 ** units[found[place + 1]]) for place in (1, 3)
                )
                return Exceeded(needed, available)
        return None


def memory_of(target: str) -> int:
    """Memory that programs may use on each device of a target, by its compiler.

    Of an H100 all that the driver has to give: how much of it JAX takes is set when it starts.

    **Raises:** as `mesh_for`.
    """
    if target == "cuda:h100":
        found = re.search(r"device_memory_size: (\d+)", H100)
        assert found is not None
        return int(found[1])
    count = mesh_for(target).size
    # A program that fits nowhere: the compiler says how much there would have been.
    huge = jax.ShapeDtypeStruct((count * 2**10, 2**30), jnp.float32)
    try:
        compiles_for(target, lambda x: x + 1, huge)
    except RuntimeError as error:
        over = Exceeded.read(error)
        if over is not None:
            return over.available
        raise
    raise RuntimeError(f"the compiler of {target} did not say how much memory a device has.")
