"""Roles of arrays: modules say which part their arrays play, whatever the fields are called."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import equinox as eqx
from jax.tree_util import keystr, tree_flatten_with_path
from jaxtyping import PyTree


_ROLES, _STACKED = "mode.roles", "mode.stacked"


def role_field(role: str, *, stacked: bool = False, **kwargs: Any) -> Any:
    """Declares a field of a module whose arrays play a role, such as `"experts"`.

    A `ShardingRule` is for a role, so that a renamed field changes nothing. An array plays the
    roles of all fields on its path.

    **Arguments:**

    - `role`: of every array under the field. This library has `layers`, `router`, `experts`,
        `embedding`, `head`, `attention`, `feedforward` and `caches`; add your own.
    - `stacked`: whether these arrays have one more leading axis, of layers, that a scan goes over.
        It is never sharded.
    - `kwargs`: as `equinox.field` takes them. `ValueError` for a static field: it has no arrays.

    >>> import equinox as eqx, jax.numpy as jnp, mode
    >>> class Lookup(eqx.Module):
    ...     table: jnp.ndarray = mode.role_field("embedding")
    """
    if not (isinstance(role, str) and role):
        raise ValueError(f'`role` must be a name, such as `"experts"`, got {role!r}.')
    if kwargs.get("static", False):
        raise ValueError(
            f"`role_field` must be for a field with arrays, got `static=True` for the role {role}. "
            "Use `equinox.field` for a static field."
        )
    metadata = {**kwargs.pop("metadata", {}), _ROLES: (role,), _STACKED: int(stacked)}
    return eqx.field(metadata=metadata, **kwargs)


class ArrayRoles(NamedTuple):
    """The roles of an array, from the root; its number of axes of layers; its path, for errors."""

    roles: tuple[str, ...] = ()
    stacked: int = 0
    path: str = ""


def array_roles(tree: PyTree) -> list[ArrayRoles]:
    """Returns the roles of every leaf of a tree, in the order of `jax.tree.leaves`.

    The tree may be a model, a part of one, a model with `None` or shapes for some of its arrays, or
    an optimizer's state, which has trees of the structure of the model inside.
    """
    return list(_walk(tree, ArrayRoles()))


def _walk(node: Any, above: ArrayRoles) -> Iterator[ArrayRoles]:
    """Goes down one level at a time, which serves every kind of node that JAX knows."""
    fields = getattr(type(node), "__dataclass_fields__", {})
    for path, child in tree_flatten_with_path(node, is_leaf=lambda child: child is not node)[0]:
        if not path:
            yield above
            continue
        field = fields.get(getattr(path[0], "name", None))
        metadata = {} if field is None else field.metadata
        roles = above.roles + metadata.get(_ROLES, ())
        stacked = above.stacked + metadata.get(_STACKED, 0)
        yield from _walk(child, ArrayRoles(roles, stacked, above.path + keystr(path)))
