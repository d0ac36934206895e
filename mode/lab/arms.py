"""The arms of the ablation: what each one routes, and by which rule it may be sampled from.

All arms share dimensions, depth, data and recipe; a routed layer stands in every other place, over
a dense one. They differ in the routed layer and in nothing else, but for the number of steps, which
`budget` sets so that all spend equal training FLOPs.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

import mode

from .data import VOCAB


MakeLayer = Callable[[PRNGKeyArray], Callable]


@dataclasses.dataclass(frozen=True)
class Size:
    """Dimensions that all arms share."""

    dim: int = 64
    """Features of the hidden states."""
    depth: int = 6
    """Layers; every other one is routed."""
    heads: int = 4
    """Attention heads."""
    length: int = 128
    """Tokens in one sequence, the group whose tokens compete for slots."""
    batch: int = 8
    """Sequences in one step."""
    capacity: float = 0.125
    """Share of a sequence's tokens that a Mixture-of-Depths layer takes."""
    experts: int = 6
    """Experts of the arms that have no-ops or go without; the others have `experts + noop`."""
    noop: int = 2
    """No-op experts of integrated MoDE."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the activations; parameters, routers and the optimizer are float32 either way."""
    vocab: int = VOCAB
    """Token ids; 257 are used: the bytes and the start of a document."""
    kv_heads: int | None = None
    """Key-value heads, each of which serves as many attention heads; by default `heads`."""
    remat: bool = False
    """Whether the backward pass computes activations again, two layers at a time, instead of
    keeping them."""


@dataclasses.dataclass(frozen=True)
class Arm:
    """One model of the ablation.

    **Attributes:**

    - `name`, `description`: for tables and files.
    - `routed`: builds the routed layer of a size from a key; `None` for a dense model.
    - `every`: the period of the routed layers; 2 is every other one, over a dense one.
    - `rule`: what decides membership when the model runs causally; `None` where the training
        selection is causal as it is.
    - `under_rule`: the last share of training that runs under `rule`, with the slots it had.
    - `quantile_rate`: at which running quantiles move.
    - `auxiliary`: added to the loss, from the routings of a step.
    - `samples`: whether tokens can be chosen one by one, so that text can be sampled.
    """

    name: str
    description: str
    routed: Callable[[Size, PRNGKeyArray], Callable] | None = None
    every: int = 2
    rule: mode.AbstractRule | None = None
    under_rule: float = 0.0
    quantile_rate: float = 0.03
    auxiliary: Callable[[tuple[mode.Routing, ...]], Float[Array, ""]] | None = None
    samples: bool = True

    def build(self, size: Size, *, key: PRNGKeyArray) -> mode.Transformer:
        """The model, with fresh parameters.

        **Raises:** `ValueError` for fewer token ids than bytes need, and as the layers do.
        """
        if size.vocab < VOCAB:
            raise ValueError(
                f"`vocab` must be at least {VOCAB}, the bytes and the start of a document, got "
                f"{size.vocab}."
            )
        routed = self.routed

        def dense(key: PRNGKeyArray) -> mode.Residual:
            return mode.Residual(_block(size, key))

        def layer(key: PRNGKeyArray) -> Callable:
            return dense(key) if routed is None else routed(size, key)

        offset = min(1, self.every - 1)
        layers = mode.every_other(dense, layer, size.depth, every=self.every, offset=offset)
        return mode.Transformer(
            size.vocab,
            size.dim,
            layers,
            dtype=jnp.dtype(size.dtype),
            remat=size.remat,
            key=key,
        )

    def change(self, steps: int) -> int:
        """The step from which training runs under `rule`; `steps` where it never does."""
        return steps - round(self.under_rule * steps)


def _block(size: Size, key: PRNGKeyArray) -> mode.TransformerBlock:
    return mode.TransformerBlock(size.dim, size.heads, num_kv_heads=size.kv_heads, key=key)


def depths(
    size: Size,
    key: PRNGKeyArray,
    *,
    select: mode.AbstractSelector = mode.ExpertChoice(),
    gate: mode.AbstractGate = mode.Raw(),
    predictor: bool = False,
    position_bins: int = 1,
) -> mode.MixtureOfDepths:
    """A layer of Mixture-of-Depths over the dense arm's block."""
    block_key, router_key, predictor_key = jax.random.split(key, 3)
    return mode.MixtureOfDepths(
        _block(size, block_key),
        size.dim,
        size.capacity,
        select=select,
        gate=gate,
        predictor=mode.Predictor(size.dim, key=predictor_key) if predictor else None,
        position_bins=position_bins,
        key=router_key,
    )


