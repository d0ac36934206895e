"""What was computed while decoding: read off the caches, which hold what entered a layer."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ._cache import Cache, Decoding
from ._decode_checks import check_alive, check_model
from ._decoder import Transformer
from ._depth import MixtureOfDepths
from ._experts import Membership
from ._router import Router
from ._state import routers


class Entered(eqx.Module):
    """What one router let in while decoding, prompt included.

    **Attributes:**

    - `count`: `[*layers, batch, max_tokens]`, how many of the router's choices computed the token
        at each position: 0 or 1 for a depth, 0 to all experts for experts.
    - `share`: `[*layers, batch]`, tokens that entered per token that came; for experts, the experts
        a token entered, on average.
    - `trained`: the share it was trained with.
    - `refused`: `[*layers, batch]`, tokens that asked and found the layer's slots full; for
        experts, so often.
    """

    count: Int[Array, "*layers batch max_tokens"]
    share: Float[Array, "*layers batch"]
    trained: float = eqx.field(static=True)
    refused: Int[Array, "*layers batch"]


def entered(model: Transformer, decoding: Decoding) -> list[Entered]:
    """What was computed, one record per router, in the order of `routers(model)`.

    >>> import jax, jax.numpy as jnp, mode
    >>> model = mode.causal(mode.mod_decoder(256, 32, depth=4, num_heads=2, key=jax.random.key(0)))
    >>> decoding = mode.prefill(model, jnp.zeros((2, 8), int), max_tokens=32)
    >>> (found,) = mode.entered(model, decoding)
    >>> found.count.shape, found.share.shape, found.trained  # two routed layers, two members
    ((2, 2, 32), (2, 2), 0.125)
    """
    check_model(model)
    check_alive(decoding)
    if len(model.stacks) != len(decoding.caches):
        raise ValueError(
            f"`decoding` must have been made with `model`: it has caches of {len(decoding.caches)} "
            f"stacks, and the model has {len(model.stacks)}."
        )
    found: list[Entered] = []
    for stack, caches in zip(model.stacks, decoding.caches, strict=True):
        for layer, cache in zip(stack.layers, caches, strict=True):
            own = routers(layer)
            if isinstance(layer, MixtureOfDepths):
                came = jnp.broadcast_to(decoding.length, cache.length.shape)
                count = _at_positions(
                    cache, cache.info.valid.astype(jnp.int32), decoding.max_tokens
                )
                found.append(_record(own.pop(0), count, came, cache.refused))
            found += _experts_entered(own, cache, decoding.max_tokens)
    return found


def _experts_entered(own: list[Router], cache: Cache, max_tokens: int) -> list[Entered]:
    nodes = jax.tree.leaves(cache.left, is_leaf=lambda node: isinstance(node, Membership))
    memberships = [node for node in nodes if isinstance(node, Membership)]
    records = []
    for router, node in zip(own, memberships, strict=True):
        taken = node.taken & cache.info.valid[..., None]
        count = _at_positions(cache, jnp.sum(taken, axis=-1), max_tokens)
        refused = node.refused & cache.info.valid[..., None]
        total = jnp.sum(refused, axis=(-1, -2), dtype=jnp.int32)
        records.append(_record(router, count, cache.length, total))
    return records


def _at_positions(
    cache: Cache, count: Int[Array, "*layers batch slots"], max_tokens: int
) -> Int[Array, "*layers batch max_tokens"]:
    """Numbers of the tokens in a cache, where the tokens stood."""
    members = jnp.indices(cache.length.shape, sparse=True)
    rows = (jnp.broadcast_to(axis[..., None], cache.info.positions.shape) for axis in members)
    index = (*rows, cache.info.positions)
    empty = jnp.zeros((*cache.length.shape, max_tokens), jnp.int32)
    # Empty slots have position 0 and the number 0: adding it changes nothing.
    return empty.at[index].add(count.astype(jnp.int32))


def _record(
    router: Router,
    count: Int[Array, "*layers batch max_tokens"],
    came: Int[Array, "*layers batch"],
    refused: Int[Array, "*layers batch"],
) -> Entered:
    share = jnp.sum(count, axis=-1) / jnp.maximum(came, 1)
    return Entered(count, share, float(router.fraction * router.num_experts), refused)
