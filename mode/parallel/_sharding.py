"""Sharding rules for the arrays that a user holds, and constraints for those inside layers.

Constraints say what the partitioner cannot derive from rules, where two arrays with different
shardings meet: slots move to the experts, and not experts to the slots; parameters are gathered for
the batch, and not the batch for the parameters. They do nothing without `jax.set_mesh`.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
from jax.core import Tracer
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree

from .._dtypes import is_shaped
from .._types import Hidden, Slots
from ._roles import ArrayRoles, array_roles


MeshAxes = str | tuple[str, ...] | None
AnyMesh = Mesh | AbstractMesh

_BATCH_AXES = ("data", "expert")


@dataclasses.dataclass(frozen=True)
class ShardingRule:
    """Says over which axes of a mesh the arrays of one role are sharded.

    **Arguments:**

    - `role`: of the arrays that the rule is for, as `role_field` takes it; `None` for every array.
    - `axes`: the mesh axes that each axis of the array is sharded over, from the first one that is
        not an axis of layers; `None` for none. Axes that a mesh does not have count for nothing.
    - `spread`: mesh axes over which the longest of the other axes is sharded, if it is divisible by
        their size and if there are two or more to choose from: vectors stay whole.

    >>> import mode
    >>> rules = (mode.ShardingRule("embedding", (None, "data")), *mode.PARAMETER_RULES)
    """

    role: str | None
    axes: tuple[MeshAxes, ...] = ()
    spread: tuple[str, ...] = ()


Rules = tuple[ShardingRule, ...]

# Routers are small, and whole on every device: no routing depends on the number of devices.
PARAMETER_RULES = (
    ShardingRule("router"),
    ShardingRule("experts", ("expert",), spread=("data",)),
    ShardingRule(None, spread=_BATCH_AXES),
)
BATCH_RULES = (ShardingRule(None, (_BATCH_AXES,)),)
# Caches have an axis of layers before that of the batch. It is stacked, so it does not count.
DECODE_RULES = (ShardingRule("caches", (_BATCH_AXES,)), *BATCH_RULES)


def named_shardings(tree: PyTree, mesh: AnyMesh, rules: Rules = PARAMETER_RULES) -> PyTree:
    """Returns the sharding of each array of a tree on a mesh.

    **Arguments:**

    - `tree`: a model, an optimizer's state, a batch, a `DecodeState`; or their shapes.
    - `mesh`: with axes `data`, `expert` or both, of type `Auto`: the compiler chooses the shardings
        between the layers. Inside a program, `jax.sharding.get_abstract_mesh()`.
    - `rules`: the first whose role an array plays decides. `PARAMETER_RULES` is for models and
        optimizer states, `BATCH_RULES` for batches, `DECODE_RULES` for a `DecodeState`; put your
        own before them.

    **Returns:** a `NamedSharding` for every array, `None` for all else: for `equinox.filter_shard`.

    **Raises:** `ValueError` for a mesh with explicit axes or with none that the rules name, an
    array that no rule is for, or an axis that is not divisible by the number of devices.

    >>> import equinox, jax, mode
    >>> from jax.sharding import AxisType
    >>> mesh = jax.make_mesh((1, 1), ("data", "expert"), axis_types=(AxisType.Auto,) * 2)
    >>> model = mode.mod_transformer(256, 32, depth=4, num_heads=2, key=jax.random.key(0))
    >>> model = equinox.filter_shard(model, mode.named_shardings(model, mesh))

    *Source:* fully sharded parameters, arXiv:1910.02054; experts over devices, arXiv:2006.16668.
    """
    if not _is_auto(mesh):
        raise ValueError(
            f"`mesh` must have axes of type `Auto`, got {mesh.axis_types}. Pass `axis_types="
            f"(jax.sharding.AxisType.Auto,) * {len(mesh.axis_names)}` to `jax.make_mesh`."
        )
    named = (axes for rule in rules for axes in (*rule.axes, rule.spread))
    if mesh.axis_names and not any(_present_axes(axes, mesh) for axes in (_BATCH_AXES, *named)):
        raise ValueError(
            "`mesh` must have an axis `data`, `expert` or one that `rules` name, got only "
            f"{' and '.join(map(str, mesh.axis_names))}: every device would have a copy of every "
            "array. Rename the axis, or put rules of your own first."
        )
    leaves, structure = jax.tree.flatten(tree)
    shardings = [
        NamedSharding(mesh, _spec(array, leaf.shape, mesh, rules)) if is_shaped(leaf) else None
        for leaf, array in zip(leaves, array_roles(tree), strict=True)
    ]
    return jax.tree.unflatten(structure, shardings)


def _is_auto(mesh: AnyMesh) -> bool:
    return all(kind == AxisType.Auto for kind in mesh.axis_types)


def _present_axes(axes: MeshAxes, mesh: AnyMesh) -> tuple[str, ...]:
    """Returns those of `axes`, one entry of a rule, that the mesh has."""
    names = (axes,) if isinstance(axes, str) else axes or ()
    return tuple(name for name in names if name in mesh.axis_names)


def _num_devices(axes: tuple[str, ...], mesh: AnyMesh) -> int:
    return math.prod(mesh.shape[axis] for axis in axes)


def _rule_for(array: ArrayRoles, rules: Rules) -> ShardingRule:
    for rule in rules:
        if rule.role is None or rule.role in array.roles:
            return rule
    raise ValueError(
        f"`rules` must be for every array, but none is for {array.path or 'the array itself'}, "
        f"whose roles are ({', '.join(array.roles)}). End with `ShardingRule(None)`, which leaves "
        "an array whole."
    )


def _spec(array: ArrayRoles, shape: tuple[int, ...], mesh: AnyMesh, rules: Rules) -> PartitionSpec:
    rule = _rule_for(array, rules)
    # Numbers, such as the empty moments of `optax.adafactor`, are not sharded.
    axes = range(array.stacked, 0 if set(shape) <= {1} else len(shape))
    spec: list[MeshAxes] = [None] * len(shape)
    for axis, mesh_axes in zip(axes, rule.axes, strict=False):
        present = _present_axes(mesh_axes, mesh)
        devices = _num_devices(present, mesh)
        if shape[axis] % devices:
            raise ValueError(
                f"axis {axis} of {array.path or 'the array'}, of size {shape[axis]}, must be "
                f"divisible by the {devices} devices along {' and '.join(present)} of the mesh. "
                "Choose another mesh, or another size."
            )
        spec[axis] = present or None
    free = [axis for axis in axes if spec[axis] is None]
    spread = _present_axes(rule.spread, mesh) if len(free) > 1 else ()
    while spread:
        divisible = [axis for axis in free if shape[axis] % _num_devices(spread, mesh) == 0]
        if divisible:
            spec[max(divisible, key=lambda axis: shape[axis])] = spread
            break
        spread = spread[:-1]
    while spec and spec[-1] is None:
        spec.pop()
    return PartitionSpec(*spec)


# Both ends of an exchange are constrained, because gradients pass it in the other direction.
def to_experts(slots: Slots) -> Slots:
    """Moves slots to the devices of their experts, under a mesh with an axis `expert`.

    Before, each device has the slots of its own groups, for all experts; after, those of all groups
    along `expert`, for its own experts.
    """
    return _place(_place(slots, None, _BATCH_AXES), "expert", "data")


def to_groups(updates: Slots) -> Slots:
    """Moves the experts' updates back to the devices of the groups."""
    return _place(_place(updates, "expert", "data"), None, _BATCH_AXES)


