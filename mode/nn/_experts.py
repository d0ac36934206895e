"""Feed-forwards, and how experts run: one module whose arrays have a leading axis of experts."""

from collections.abc import Callable
from fractions import Fraction

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from .._checks import can_be_called, check_kept_shape, takes_key, type_name
from .._linear import Linear
from .._types import Key, VectorMap
from ._adapters import map_rows
from ._buckets import bucket_sizes, run_bucketed


Expert = VectorMap
MakeExpert = Callable[[PRNGKeyArray], Expert]


class SwiGLUFeedForward(eqx.Module):
    """`(silu(x @ gate) * (x @ up)) @ down`, on the last axis. arXiv:2002.05202, equation 6.

    **Arguments:**

    - `dim`: features in and out.
    - `hidden`: features inside; by default 8/3 of `dim`, which has the parameters and the FLOPs of
        a `GELUFeedForward` four times as wide as `dim`.
    - `use_bias`: whether each map has a bias.
    """

    gate: Linear
    up: Linear
    down: Linear

    def __init__(
        self, dim: int, hidden: int | None = None, *, use_bias: bool = False, key: PRNGKeyArray
    ):
        hidden = 8 * dim // 3 if hidden is None else hidden
        gate_key, up_key, down_key = jax.random.split(key, 3)
        self.gate = Linear(dim, hidden, use_bias=use_bias, key=gate_key)
        self.up = Linear(dim, hidden, use_bias=use_bias, key=up_key)
        self.down = Linear(hidden, dim, use_bias=use_bias, key=down_key)

    def __call__(self, x: Float[Array, "*axes dim"]) -> Float[Array, "*axes dim"]:
        with jax.named_scope("mode.SwiGLUFeedForward"):
            return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class GELUFeedForward(eqx.Module):
    """`gelu(x @ up) @ down`, on the last axis, in the tanh form. arXiv:1606.08415.

    **Arguments:**

    - `dim`: features in and out.
    - `hidden`: features inside; by default 4 times `dim`.
    - `use_bias`: whether both maps have a bias.
    """

    up: Linear
    down: Linear

    def __init__(
        self, dim: int, hidden: int | None = None, *, use_bias: bool = False, key: PRNGKeyArray
    ):
        hidden = 4 * dim if hidden is None else hidden
        up_key, down_key = jax.random.split(key)
        self.up = Linear(dim, hidden, use_bias=use_bias, key=up_key)
        self.down = Linear(hidden, dim, use_bias=use_bias, key=down_key)

    def __call__(self, x: Float[Array, "*axes dim"]) -> Float[Array, "*axes dim"]:
        with jax.named_scope("mode.GELUFeedForward"):
            return self.down(jax.nn.gelu(self.up(x)))


def run_experts(
    experts: Expert, inputs: Float[Array, "*inputs dim"], key: Key, *, same_inputs: bool = False
) -> Float[Array, "*results dim"]:
    """Runs stacked experts, each on its own `[experts, *axes, dim]` or all on `[*axes, dim]`."""
    dim = inputs.shape[-1]
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
    """Runs each expert on about its filled slots: for decode steps, where most are empty."""
    rows = inputs.reshape(inputs.shape[0], -1, inputs.shape[-1])
    needed = jnp.moveaxis(filled, -2, 0).reshape(rows.shape[:2])
    sizes = bucket_sizes(rows.shape[1], capacity)
    arrays, rest = eqx.partition(experts, eqx.is_array)

    def run_one(e: Int[Array, ""]) -> Float[Array, "rows dim"]:
        def run(index: Int[Array, " size"] | None) -> Float[Array, "size dim"]:
            # Sliced inside the branch: where no slot is filled, no weights are read.
            expert = eqx.combine(jax.tree.map(lambda leaf: leaf[e], arrays), rest)
            some = rows[e] if index is None else rows[e][index]
            return map_rows(expert, some, None)

        return run_bucketed(run, needed[e], sizes)

    updates = jax.lax.map(run_one, jnp.arange(rows.shape[0], dtype=jnp.int32))
    return updates.reshape(inputs.shape)


def check_make_expert(make_expert: MakeExpert, dim: int) -> None:
    """Checks by shapes alone that `make_expert` builds a map of `[dim]` to `[dim]` from a key."""
    remedy = (
        f"Pass a function of a key, such as `lambda key: SwiGLUFeedForward({dim}, key=key)`, whose "
        f"result maps one vector, [{dim}], to one of the same size."
    )
    fault = None
    if any(map(eqx.is_array, jax.tree.leaves(make_expert))):
        fault = f"got an expert that is already built, {type_name(make_expert)}"
    elif not can_be_called(make_expert, None):
        fault = f"its only argument, got {type_name(make_expert)}, which cannot be called so"
    if fault:
        raise ValueError(f"`make_expert` must build one expert from a key, {fault}. {remedy}")
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
