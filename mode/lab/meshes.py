"""The meshes that `mode-lab plan` tries, in their order."""

import dataclasses
import math
from collections.abc import Iterator

from mode.aot import mesh_for


# Topologies of a search grow to so many chips a side, and so many in all.
_LONGEST_SIDE, _MOST_CHIPS = 16, 1024


@dataclasses.dataclass(frozen=True)
class MeshOf:
    """The devices of a target, and their arrangement as `data` times `expert`."""

    target: str
    data: int
    expert: int

    @property
    def axes(self) -> dict[str, int]:
        """Its axes, as JAX takes them."""
        return {"data": self.data, "expert": self.expert}

    def __str__(self) -> str:
        return f"{self.target} as data {self.data} x expert {self.expert}"


def meshes(target: str, experts: int) -> list[MeshOf]:
    """Lists those over which the experts divide, from the most devices along `expert` on."""
    devices = mesh_for(target).size
    most = math.gcd(devices, experts)
    sizes = (expert for expert in range(most, 0, -1) if most % expert == 0)
    return [MeshOf(target, devices // expert, expert) for expert in sizes]


def larger_topologies(target: str) -> Iterator[str]:
    """Yields topologies of the same generation, each of twice the chips by its shortest side.

    A single chip is followed by a host of four: there is nothing between them.
    """
    head, _, shape = target.rpartition(":")
    if not target.startswith("tpu"):
        return
    sides = sorted(map(int, shape.split("x")))
    while True:
        single = math.prod(sides) == 1
        sides = [2, 2, *sides[2:]] if single else sorted([2 * sides[0], *sides[1:]])
        if sides[-1] > _LONGEST_SIDE or math.prod(sides) > _MOST_CHIPS:
            return
        yield f"{head}:{'x'.join(map(str, sides))}"
