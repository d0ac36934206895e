"""The dtype to compute in, the cast of parameters to it, and the test for array leaves."""

from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


Module = TypeVar("Module")


def float32_or_wider(dtype: DTypeLike) -> jnp.dtype:
    """Returns `dtype`, or float32 if it is narrower: the dtype of routers, softmaxes and losses."""
    # Not `jnp.promote_types`, which raises under strict promotion.
    return jnp.dtype(dtype if jnp.finfo(dtype).bits >= 32 else jnp.float32)


def is_shaped(leaf: Any) -> bool:
    """Whether a leaf is an array or a `jax.ShapeDtypeStruct`, which stands for one in a trace."""
    return eqx.is_array(leaf) or isinstance(leaf, jax.ShapeDtypeStruct)


def cast_floating(module: Module, dtype: DTypeLike) -> Module:
    """Copies `module`, or its shapes, with floating parameters in `dtype`."""

    def cast(leaf: Any) -> Any:
        if not (is_shaped(leaf) and jnp.issubdtype(leaf.dtype, jnp.inexact)):
            return leaf
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(leaf.shape, dtype)
        return leaf.astype(dtype)

    return jax.tree.map(cast, module)
