"""Where arrays live on a mesh of devices: rules that a user can read, and what layers must move.

A mesh may have two axes that this library knows by name:

- `data`: the batch is divided over it, and so are parameters (fully sharded data parallelism);
- `expert`: experts are divided over it. So is the batch, or the devices along it would all do the
  work of the others' layers.

Everything else follows from where arguments lie: XLA's partitioner finds it. What it cannot know is
which of two things should move where they meet: slots travel to the experts, and not experts to the
slots; parameters are gathered for the batch, and not the batch for the parameters. These are said
here, in `to_experts`, `to_groups`, `gathered` and `along_batch`, which do nothing where no mesh is
set by `jax.set_mesh`.
"""

import dataclasses
import math
import re
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, PyTree

from ._precision import is_shaped


MeshAxes = str | tuple[str, ...] | None


@dataclasses.dataclass(frozen=True)
class Rule:
    """Which axes of an array are divided over which axes of a mesh.

    **Arguments:**

    - `pattern`: a regular expression, searched for in the path of an array, such as
        `.stacks[0].layers[1].block.feedforward.experts.up.weight`.
    - `axes`: for the array's axes from the first, the mesh axes that each is divided over; `None`
        for none, and for those not named. An array of a layer in a `Transformer` has an axis of
        repeats before these, which is never divided: a scan goes over it.
    - `spread`: mesh axes over which the longest of the other axes is divided, where it can be and
        where there are two or more to choose from: vectors stay whole.

    Axes that a mesh does not have count for nothing, so that one list of rules serves them all.
    """

    pattern: str
    axes: tuple[MeshAxes, ...] = ()
    spread: tuple[str, ...] = ()


_BATCH = ("data", "expert")
# Axes of an array that may be divided over mesh axes of the user's own.
_FREE = PartitionSpec.UNCONSTRAINED

# Routers are small, and whole on every device: no choice depends on how many there are.
PARAMETERS = (
    Rule(r"\.router\b"),
    Rule(r"\.experts\b", ("expert",), spread=("data",)),
    Rule(r"", spread=_BATCH),
)
BATCH = (Rule(r"", (_BATCH,)),)
DECODING = (Rule(r"\.caches\b", (None, _BATCH)), Rule(r"", (_BATCH,)))


def placement(
    tree: PyTree, mesh: Mesh | AbstractMesh, rules: tuple[Rule, ...] = PARAMETERS
) -> PyTree:
    """Where each array of a tree lies on a mesh.

    **Arguments:**

    - `tree`: a model, an optimizer's state, a batch, a `Decoding`; or their shapes.
    - `mesh`: of axes named `data`, `expert` or both, and of type `Auto`, which lets the compiler
        place what lies between the layers: `jax.make_mesh(sizes, names, axis_types=(Auto, ...))`.
        Inside a program, `jax.sharding.get_abstract_mesh()`.
    - `rules`: the first whose pattern is found decides. `PARAMETERS` is for models and optimizer
        states, `BATCH` for batches, `DECODING` for a `Decoding`; put your own before them.

    **Returns:** a tree with a `NamedSharding` for every array and `None` for everything else, as
    `equinox.filter_shard` takes it.

    **Raises:** `ValueError` for a mesh of explicit axes or of none that the rules name, an array
    that no rule is for, or an axis that does not divide.

    >>> import equinox, jax, mode
    >>> from jax.sharding import AxisType
    >>> mesh = jax.make_mesh((1, 1), ("data", "expert"), axis_types=(AxisType.Auto,) * 2)
    >>> model = mode.mod_decoder(256, 32, depth=4, num_heads=2, key=jax.random.key(0))
    >>> placement = mode.placement(model, mesh)
    >>> model = equinox.filter_shard(model, placement)
    >>> tuple(placement.embedding.spec)
    (('data', 'expert'),)

    *Source:* fully sharded parameters, arXiv:1910.02054; experts over devices, arXiv:2006.16668.
    """
    if not _is_auto(mesh):
        raise ValueError(
            f"`mesh` must have axes of type `Auto`, got {mesh.axis_types}. Pass "
            f"`axis_types=(jax.sharding.AxisType.Auto,) * {len(mesh.axis_names)}` to "
            "`jax.make_mesh`."
        )
    named = {axis for rule in rules for axes in (*rule.axes, rule.spread) for axis in _names(axes)}
    if mesh.axis_names and {*_BATCH, *named}.isdisjoint(mesh.axis_names):
        raise ValueError(
            "`mesh` must have an axis `data`, `expert` or one that `rules` name, got only "
            f"{' and '.join(map(str, mesh.axis_names))}: every device would hold everything. "
            "Rename it, or put rules of your own first."
        )

    def place(path: Any, leaf: Any) -> NamedSharding | None:
        if not is_shaped(leaf):
            return None
        name = jax.tree_util.keystr(path)
        return NamedSharding(mesh, _spec(name, leaf.shape, mesh, rules))

    return jax.tree.map_with_path(place, tree)


