"""Forms of a routed layer, each made of a trained block: the same function at capacity 1."""

import dataclasses
from collections.abc import Callable
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from .._capacity import Capacity, exact_fraction
from ..nn import (
    Block,
    Expert,
    Layer,
    MixtureOfDepths,
    MixtureOfExperts,
    MixtureOfQueries,
    PositionWise,
    Residual,
    Sequential,
    TransformerBlock,
)
from ..routing import AbstractGate, AbstractSelector


@dataclasses.dataclass(frozen=True)
class FormOptions:
    """What a form may need. `convert` says what each is."""

    capacity: Capacity
    select: AbstractSelector
    gate: AbstractGate
    num_experts: int = 4
    num_noop: int = 1
    expert_capacity: Capacity = 1
    redrawn: float = 0.0


Form = Callable[[TransformerBlock, FormOptions, PRNGKeyArray], Layer]


def _parts(
    block: TransformerBlock,
    options: FormOptions,
    key: PRNGKeyArray,
    *,
    attention: bool = False,
    feedforward: bool = False,
) -> Layer:
    """Attention and feed-forward apart, either of them routed."""
    parts = zip(block.split(), (attention, feedforward), jax.random.split(key), strict=True)
    return Sequential(
        [
            _depths(block, part, options, part_key) if is_routed else Residual(part)
            for part, is_routed, part_key in parts
        ]
    )


def _queries(block: TransformerBlock, options: FormOptions, key: PRNGKeyArray) -> Layer:
    select, gate = options.select, options.gate
    return MixtureOfQueries(block, _dim(block), options.capacity, select=select, gate=gate, key=key)


def _staged(block: TransformerBlock, options: FormOptions, key: PRNGKeyArray) -> Layer:
    expert_key, router_key = jax.random.split(key)
    return _depths(block, _upcycled(block, options, 0, expert_key), options, router_key)


FORMS: dict[str, Form] = {
    # The whole block for some tokens; with keys and values of all.
    "mod": lambda block, options, key: _depths(block, block, options, key),
    "mod-queries": _queries,
    # The parts of a block.
    "mod-attention": partial(_parts, attention=True),
    "mod-feedforward": partial(_parts, feedforward=True),
    "mod-both": partial(_parts, attention=True, feedforward=True),
    # Experts, without and with no-ops, for all tokens; and inside a block for some tokens.
    "moe": lambda block, options, key: Residual(_upcycled(block, options, 0, key)),
    "mode-integrated": lambda block, options, key: Residual(
        _upcycled(block, options, options.num_noop, key)
    ),
    "mode-staged": _staged,
}


def _dim(block: TransformerBlock) -> int:
    return block.attention_norm.weight.shape[0]


def _depths(
    block: TransformerBlock, routed: Block, options: FormOptions, key: PRNGKeyArray
) -> MixtureOfDepths:
    return MixtureOfDepths(
        routed, _dim(block), options.capacity, select=options.select, gate=options.gate, key=key
    )


def _upcycled(
    block: TransformerBlock, options: FormOptions, num_noop: int, key: PRNGKeyArray
) -> TransformerBlock:
    """Returns the block with copies of its feed-forward as experts. arXiv:2212.05055."""
    feedforward = block.feedforward
    if not isinstance(feedforward, PositionWise):
        raise ValueError(
            "`layers` to make experts of must have a feed-forward of one token at a time, a "
            f"`PositionWise`, got {type(feedforward).__name__}."
        )
    expert = feedforward.function

    def make_expert(key: PRNGKeyArray) -> Expert:
        return redraw(expert, options.redrawn, key)

    experts = MixtureOfExperts(
        make_expert,
        _dim(block),
        options.num_experts,
        num_noop=num_noop,
        capacity_factor=options.num_experts * exact_fraction("capacity", options.expert_capacity),
        select=options.select,
        gate=options.gate,
        key=key,
    )
    return eqx.tree_at(lambda b: b.feedforward, block, experts)


def redraw(expert: Expert, fraction: float, key: PRNGKeyArray) -> Expert:
    """Draws a fraction of the features inside a feed-forward anew, with the mean and the deviation
    of each matrix. arXiv:2502.19261, section 3.1."""
    maps = {name: getattr(expert, name) for name in ("gate", "up", "down") if hasattr(expert, name)}
    if fraction == 0 or "down" not in maps:
        return expert
    hidden = maps["down"].weight.shape[0]
    choice_key, *keys = jax.random.split(key, 1 + len(maps))
    chosen = jax.random.permutation(choice_key, hidden) < round(fraction * hidden)
    for (name, linear), own_key in zip(maps.items(), keys, strict=True):
        weight = linear.weight
        drawn = jnp.mean(weight) + jnp.std(weight) * jax.random.normal(own_key, weight.shape)
        where = chosen[:, None] if name == "down" else chosen[None]
        new = jnp.where(where, drawn.astype(weight.dtype), weight)
        expert = eqx.tree_at(lambda e, name=name: getattr(e, name).weight, expert, new)
    return expert
