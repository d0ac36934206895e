"""Arrays by their kind: which dtype to compute in, parameters cast to it, shapes for arrays."""

from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


Module = TypeVar("Module")


def float32_or_wider(dtype: DTypeLike) -> jnp.dtype:
    """`dtype`, or float32 where it is narrower: what routers, softmaxes and losses compute in.

    Not `jnp.promote_types`, which refuses two dtypes under strict promotion.
    """
    return jnp.dtype(dtype if jnp.finfo(dtype).bits >= 32 else jnp.float32)


def is_shaped(leaf: Any) -> bool:
    """Whether a leaf is an array, or the shape of one: what programs are traced with."""
    return eqx.is_array(leaf) or isinstance(leaf, jax.ShapeDtypeStruct)


def cast_parameters(module: Module, dtype: DTypeLike) -> Module:
    """A copy of `module` whose floating parameters have `dtype`: for code that does not cast."""
    return jax.tree.map(lambda p: p.astype(dtype) if eqx.is_inexact_array(p) else p, module)
