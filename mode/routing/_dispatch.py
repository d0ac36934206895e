"""Dispatch and combine: an index gather of tokens into slots, a scatter-add of results back.

Slots are *experts-major*, so that every expert computes the tokens of all groups in one matrix
product. The group axes are batch axes of the gather and are not folded into the index: a compiler
can then keep each group on its device.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from .._token_info import TokenInfo
from .._types import Hidden, SlotIndex, Slots
from ._record import Routing, check_routing


def dispatch(x: Hidden, routing: Routing) -> Slots:
    """Gathers the tokens of every slot from `x`, `[*groups, tokens, dim]`.

    **Returns:** `[experts, *groups, slots, dim]`, in time order; an empty slot is all zeros.
    """
    check_routing(routing)
    with jax.named_scope("mode.dispatch"):
        return _gather(x, routing.index)


def dispatch_info(info: TokenInfo, routing: Routing) -> TokenInfo:
    """Gathers `info` of every slot, `[experts, *groups, slots]`; an empty slot is padding."""
    check_routing(routing)
    return info.gather(lambda leaf: _gather(leaf[..., None], routing.index)[..., 0])


def combine(updates: Slots, routing: Routing, onto: Hidden) -> Hidden:
    r"""Adds the weighted updates of all slots to the tokens in them.

    $\text{onto}_i + \sum_{e, s : \text{index}_{es} = i} w_{es} u_{es}$, computed in the dtype of
    the weights and cast back once. Tokens without a slot are returned bit for bit.

    **Arguments:**

    - `updates`: `[experts, *groups, slots, dim]`, the outputs of the experts. The content of empty
        slots is never read, not even to be multiplied by 0.
    - `routing`: the token and the weight of each slot.
    - `onto`: `[*groups, tokens, dim]`: the residual stream, or zeros.

    **Returns:** an array like `onto`.

    >>> import jax, jax.numpy as jnp, mode
    >>> block, x = mode.PositionWise(jnp.tanh), jnp.ones((2, 6, 8))
    >>> hidden, (routing,) = mode.MixtureOfDepths(block, 8, capacity=0.5, key=jax.random.key(0))(x)
    >>> slots = mode.dispatch(x, routing)
    >>> slots.shape, bool(jnp.all(mode.combine(jnp.tanh(slots), routing, onto=x) == hidden))
    ((1, 2, 3, 8), True)
    """
    check_routing(routing)
    with jax.named_scope("mode.combine"):
        weight = jnp.moveaxis(routing.weight, -2, 0)[..., None]
        weighted = weight * updates.astype(weight.dtype)
        wide = onto.astype(weight.dtype)
        return _scatter_add(wide, weighted, routing.index).astype(onto.dtype)


def _gather(x: Hidden | Int[Array, "*groups tokens dim"], index: SlotIndex) -> Array:
    *groups, experts, slots = index.shape
    num_tokens, dim = x.shape[-2:]
    rows = jax.lax.gather(
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
    return rows.reshape(experts, *groups, slots, dim)


def _scatter_add(onto: Hidden, updates: Slots, index: SlotIndex) -> Hidden:
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


def _experts_major(index: SlotIndex) -> Int[Array, "experts flat_groups slots"]:
    """Transposes the index to `[experts, groups, slots]`, all group axes flattened into one."""
    experts, slots = index.shape[-2:]
    return jnp.swapaxes(index.reshape(-1, experts, slots), 0, 1)
