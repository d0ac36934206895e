"""Kinds of parameters, for optimizers that treat matrices and the rest apart."""

from typing import Literal

import jax
from jaxtyping import PyTree

from .._dtypes import is_shaped
from ._roles import ArrayRoles, array_roles


Kind = Literal["matrix", "vector", "embedding", "head", "router"]


def parameter_kinds(model: PyTree) -> PyTree[Kind | None]:
    """Returns the kind of each array of a model: what its number of axes does not tell.

    Layers that are scanned over are stacked, and so are experts: a norm's scale may have three
    axes, and a matrix has more than two. (Optax calls what can be called, and a model can be: give
    it trees by a function.)

    **Arguments:**

    - `model`: a model, its parameters alone, or their shapes; of an ensemble that `vmap` made, one
        of its models, as an axis in front of all others counts as one of the array.

    **Returns:** for every array `"embedding"`, `"head"` or `"router"` where that is its role, else
    `"matrix"`, whose last two axes are inputs and outputs (of `equinox.nn.Linear` outputs and
    inputs), or `"vector"`; `None` for all else.

    >>> import equinox as eqx, jax, mode, optax
    >>> model = mode.mod_transformer(256, 32, depth=4, num_heads=2, key=jax.random.key(0))
    >>> parameters = eqx.filter(model, mode.is_trainable(model))
    >>> def decayed(parameters):  # a function: it follows where `with_capacity` changes the model
    ...     return jax.tree.map(lambda kind: kind == "matrix", mode.parameter_kinds(parameters))
    >>> adamw = optax.adamw(1e-3, weight_decay=0.1, mask=decayed)
    >>> axes = optax.contrib.MuonDimensionNumbers(-2, -1)
    >>> def matrices(parameters):
    ...     kinds = mode.parameter_kinds(parameters)
    ...     return jax.tree.map(lambda kind: axes if kind == "matrix" else None, kinds)
    >>> muon = optax.contrib.muon(1e-3, muon_weight_dimension_numbers=matrices)
    >>> state = muon.init(parameters)
    """
    leaves, structure = jax.tree.flatten(model)
    kinds = [
        _kind(len(leaf.shape), array) if is_shaped(leaf) else None
        for leaf, array in zip(leaves, array_roles(model), strict=True)
    ]
    return jax.tree.unflatten(structure, kinds)


def _kind(axes: int, array: ArrayRoles) -> Kind:
    for role in ("router", "embedding", "head"):
        if role in array.roles:
            return role
    own = axes - array.stacked - array.roles.count("experts")
    return "matrix" if own >= 2 else "vector"
