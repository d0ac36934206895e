"""Parameters in another dtype, for a model that is not trained any more."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import PyTree

from .._dtypes import Module, cast_floating
from ..parallel import array_roles


def cast_parameters(model: Module, dtype: DTypeLike) -> Module:
    """Returns the model with its parameters in a dtype, but for those of routers.

    In bfloat16 a decode step reads half of the bytes, and computes what it did if activations are
    bfloat16: layers cast parameters to the dtype of the activations at each use. Routers compute in
    float32, and which tokens they select would change with their parameters; their state counts
    steps, and moves by less than bfloat16 can hold.

    Do not train such a model: most updates of an optimizer are smaller than what bfloat16 rounds
    to. Float32 parameters and bfloat16 activations, `Transformer(dtype=jnp.bfloat16)`, are the
    master weights and their cast copy that mixed-precision training consists of.

    **Arguments:**

    - `model`: a model or a part of one; or its shapes.
    - `dtype`: a floating dtype.

    **Raises:** `ValueError` for a dtype that is not floating.

    >>> import jax, jax.numpy as jnp, mode
    >>> make = lambda: mode.mod_transformer(
    ...     256, 32, depth=4, num_heads=2, dtype=jnp.bfloat16, key=jax.random.key(0)
    ... )
    >>> model = mode.cast_parameters(make(), jnp.bfloat16)
    >>> model.embedding.dtype.name, mode.routers(model)[0].scorer.weight.dtype.name
    ('bfloat16', 'float32')

    *Source:* master weights, arXiv:1710.03740, section 3.1; routers in float32, arXiv:2101.03961,
    section 2.4.
    """
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"`dtype` must be a floating dtype, got {dtype!r}.")
    leaves, structure = jax.tree.flatten(model)
    cast: list[PyTree] = [
        leaf if "router" in array.roles else cast_floating(leaf, dtype)
        for leaf, array in zip(leaves, array_roles(model), strict=True)
    ]
    return jax.tree.unflatten(structure, cast)
