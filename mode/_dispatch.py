"""Moving tokens into slots and results back: an index gather and a scatter-add.

Slots are *experts-major*, `[experts, *groups, capacity, dim]`, so that every expert sees the tokens
of all groups in one matrix product. The group axes are batch axes of the gather, not folded into
the index: a compiler can then keep each group where it lives.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ._info import TokenInfo
from ._routing import Routing


def dispatch(
    x: Float[Array, "*groups tokens dim"], routing: Routing
) -> Float[Array, "experts *groups capacity dim"]:
    """Gather the tokens of every slot; an empty slot is all zeros.

    **Arguments:**

    - `x`: `[*groups, tokens, dim]`.
    - `routing`: of the same groups and tokens.

    **Returns:** `[experts, *groups, capacity, dim]`, in time order along `capacity`.
    """
    with jax.named_scope("mode.dispatch"):
        return _gather(x, routing.index)


def dispatch_info(info: TokenInfo, routing: Routing) -> TokenInfo:
    """`info` of every slot, `[experts, *groups, capacity]`; an empty slot is padding."""
    return TokenInfo(
        _gather(info.positions[..., None], routing.index)[..., 0],
        _gather(info.segment_ids[..., None], routing.index)[..., 0],
    )


def combine(
    updates: Float[Array, "experts *groups capacity dim"],
    routing: Routing,
    onto: Float[Array, "*groups tokens dim"],
) -> Float[Array, "*groups tokens dim"]:
    """Add the weighted updates to the tokens they belong to.

    $\\text{onto}_i + \\sum_{e, c : \\text{index}_{ec} = i} w_{ec} u_{ec}$, computed in the
    dtype of the weights and cast back once. Tokens without a slot keep their bits.

    **Arguments:**

    - `updates`: `[experts, *groups, capacity, dim]`, what the experts returned. The content of
        empty slots is never read, not even to be multiplied by 0.
    - `routing`: which token each slot holds, and with what weight.
    - `onto`: `[*groups, tokens, dim]`: the residual stream, or zeros.
    """
    with jax.named_scope("mode.combine"):
        weight = jnp.moveaxis(routing.weight, -2, 0)[..., None]
        weighted = weight * updates.astype(weight.dtype)
        wide = onto.astype(weight.dtype)
        return _scatter_add(wide, weighted, routing.index).astype(onto.dtype)


def _gather(
    x: Float[Array, "*groups tokens dim"] | Int[Array, "*groups tokens dim"],
    index: Int[Array, "*groups experts capacity"],
) -> Array:
    *groups, experts, capacity = index.shape
    num_tokens, dim = x.shape[-2:]
    slots = jax.lax.gather(
        x.reshape(-1, num_tokens, dim),
        _experts_major(index)[..., None],
        jax.lax.GatherDimensionNumbers(
            offset_dims=(3,),
            collapsed_slice_dims=(1,),
            start_index_map=(1,),
            operand_batching_dims=(0,),
            start_indices_batching_dims=(1,),
        ),
        slice_sizes=(1, 1, dim),
        mode=jax.lax.GatherScatterMode.FILL_OR_DROP,
        fill_value=0,
    )
    return slots.reshape(experts, *groups, capacity, dim)


def _scatter_add(
    onto: Float[Array, "*groups tokens dim"],
    updates: Float[Array, "experts *groups capacity dim"],
    index: Int[Array, "*groups experts capacity"],
) -> Float[Array, "*groups tokens dim"]:
    num_tokens, dim = onto.shape[-2:]
    flat_index = _experts_major(index)
    total = jax.lax.scatter_add(
        onto.reshape(-1, num_tokens, dim),
        flat_index[..., None],
        updates.reshape(*flat_index.shape, dim),
        jax.lax.ScatterDimensionNumbers(
            update_window_dims=(3,),
            inserted_window_dims=(1,),
            scatter_dims_to_operand_dims=(1,),
            operand_batching_dims=(0,),
            scatter_indices_batching_dims=(1,),
        ),
        mode=jax.lax.GatherScatterMode.FILL_OR_DROP,
    )
    return total.reshape(onto.shape)


def _experts_major(
    index: Int[Array, "*groups experts capacity"],
) -> Int[Array, "experts flat_groups capacity"]:
    """The index as `[experts, groups, capacity]`, all group axes flattened into one."""
    experts, capacity = index.shape[-2:]
    return jnp.swapaxes(index.reshape(-1, experts, capacity), 0, 1)
