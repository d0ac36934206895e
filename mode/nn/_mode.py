"""MoDE: combinations of the parts for depths and experts, by the names that the paper gives them.

*Source* of all: arXiv:2404.02258, section 4.3.
"""

from fractions import Fraction

import jax
from jaxtyping import PRNGKeyArray

from .._capacity import Capacity
from .._checks import check_count
from ..routing import AbsoluteGate, AbstractGate, AbstractSelector, ExpertChoice
from ._experts import MakeExpert
from ._layers import Residual
from ._mixture_of_depths import MixtureOfDepths
from ._mixture_of_experts import MixtureOfExperts
from ._transformer_block import TransformerBlock


def staged_mode_layer(
    make_expert: MakeExpert,
    dim: int,
    num_heads: int,
    num_experts: int,
    *,
    capacity: Capacity = 0.125,
    capacity_factor: Capacity = 1.0,
    num_kv_heads: int | None = None,
    select: AbstractSelector = ExpertChoice(),
    gate: AbstractGate = AbsoluteGate(),
    key: PRNGKeyArray,
) -> MixtureOfDepths:
    """Builds a staged MoDE layer: tokens skip the whole block, or go through it and to its experts.

    Skipped tokens reach neither attention nor the expert router, so each expert has
    `token_capacity(C, capacity_factor / num_experts)` slots for the $C$ selected tokens.

    **Arguments:** of `MixtureOfExperts` (`select` too: it is for the experts), `TransformerBlock`
    and `MixtureOfDepths` (`capacity`, `gate`).

    **Returns:** a layer; its routings are the depth's and the experts'.

    >>> import jax, jax.numpy as jnp, mode
    >>> make_expert = lambda key: mode.GELUFeedForward(32, key=key)
    >>> layer = mode.staged_mode_layer(make_expert, 32, 4, 4, capacity=0.5, key=jax.random.key(0))
    >>> _, (depth, experts) = layer(jnp.ones((2, 64, 32)))
    >>> depth.index.shape, experts.index.shape
    ((2, 1, 32), (2, 4, 8))
    """
    moe_key, block_key, router_key = jax.random.split(key, 3)
    experts = MixtureOfExperts(
        make_expert, dim, num_experts, capacity_factor=capacity_factor, select=select, key=moe_key
    )
    block = TransformerBlock(
        dim, num_heads, num_kv_heads=num_kv_heads, feedforward=experts, key=block_key
    )
    return MixtureOfDepths(block, dim, capacity, gate=gate, key=router_key)


def integrated_mode_layer(
    make_expert: MakeExpert,
    dim: int,
    num_heads: int,
    num_experts: int,
    num_noop: int,
    *,
    capacity_factor: Capacity | None = None,
    num_kv_heads: int | None = None,
    select: AbstractSelector = ExpertChoice(),
    key: PRNGKeyArray,
) -> Residual:
    """Builds an integrated MoDE layer: attention for all, and no-op experts among the experts.

    **Arguments:** of `MixtureOfExperts` and `TransformerBlock`. `capacity_factor` is by default
    `num_experts / (num_experts + num_noop)`: every choice stands for the same fraction of the
    tokens, and that of the no-ops is not computed.

    **Returns:** a layer with one routing.

    >>> import jax, jax.numpy as jnp, mode
    >>> make_expert = lambda key: mode.GELUFeedForward(32, key=key)
    >>> layer = mode.integrated_mode_layer(make_expert, 32, 4, 6, 2, key=jax.random.key(0))
    >>> _, (routing,) = layer(jnp.ones((2, 64, 32)))
    >>> routing.index.shape, routing.logits.shape
    ((2, 6, 8), (2, 64, 8))

    *Relative to the paper:* it names neither the number of no-ops nor the way of choosing; see
    `TokenChoice` and `ExpertChoice` for what a no-op is to each.
    """
    if capacity_factor is None:
        capacity_factor = _without_noop(num_experts, num_noop)
    moe_key, block_key = jax.random.split(key)
    experts = MixtureOfExperts(
        make_expert,
        dim,
        num_experts,
        capacity_factor=capacity_factor,
        num_noop=num_noop,
        select=select,
        key=moe_key,
    )
    block = TransformerBlock(
        dim, num_heads, num_kv_heads=num_kv_heads, feedforward=experts, key=block_key
    )
    return Residual(block)


def reduced_capacity_moe(
    make_expert: MakeExpert,
    dim: int,
    num_heads: int,
    num_experts: int,
    num_noop: int,
    *,
    num_kv_heads: int | None = None,
    select: AbstractSelector = ExpertChoice(),
    key: PRNGKeyArray,
) -> Residual:
    """Builds the control for `integrated_mode_layer`: its FLOPs by smaller expert capacity alone.

    A conventional Mixture-of-Experts with the slots of an integrated MoDE of `num_noop` no-op
    experts, but without the no-ops: tokens reach the residual by being dropped, not by choice.

    **Arguments** and **returns:** those of `integrated_mode_layer`.
    """
    return integrated_mode_layer(
        make_expert,
        dim,
        num_heads,
        num_experts,
        0,
        capacity_factor=_without_noop(num_experts, num_noop),
        num_kv_heads=num_kv_heads,
        select=select,
        key=key,
    )


def _without_noop(num_experts: int, num_noop: int) -> Fraction:
    """Returns the number of experts over the number of choices."""
    num_experts = check_count("num_experts", num_experts, 1)
    return Fraction(num_experts, num_experts + check_count("num_noop", num_noop, 0))
