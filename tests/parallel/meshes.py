"""Meshes of CPU devices, and rules, that several test files use."""

import math

import jax
from jax.sharding import AxisType, Mesh

from mode.parallel import PARAMETER_RULES, ShardingRule


# Data parallel with whole parameters, sharded parameters, experts, and all at once.
WHOLE = (ShardingRule("experts", ("expert",)), ShardingRule(None))
MESHES: dict[str, tuple[dict[str, int], tuple[ShardingRule, ...]]] = {
    "data": ({"data": 8}, WHOLE),
    "fsdp": ({"data": 8}, PARAMETER_RULES),
    "expert": ({"expert": 4}, WHOLE),
    "all": ({"data": 2, "expert": 4}, PARAMETER_RULES),
}


def mesh_of(**axes: int) -> Mesh:
    """A mesh of the first devices, with axes of these sizes."""
    devices = jax.devices()[: math.prod(axes.values())]
    types = (AxisType.Auto,) * len(axes)
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=types, devices=devices)
