"""The order in which `mode-lab plan` tries meshes."""

import dataclasses
import math
from collections.abc import Iterator

from mode.testing import mesh_for


# Topologies of a search grow to so many chips a side, and so many in all.
_LONGEST_SIDE, _MOST_CHIPS = 16, 1024


@dataclasses.dataclass(frozen=True)
class Place:
    """Devices and their arrangement."""

    target: str
    axes: dict[str, int]

    @property
    def devices(self) -> int:
        """How many there are."""
        return math.prod(self.axes.values())

    @property
    def named(self) -> str:
        """The axes, in words."""
        return " x ".join(f"{name} {size}" for name, size in self.axes.items())


def meshes(devices: int, experts: int) -> list[dict[str, int]]:
    """All that the experts divide over, from the most devices along `expert` to the fewest."""
    most = math.gcd(devices, experts)
    return [
        {"data": devices // expert, "expert": expert}
        for expert in range(most, 0, -1)
        if most % expert == 0
    ]


def places(target: str, asked: list[dict[str, int]], experts: int) -> Iterator[Place]:
    """The meshes asked for, and then those of ever larger topologies of the generation."""
    yield from (Place(target, axes) for axes in asked)
    for larger in larger_topologies(target):
        yield from (Place(larger, axes) for axes in meshes(mesh_for(larger).size, experts))


def larger_topologies(target: str) -> Iterator[str]:
    """Of the same generation, each of twice the chips: the shortest side is doubled.

    A single chip is followed by a host of four: what lies between is not there.
    """
    head, _, shape = target.rpartition(":")
    if not target.startswith("tpu"):
        return
    sides = sorted(int(side) for side in shape.split("x"))
    while True:
        single = math.prod(sides) == 1
        sides = [2, 2, *sides[2:]] if single else sorted([2 * sides[0], *sides[1:]])
        if sides[-1] > _LONGEST_SIDE or math.prod(sides) > _MOST_CHIPS:
            return
        yield f"{head}:{'x'.join(map(str, sides))}"
