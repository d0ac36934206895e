"""Stacked experts: one module whose arrays have a leading axis of experts, and how it is run."""

from collections.abc import Callable
from fractions import Fraction

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from .._checks import can_be_called, check_kept_shape, takes_key, type_name
from .._dtypes import cast_parameters
from .._types import Key, Vector
from ._adapters import map_rows
from ._buckets import bucket_sizes, run_bucketed


Expert = Callable[[Vector], Vector]
MakeExpert = Callable[[PRNGKeyArray], Expert]


def run_experts(
    experts: Expert, inputs: Float[Array, "*inputs dim"], key: Key, *, same_inputs: bool = False
) -> Float[Array, "*results dim"]:
    """Runs every expert on its own inputs, or all of them on the same ones.

    **Arguments:**

    - `experts`: the stacked experts.
    - `inputs`: `[experts, *axes, dim]`; with `same_inputs`, `[*axes, dim]`.
    - `key`: split over experts and rows, for experts that take one.

    **Returns:** `[experts, *axes, dim]`.
    """
    dim = inputs.shape[-1]
    experts = cast_parameters(experts, inputs.dtype)
    if same_inputs:
        counts = (leaf.shape[0] for leaf in jax.tree.leaves(experts) if eqx.is_array(leaf))
        rows, axis, count = inputs.reshape(-1, dim), None, next(counts, 1)
    else:
        count, axis = inputs.shape[0], 0
        rows = inputs.reshape(count, -1, dim)
    keys = None if key is None else jax.random.split(key, count)
    run = eqx.filter_vmap(map_rows, in_axes=(eqx.if_array(0), axis, None if keys is None else 0))
    updates = run(experts, rows, keys)
    return updates.reshape(count, *inputs.shape[0 if same_inputs else 1 :])


def run_experts_bucketed(
    experts: Expert,
    inputs: Float[Array, "experts batch slots dim"],
    filled: Bool[Array, "batch experts slots"],
    capacity: Fraction,
) -> Float[Array, "experts batch slots dim"]:
    """Runs each expert on about its filled slots, one expert after the other.

    An expert without any reads no weights. For decode steps, in which most slots are empty.
    """
    rows = inputs.reshape(inputs.shape[0], -1, inputs.shape[-1])
    needed = jnp.moveaxis(filled, -2, 0).reshape(rows.shape[:2])
    sizes = bucket_sizes(rows.shape[1], capacity)
    arrays, rest = eqx.partition(experts, eqx.is_array)

    def run_one(e: Int[Array, ""]) -> Float[Array, "rows dim"]:
        def run(index: Int[Array, " size"] | None) -> Float[Array, "size dim"]:
            # Sliced inside the branch: where no slot is filled, no weights are read.
            expert = eqx.combine(jax.tree.map(lambda leaf: leaf[e], arrays), rest)
            some = rows[e] if index is None else rows[e][index]
            return map_rows(cast_parameters(expert, rows.dtype), some, None)

        return run_bucketed(run, needed[e], sizes)

    updates = jax.lax.map(run_one, jnp.arange(rows.shape[0], dtype=jnp.int32))
    return updates.reshape(inputs.shape)


def check_make_expert(make_expert: MakeExpert, dim: int) -> None:
    """Builds one expert and runs it on one vector, both without computing anything.

    **Raises:** `ValueError` for what does not build maps of `[dim]` to `[dim]` from a key.
    """
    remedy = (
        f"Pass a function of a key, such as `lambda key: SwiGLUFeedForward({dim}, key=key)`, whose "
        f"result maps one vector, [{dim}], to one of the same size."
    )
    if not can_be_called(make_expert, None):
        raise ValueError(
            "`make_expert` must build one expert from a key, its only argument, got "
            f"{type_name(make_expert)}, which cannot be called so. {remedy}"
        )
    if any(map(eqx.is_array, jax.tree.leaves(make_expert))):
        raise ValueError(
            "`make_expert` must build one expert from a key, got an expert that is already built, "
            f"{type_name(make_expert)}. {remedy}"
        )
    expert = eqx.filter_eval_shape(make_expert, jax.random.key(0))
    if not callable(expert):
        raise ValueError(
            f"`make_expert` must return a function of one vector, got {type_name(expert)}. {remedy}"
        )
    vector = jax.ShapeDtypeStruct((dim,), jnp.float32)
    options = {"key": jax.random.key(0)} if takes_key(expert) else {}
    try:
        update = eqx.filter_eval_shape(lambda expert, x: expert(x, **options), expert, vector)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"`make_expert` must build experts of vectors of `dim={dim}` features, but its expert, "
            f"{type_name(expert)}, did not take one: {error}. {remedy}"
        ) from error
    check_kept_shape("make_expert", getattr(update, "shape", ()), vector.shape)
