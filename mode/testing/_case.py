"""A model and its inputs, as every assertion takes them: checked, run, replaced by others."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray

from .._checks import can_be_called, type_name
from .._token_info import TokenInfo
from .._types import Key
from ..routing import Router, Routing, Routings, routers


Model = Callable[..., tuple[Array, Routings]]
Info = TokenInfo | None
Shaped = Array | jax.ShapeDtypeStruct


class Case:
    """A model, its inputs and a key, by default a fixed one. `shape` is `[*groups, tokens]`."""

    def __init__(self, model: Model, x: Shaped, info: Info, key: Key, *, shapes: bool = False):
        """Checks the arguments. Those of an assertion that runs nothing may be `shapes`."""
        if isinstance(model, type) or not can_be_called(model, None, None, key=None):
            raise ValueError(
                f"`model` must be called as `model(x, info, key=key)`, got {type_name(model)}, "
                "which cannot be called so. Let its `__call__` take `(self, x, info=None, *, "
                "key=None)`, or pass a function that does."
            )
        dtype = getattr(x, "dtype", None)
        self.has_ids = dtype is not None and jnp.issubdtype(dtype, jnp.integer)
        if dtype is None or not (self.has_ids or jnp.issubdtype(dtype, jnp.floating)):
            raise ValueError(
                "`x` must be an array of hidden states, [*groups, tokens, dim], or of token ids, "
                f"[*groups, tokens], got {type_name(x) if dtype is None else f'the dtype {dtype}'}."
            )
        self.model, self.info = model, info
        self.x: Any = x
        self.key = jax.random.key(0) if key is None else key
        self.shape: tuple[int, ...] = x.shape if self.has_ids else x.shape[:-1]
        if not self.shape or 0 in self.shape:
            raise ValueError(
                "`x` must have the axes [*groups, tokens, dim], or [*groups, tokens] for token "
                f"ids, and at least one token, got shape {x.shape}."
            )
        if not isinstance(info, Info):
            raise ValueError(
                f"`info` must be a `TokenInfo` or None, got {type_name(info)}. `TokenInfo.packed` "
                "makes one from segment ids."
            )
        if info is not None and info.positions.shape != self.shape:
            raise ValueError(
                f"`info` must have the shape [*groups, tokens] of `x`, {self.shape}, got "
                f"{info.positions.shape}."
            )
        leaves = jax.tree.leaves((x, info))
        if not shapes and any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves):
            raise ValueError(
                "`x` and `info` must be arrays for an assertion that runs the model, got "
                "`jax.ShapeDtypeStruct`. Only `assert_static_shapes` takes shapes."
            )

    def run(self, x: Array | None = None) -> tuple[Array, Routings]:
        """Runs the model, compiled, with its own inputs or with others."""
        return _run(self.model, self.x if x is None else x, self.info, self.key)

    def valid(self) -> np.ndarray:
        """Returns which tokens, `[*groups, tokens]`, are not padding; at least one must be."""
        valid = np.ones(self.shape, bool) if self.info is None else np.asarray(self.info.valid)
        if not valid.any():
            raise ValueError("`info` must have tokens that are not padding, got segment 0 alone.")
        return valid

    def other_inputs(self, draw: int = 1) -> Array:
        """Draws others at every token: Gaussian hidden states, or token ids among those given."""
        x, key = self.x, jax.random.fold_in(self.key, draw)
        if not self.has_ids:
            size = jnp.sqrt(jnp.mean(jnp.square(x.astype(jnp.float32))))
            size = jnp.where(size > 0, size, 1).astype(x.dtype)
            return size * jax.random.normal(key, x.shape, x.dtype)
        # The size of the vocabulary is not known.
        ids, rank = np.unique(np.asarray(x), return_inverse=True)
        if len(ids) < 2:
            raise ValueError(
                "`x` must have at least two different token ids, so that tokens can be replaced by "
                f"others, got only {ids[0]}. Draw them with `jax.random.randint`."
            )
        step = jax.random.randint(key, x.shape, 1, len(ids))
        return jnp.asarray(ids)[(rank.reshape(x.shape) + step) % len(ids)].astype(x.dtype)

    def pair_routers(self, routings: Routings) -> list[tuple[Router, Routing]]:
        """Pairs each router with its routing; both are in the order of the model."""
        of_model = routers(self.model)
        if len(of_model) != len(routings):
            raise AssertionError(
                f"the model has {len(of_model)} routers, but returned {len(routings)} routings."
            )
        return list(zip(of_model, routings, strict=True))


def call_model(model: Model, x: Array, info: Info, key: PRNGKeyArray) -> tuple[Array, Routings]:
    """Calls a model and checks the kind of what it returns."""
    result = model(x, info, key=key)
    is_pair = isinstance(result, tuple) and len(result) == 2 and eqx.is_array(result[0])
    routings = result[1] if is_pair else None
    if not (isinstance(routings, tuple) and all(isinstance(r, Routing) for r in routings)):
        raise ValueError(
            "`model` must return (output, routings), an array with a tuple of `Routing`, one for "
            f"each router, got {_kind(routings if is_pair else result)} from {type_name(model)}. "
            "Add up the tuples that its layers return; without a router, return `()`."
        )
    return result


_run = eqx.filter_jit(call_model)


def _kind(value: Any) -> str:
    if isinstance(value, tuple | list):
        return f"{type(value).__name__} ({', '.join(type(part).__name__ for part in value)})"
    return type_name(value)