def _expert(size: Size) -> Callable[[PRNGKeyArray], mode.SwiGLU]:
    # The dense block's own feed-forward: an expert on every token costs what the dense one does.
    return lambda key: mode.SwiGLU(size.dim, key=key)


def _experts(size: Size, key: PRNGKeyArray) -> mode.Residual:
    return _mixture(size, size.experts + size.noop, 0, key)


def _reduced(size: Size, key: PRNGKeyArray) -> mode.Residual:
    return mode.reduced_capacity_moe(
        _expert(size),
        size.dim,
        size.heads,
        size.experts,
        size.noop,
        num_kv_heads=size.kv_heads,
        key=key,
    )


def _staged(size: Size, key: PRNGKeyArray) -> mode.MixtureOfDepths:
    return mode.staged_mode(
        _expert(size),
        size.dim,
        size.heads,
        size.experts + size.noop,
        capacity=size.capacity,
        num_kv_heads=size.kv_heads,
        key=key,
    )


def _integrated(size: Size, key: PRNGKeyArray) -> mode.Residual:
    return _mixture(size, size.experts, size.noop, key)


def _mixture(size: Size, experts: int, noop: int, key: PRNGKeyArray) -> mode.Residual:
    return mode.integrated_mode(
        _expert(size), size.dim, size.heads, experts, noop, num_kv_heads=size.kv_heads, key=key
    )


def predictor_loss(routings: tuple[mode.Routing, ...]) -> Float[Array, ""]:
    """Mean over the predictors of what teaches them."""
    # Its coefficient is 1: no gradient leaves the predictors, so it weighs against nothing.
    return jnp.mean(jnp.stack([mode.predictor_bce(routing) for routing in routings]))


_QUANTILE = mode.ByQuantile()
_LAST_FIFTH = 0.2

ARMS: tuple[Arm, ...] = (
    Arm("dense", "every token through every block"),
    Arm(
        "mod",
        "Mixture-of-Depths: top-k, the last fifth of training under a running quantile",
        depths,
        rule=_QUANTILE,
        under_rule=_LAST_FIFTH,
    ),
    Arm(
        "mod-predictor",
        "Mixture-of-Depths as published: top-k to the end, a predictor for sampling",
        partial(depths, predictor=True),
        rule=mode.ByPredictor(),
        auxiliary=predictor_loss,
    ),
    Arm(
        "mod-random",
        "the control: Mixture-of-Depths whose tokens are drawn at random",
        partial(depths, select=mode.RandomChoice()),
        samples=False,
    ),
    Arm(
        "moe",
        "expert-choice Mixture-of-Experts at the dense model's FLOPs",
        _experts,
        rule=_QUANTILE,
        under_rule=_LAST_FIFTH,
    ),
    Arm(
        "moe-reduced",
        "the control: Mixture-of-Experts with the slots of mode-integrated and no no-ops",
        _reduced,
        rule=_QUANTILE,
        under_rule=_LAST_FIFTH,
    ),
    Arm(
        "mode-staged",
        "staged MoDE: first to or around the block, then to an expert inside it",
        _staged,
        rule=_QUANTILE,
        under_rule=_LAST_FIFTH,
    ),
    Arm(
        "mode-integrated",
        "integrated MoDE: experts and no-op experts in one routing",
        _integrated,
        rule=_QUANTILE,
        under_rule=_LAST_FIFTH,
    ),
)
NAMES = tuple(arm.name for arm in ARMS)


def arms_help() -> str:
    """What each arm is, for the command line."""
    return "Which arms to train. " + "; ".join(f"{a.name}: {a.description}" for a in ARMS) + "."


def arms_named(names: Sequence[str]) -> list[Arm]:
    """The arms of those names, in the order of `ARMS`.

    **Raises:** `ValueError` for no name or an unknown one.
    """
    unknown = sorted(set(names) - set(NAMES))
    if unknown or not names:
        raise ValueError(
            f"`arms` must be one or more of {', '.join(NAMES)}, got {', '.join(unknown) or 'none'}."
        )
    return [arm for arm in ARMS if arm.name in names]