def shard_batch(x: Hidden) -> Hidden:
    """Keeps hidden states on the devices of their sequences."""
    return _place(x, _BATCH_AXES)


def _place(x: Array, *axes: MeshAxes) -> Array:
    """Constrains the first axes of activations; a single group lies as the partitioner decides."""
    return _constrain(x, axes, PartitionSpec.UNCONSTRAINED) if x.ndim > len(axes) + 1 else x


def all_gather_parameters(parameters: PyTree) -> PyTree:
    """Gathers the parameters of the layers that run next, which `PARAMETER_RULES` spread.

    Each device gets the whole of every array, and of experts those of its own along `expert`. Under
    a mesh with other axes nothing is done: the user may have a purpose for these.
    """
    if not set(jax.sharding.get_abstract_mesh().axis_names) <= set(_BATCH_AXES):
        return parameters
    leaves, structure = jax.tree.flatten(parameters)
    for number, array in enumerate(array_roles(parameters)):
        if is_shaped(leaves[number]):
            axes = (None,) * array.stacked + _rule_for(array, PARAMETER_RULES).axes
            leaves[number] = _constrain(leaves[number], axes, None)
    return jax.tree.unflatten(structure, leaves)


def map_batch(function: Callable[..., Array], *arrays: Array) -> Array:
    """Runs a function of arrays that begin with the batch on each device's part of it.

    So a kernel that the partitioner cannot divide runs on a mesh. Without one, under one with other
    axes, and for a batch that does not divide, the function is simply called.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = _present_axes(_BATCH_AXES, mesh)
    is_known = set(mesh.axis_names) <= set(_BATCH_AXES)
    if not (axes and is_known and _is_auto(mesh)) or arrays[0].shape[0] % _num_devices(axes, mesh):
        return function(*arrays)
    spec = PartitionSpec(axes)
    return jax.shard_map(function, in_specs=(spec,) * len(arrays), out_specs=spec, check_vma=False)(
        *arrays
    )


def _constrain(x: Array, axes: tuple[MeshAxes, ...], rest: Any) -> Array:
    """Shards the first axes of `x`; `rest` says of the others whether they may be sharded."""
    mesh = jax.sharding.get_abstract_mesh()
    if not _present_axes(_BATCH_AXES, mesh) or not _is_auto(mesh):
        return x
    # An array on a single device, outside of a compiled program, cannot be constrained.
    if not isinstance(x, Tracer) and not isinstance(x.sharding, NamedSharding):
        return x
    present = [_present_axes(entry, mesh) for entry in axes]
    # The partitioner decides where an axis is not divisible, such as a batch of one sequence.
    if any(x.shape[axis] % _num_devices(entry, mesh) for axis, entry in enumerate(present)):
        return x
    spec = [entry or None for entry in present] + [rest] * (x.ndim - len(present))
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))
