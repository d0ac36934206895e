"""MoDE, depths and experts combined, as constructions with the names the paper gives them.

Each is a few lines of the parts; they are here to be found and read, not because the parts need
them.
"""

from fractions import Fraction

import jax
from jaxtyping import PRNGKeyArray

from ._block import Residual
from ._capacity import Share, check_count
from ._depth import MixtureOfDepths
from ._experts import MakeExpert, MixtureOfExperts
from ._gate import AbstractGate, Raw
from ._select import AbstractSelector, ExpertChoice
from ._transformer import TransformerBlock


def staged_mode(
    make_expert: MakeExpert,
    dim: int,
    num_heads: int,
    num_experts: int,
    *,
    capacity: Share = 0.125,
    capacity_factor: Share = 1.0,
    num_kv_heads: int | None = None,
    select: AbstractSelector = ExpertChoice(),
    gate: AbstractGate = Raw(),
    position_bins: int = 1,
    key: PRNGKeyArray,
) -> MixtureOfDepths:
    """Staged MoDE: a token goes to or around the block first, then, inside it, to experts.

    `MixtureOfDepths` around a `TransformerBlock` whose feed-forward is a `MixtureOfExperts`.
    Skipped tokens touch neither attention nor the expert router, so each expert has
    `token_capacity(C, capacity_factor / num_experts)` slots of the $C$ tokens that stay.

    **Arguments:**

    - `make_expert`, `dim`, `num_experts`, `capacity_factor`: of `MixtureOfExperts`; `select` too,
        for the experts.
    - `num_heads`, `num_kv_heads`: of `TransformerBlock`.
    - `capacity`, `gate`: of `MixtureOfDepths`.
    - `position_bins`: of both routers.

    **Returns:** a layer; its routings are the depth's and the experts'.

    >>> import jax, jax.numpy as jnp, mode
    >>> make_expert = lambda key: mode.GELU(32, key=key)
    >>> layer = mode.staged_mode(make_expert, 32, 4, 4, capacity=0.5, key=jax.random.key(0))
    >>> _, (depth, experts) = layer(jnp.ones((2, 64, 32)))
    >>> depth.index.shape, experts.index.shape
    ((2, 1, 32), (2, 4, 8))

    *Source:* arXiv:2404.02258, section 4.3.
    """
    expert_key, block_key, router_key = jax.random.split(key, 3)
    experts = MixtureOfExperts(
        make_expert,
        dim,
        num_experts,
        capacity_factor=capacity_factor,
        select=select,
        position_bins=position_bins,
        key=expert_key,
    )
    block = TransformerBlock(
        dim, num_heads, num_kv_heads=num_kv_heads, feedforward=experts, key=block_key
    )
    return MixtureOfDepths(
        block, dim, capacity, gate=gate, position_bins=position_bins, key=router_key
    )


def integrated_mode(
    make_expert: MakeExpert,
    dim: int,
    num_heads: int,
    num_experts: int,
    num_noop: int,
    *,
    capacity_factor: Share | None = None,
    num_kv_heads: int | None = None,
    select: AbstractSelector = ExpertChoice(),
    position_bins: int = 1,
    key: PRNGKeyArray,
) -> Residual:
    """Integrated MoDE: attention for all, and no-op experts among the experts.

    **Arguments:**

    - `make_expert`, `dim`, `num_experts`, `num_noop`, `select`, `position_bins`: of
        `MixtureOfExperts`.
    - `num_heads`, `num_kv_heads`: of `TransformerBlock`.
    - `capacity_factor`: slots of the experts per token. By default
        `num_experts / (num_experts + num_noop)`: every choice has the same share of the tokens, and
        that of the no-ops is not computed.

    **Returns:** a layer with one routing.

    >>> import jax, jax.numpy as jnp, mode
    >>> make_expert = lambda key: mode.GELU(32, key=key)
    >>> layer = mode.integrated_mode(make_expert, 32, 4, 6, 2, key=jax.random.key(0))
    >>> _, (routing,) = layer(jnp.ones((2, 64, 32)))
    >>> routing.index.shape, routing.logits.shape
    ((2, 6, 8), (2, 64, 8))

    *Source:* arXiv:2404.02258, section 4.3. *Relative to the paper:* it names neither the number of
    no-ops nor the way of choosing; see `TokenChoice` and `ExpertChoice` for what a no-op is to
    each.
    """
    if capacity_factor is None:
        capacity_factor = _without_noop(num_experts, num_noop)
    expert_key, block_key = jax.random.split(key)
    experts = MixtureOfExperts(
        make_expert,
        dim,
        num_experts,
        capacity_factor=capacity_factor,
        num_noop=num_noop,
        select=select,
        position_bins=position_bins,
        key=expert_key,
    )
    return Residual(
        TransformerBlock(
            dim, num_heads, num_kv_heads=num_kv_heads, feedforward=experts, key=block_key
        )
    )


def reduced_capacity_moe(
    make_expert: MakeExpert,
    dim: int,
    num_heads: int,
    num_experts: int,
    num_noop: int,
    *,
    num_kv_heads: int | None = None,
    select: AbstractSelector = ExpertChoice(),
    position_bins: int = 1,
    key: PRNGKeyArray,
) -> Residual:
    """The control for `integrated_mode`: its FLOPs, reached by smaller experts' capacity alone.

    A conventional Mixture-of-Experts with the slots of an integrated MoDE of `num_noop` no-op
    experts, but without the no-ops: tokens reach the residual by being dropped, not by choice.

    **Arguments:** those of `integrated_mode`.

    **Returns:** a layer with one routing.

    >>> import jax, jax.numpy as jnp, mode
    >>> make_expert = lambda key: mode.GELU(32, key=key)
    >>> layer = mode.reduced_capacity_moe(make_expert, 32, 4, 6, 2, key=jax.random.key(0))
    >>> _, (routing,) = layer(jnp.ones((2, 64, 32)))
    >>> routing.index.shape, routing.logits.shape
    ((2, 6, 8), (2, 64, 6))

    *Source:* arXiv:2404.02258, section 4.3.
    """
    return integrated_mode(
        make_expert,
        dim,
        num_heads,
        num_experts,
        0,
        capacity_factor=_without_noop(num_experts, num_noop),
        num_kv_heads=num_kv_heads,
        select=select,
        position_bins=position_bins,
        key=key,
    )


def _without_noop(num_experts: int, num_noop: int) -> Fraction:
    """The experts' share of all choices."""
    num_experts = check_count("num_experts", num_experts, 1)
    return Fraction(num_experts, num_experts + check_count("num_noop", num_noop, 0))
