"""The layers of the arms, of a size and a key."""

from collections.abc import Callable, Sequence
from fractions import Fraction

import jax
from jaxtyping import PRNGKeyArray

import mode

from .options import Size


def dense_block(size: Size, key: PRNGKeyArray) -> mode.TransformerBlock:
    """The block of the dense arm, which all others route."""
    return mode.TransformerBlock(size.dim, size.heads, num_kv_heads=size.kv_heads, key=key)


def depths(
    size: Size,
    key: PRNGKeyArray,
    *,
    select: mode.AbstractSelector = mode.ExpertChoice(),
    gate: mode.AbstractGate = mode.AbsoluteGate(),
    weigh_values: bool = True,
    predictor: bool = False,
) -> mode.MixtureOfDepths:
    """A layer of Mixture-of-Depths around the dense arm's block."""
    block_key, router_key, predictor_key = jax.random.split(key, 3)
    return mode.MixtureOfDepths(
        dense_block(size, block_key),
        size.dim,
        size.capacity,
        select=select,
        gate=gate,
        weigh_values=weigh_values,
        predictor=mode.Predictor(size.dim, key=predictor_key) if predictor else None,
        key=router_key,
    )


def queries(
    size: Size, key: PRNGKeyArray, *, select: mode.AbstractSelector = mode.ExpertChoice()
) -> mode.MixtureOfQueries:
    """The dense arm's block, in which skipped tokens are keys."""
    block_key, router_key = jax.random.split(key)
    block = dense_block(size, block_key)
    return mode.MixtureOfQueries(block, size.dim, size.capacity, select=select, key=router_key)


def apart(size: Size, key: PRNGKeyArray, *, parts: Sequence[str]) -> mode.Sequential:
    """The dense arm's attention and feed-forward, of which `parts` are routed."""
    block_key, *router_keys = jax.random.split(key, 3)
    layers = []
    names = ("attention", "feedforward")
    for name, part, router_key in zip(
        names, dense_block(size, block_key).split(), router_keys, strict=True
    ):
        if name in parts:
            layers.append(mode.MixtureOfDepths(part, size.dim, size.capacity, key=router_key))
        else:
            layers.append(mode.Residual(part))
    return mode.Sequential(layers)


def round_count(size: Size) -> int:
    """Returns how many layers one block stands for: all but the first and the last."""
    if size.depth < 3:
        raise ValueError(
            "`size.depth` must be at least 3 for a loop or a recursion between the first and the "
            f"last layer, got {size.depth}."
        )
    return size.depth - 2


def loop(size: Size, key: PRNGKeyArray) -> mode.Loop:
    """The dense arm's block, for all layers but the first and the last."""
    return mode.Loop(dense_block(size, key), round_count(size))


def recursion(
    size: Size,
    key: PRNGKeyArray,
    *,
    select: mode.AbstractSelector = mode.ExpertChoice(),
    share_keys: bool = False,
    capacities: Sequence[mode.Capacity] = (),
) -> mode.Recursion:
    """Rounds of fewer and fewer tokens: by default, of four, all, three quarters, a half, a
    quarter."""
    block_key, router_key = jax.random.split(key)
    rounds = round_count(size)
    return mode.Recursion(
        dense_block(size, block_key),
        size.dim,
        capacities or [Fraction(rounds - number, rounds) for number in range(rounds)],
        select=select,
        share_keys=share_keys,
        key=router_key,
    )


def token_choice_recursion(size: Size, key: PRNGKeyArray) -> mode.TokenChoiceRecursion:
    """Up to as many rounds as the loop has, by the choice of each token."""
    block_key, router_key = jax.random.split(key)
    block = dense_block(size, block_key)
    return mode.TokenChoiceRecursion(block, size.dim, round_count(size), key=router_key)


def _expert(size: Size) -> Callable[[PRNGKeyArray], mode.SwiGLUFeedForward]:
    # The dense block's own feed-forward: an expert costs what the dense one does.
    return lambda key: mode.SwiGLUFeedForward(size.dim, key=key)


def with_experts(
    build: Callable[..., mode.Residual], size: Size, key: PRNGKeyArray, *, noop: bool = True
) -> mode.Residual:
    counts = (size.experts, size.noop) if noop else (size.experts + size.noop, 0)
    dims = (size.dim, size.heads, *counts)
    return build(_expert(size), *dims, num_kv_heads=size.kv_heads, key=key)


def free_experts(size: Size, key: PRNGKeyArray) -> mode.Residual:
    """Experts beside choices that cost nothing, at a target of real experts per token."""
    block_key, expert_key = jax.random.split(key)
    experts = mode.MixtureOfExperts(
        _expert(size),
        size.dim,
        size.experts,
        num_noop=size.noop,
        num_copy=1,
        num_constant=1,
        experts_per_token=0.75,
        select=mode.TokenChoice(2),
        key=expert_key,
    )
    block = mode.TransformerBlock(
        size.dim, size.heads, num_kv_heads=size.kv_heads, feedforward=experts, key=block_key
    )
    return mode.Residual(block)


def staged(size: Size, key: PRNGKeyArray) -> mode.MixtureOfDepths:
    """Mixture-of-Depths around a block with experts."""
    dims = (size.dim, size.heads, size.experts + size.noop)
    return mode.staged_mode_layer(
        _expert(size), *dims, capacity=size.capacity, num_kv_heads=size.kv_heads, key=key
    )