def _is_auto(mesh: Mesh | AbstractMesh) -> bool:
    return all(kind == AxisType.Auto for kind in mesh.axis_types)


def _spec(
    name: str, shape: tuple[int, ...], mesh: Mesh | AbstractMesh, rules: tuple[Rule, ...]
) -> PartitionSpec:
    rule = next((rule for rule in rules if re.search(rule.pattern, name)), None)
    if rule is None:
        raise ValueError(
            f"`rules` must be for every array, but none is for {name or 'the array itself'}. End "
            'with `Rule("")`, which leaves an array whole.'
        )
    first = 1 if ".stacks[" in name else 0
    spec: list[MeshAxes] = [None] * len(shape)
    for place, axes in zip(range(first, len(shape)), rule.axes, strict=False):
        known = _known(axes, mesh)
        if shape[place] % _size(known, mesh):
            raise ValueError(
                f"axis {place} of {name or 'the array'}, of {shape[place]}, must divide over the "
                f"{_size(known, mesh)} devices along {' and '.join(known)} of the mesh. Choose "
                "another mesh, or another size."
            )
        spec[place] = known or None
    free = [place for place in range(first, len(shape)) if spec[place] is None]
    if len(free) > 1:
        spread = _known(rule.spread, mesh)
        for axes in (spread[:count] for count in range(len(spread), 0, -1)):
            divisible = [place for place in free if shape[place] % _size(axes, mesh) == 0]
            if divisible:
                spec[max(divisible, key=lambda place: shape[place])] = axes
                break
    while spec and spec[-1] is None:
        spec.pop()
    return PartitionSpec(*spec)


def _known(axes: MeshAxes, mesh: Mesh | AbstractMesh) -> tuple[str, ...]:
    return tuple(axis for axis in _names(axes) if axis in mesh.axis_names)


def _names(axes: MeshAxes) -> tuple[str, ...]:
    return () if axes is None else (axes,) if isinstance(axes, str) else axes


def _size(axes: tuple[str, ...], mesh: Mesh | AbstractMesh) -> int:
    return math.prod(mesh.shape[axis] for axis in axes)


def to_experts(
    slots: Float[Array, "experts *groups capacity dim"],
) -> Float[Array, "experts *groups capacity dim"]:
    """Slots go to the devices of their experts, under a mesh with an axis `expert`.

    Each device has the slots that its groups filled, for all experts; after the exchange it has
    those of all groups along `expert`, for its own experts.
    """
    return _with_experts(_with_groups(slots))


def to_groups(
    updates: Float[Array, "experts *groups capacity dim"],
) -> Float[Array, "experts *groups capacity dim"]:
    """What the experts made of them goes back to the devices of the groups."""
    return _with_groups(_with_experts(updates))


# Both ends of an exchange are said, as gradients pass it from the other side.
def _with_experts(x: Array) -> Array:
    return _constrained(x, (("expert",), ("data",)), _FREE) if x.ndim > 3 else x


def _with_groups(x: Array) -> Array:
    return _constrained(x, ((), _BATCH), _FREE) if x.ndim > 3 else x


def along_batch(x: Float[Array, "*groups tokens dim"]) -> Float[Array, "*groups tokens dim"]:
    """Hidden states stay where their sequences are."""
    return _constrained(x, (_BATCH,), _FREE) if x.ndim > 2 else x


def gathered(parameters: PyTree) -> PyTree:
    """Parameters of the layers that are about to run, of experts only those of this device.

    Left alone under a mesh that has other axes: they are for something that is not known here.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not set(mesh.axis_names) <= set(_BATCH):
        return parameters

    def whole(path: Any, leaf: Array) -> Array:
        experts = re.search(PARAMETERS[1].pattern, jax.tree_util.keystr(path))
        return _constrained(leaf, (("expert",),) if experts else (), None)

    return jax.tree.map_with_path(whole, parameters)


def _constrained(x: Array, axes: tuple[tuple[str, ...], ...], rest: Any) -> Array:
    mesh = jax.sharding.get_abstract_mesh()
    if not set(mesh.axis_names) & set(_BATCH) or not _is_auto(mesh):
        return x
    known = [_known(some, mesh) for some in axes]
    # What does not divide, such as one member that is decoded, is left to the partitioner.
    if any(x.shape[place] % _size(some, mesh) for place, some in enumerate(known)):
        return x
    spec = [some or None for some in known] + [rest] * (x.ndim - len(known))
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))
