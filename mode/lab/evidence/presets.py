"""What sweeps compare: arms, grids of arms, sizes, budgets and seeds, and presets of grids."""

import dataclasses
import re
from functools import partial

import jax.numpy as jnp

import mode
from mode._types import Scalar
from mode.routing import Routings

from ..arms import ALL_ARMS, ARMS, Arm, arm_named
from ..commands import SWEEP_TEXTS
from ..layers import depths
from ..options import Recipe, Size
from .records import SweepSettings


@dataclasses.dataclass(frozen=True)
class Grid:
    """Every arm at every size, budget in training FLOPs, and seed from 0.

    At `equal_steps`, arms take the steps that the budget pays for of the dense arm.
    """

    arms: tuple[Arm, ...]
    sizes: tuple[Size, ...]
    budgets: tuple[float, ...]
    seeds: int = 3
    equal_steps: bool = False


@dataclasses.dataclass(frozen=True)
class Preset:
    """Grids over one text whose runs are compared with each other, run in their order.

    `about` says time and scale in the help text. Arms that are not compared over sizes are compared
    at the size `reference`. The learning rate is chosen from `rates`, for each size, on the dense
    arm. `held_out` is the most sequences in an evaluation.
    """

    about: str
    reference: Size
    grids: tuple[Grid, ...]
    rates: tuple[float, ...]
    held_out: int = 512

    @property
    def arms(self) -> dict[str, Arm]:
        """All arms by their names, and the dense one, which learning rates are tuned on."""
        return {arm.name: arm for arm in (ARMS[0], *(a for grid in self.grids for a in grid.arms))}

    def settings(self, recipe: Recipe, corpus: str) -> SweepSettings:
        """Returns what all runs of a folder have in common. The search has the smallest budget."""
        return SweepSettings(
            reference=self.reference,
            rates=self.rates,
            search_budget=min(budget for grid in self.grids for budget in grid.budgets),
            held_out=self.held_out,
            recipe=recipe,
            corpus=corpus,
        )


def bce_loss(routings: Routings, *, weight: float) -> Scalar:
    """Computes the paper's cross entropy on the routers' logits, times a weight."""
    return weight * jnp.mean(jnp.stack([mode.router_bce(routing) for routing in routings]))


# As the paper prints it: the raw logit, on the update alone.
equation_1 = partial(depths, gate=mode.IdentityGate(), weigh_values=False)
_MOD = arm_named("mod")
# Those of the ablation, and what the paper's claims need besides.
SWEEP_ARMS: tuple[Arm, ...] = (
    *ALL_ARMS,
    dataclasses.replace(
        _MOD,
        name="mod-after",
        description="Mixture-of-Depths: top-k to the end, then run under a running quantile",
        under_rule=0.0,
    ),
    Arm(
        "mod-bce-0.1",
        "Mixture-of-Depths of equation 1 with the paper's cross entropy on the router, of weight "
        "0.1",
        equation_1,
        rule=mode.LogitThreshold(),
        auxiliary=partial(bce_loss, weight=0.1),
    ),
    dataclasses.replace(
        _MOD,
        name="mod-raw",
        description=f"{_MOD.description}; the weight of equation 1",
        routed=equation_1,
    ),
    dataclasses.replace(
        _MOD,
        name="mod-sigmoid",
        description=f"{_MOD.description}; sigmoid gate",
        routed=partial(depths, gate=mode.SigmoidGate()),
    ),
    dataclasses.replace(
        _MOD, name="mod-every", description=f"{_MOD.description}; every layer routed", every=1
    ),
)


def sweep_arms(*names: str) -> tuple[Arm, ...]:
    """Returns the arms of those names, in their order.

    **Raises:** `ValueError` for an unknown name.
    """
    arms = {arm.name: arm for arm in SWEEP_ARMS}
    unknown = sorted(set(names) - arms.keys())
    if unknown:
        raise ValueError(f"`arms` must be of {', '.join(arms)}, got {', '.join(unknown)}.")
    return tuple(arms[name] for name in names)


def sizes_like(reference: Size, *names: str) -> tuple[Size, ...]:
    """Returns the reference with other features and layers, and with heads of the same size.

    **Raises:** `ValueError` for a name that is not two numbers, such as `48x6`.
    """
    sizes = []
    for name in names:
        match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", name)
        if match is None:
            raise ValueError(f"`sizes` must be features and layers, such as 48x6, got {name!r}.")
        dim, depth = int(match[1]), int(match[2])
        heads = max(1, dim * reference.heads // reference.dim)
        sizes.append(dataclasses.replace(reference, dim=dim, depth=depth, heads=heads))
    return tuple(sizes)


_COMPARED = sweep_arms("dense", "mod", "mod-random")
# What says what the routed blocks are worth, and how much of it an arm recovers.
_RECOVERING = sweep_arms("left-out", "mod", "mod-random")
_CAUSAL = sweep_arms("mod-after", "mod-predictor", "mod-bce-0.1")
_EXPERTS = sweep_arms("moe", "mode-staged", "mode-integrated")
_OTHERS = sweep_arms("moe-reduced", "mod-raw", "mod-sigmoid", "mod-every")

_SMALL = Size(dim=32, depth=4, heads=2)
_TINY = Size(dim=16, depth=2, heads=1, length=32, batch=4, experts=2, noop=1)
_LARGE = Size(dim=384, depth=12, heads=6, length=512, batch=32, dtype="bfloat16")
_LARGE_SIZES = sizes_like(_LARGE, "192x8", "256x10", "384x12", "512x14")
_BUDGETS = (2e11, 6e11)
# Of one depth: a parabola does not fit what changes in two ways at once.
_WIDTHS = sizes_like(_SMALL, "12x4", "16x4", "24x4", "32x4", "48x4", "64x4")
_CAPACITIES = tuple(dataclasses.replace(_SMALL, capacity=c) for c in (0.0625, 0.25, 0.5, 1.0))

PRESETS = {
    "cpu-hour": Preset(
        SWEEP_TEXTS["cpu-hour"],
        _SMALL,
        (
            Grid(_COMPARED, _WIDTHS, _BUDGETS),
            Grid((*_CAUSAL, *_EXPERTS, *_OTHERS), (_SMALL,), _BUDGETS),
            Grid((_MOD,), (*_CAPACITIES, *sizes_like(_SMALL, "32x8")), _BUDGETS),
            Grid(_RECOVERING, (_SMALL,), _BUDGETS, 5, equal_steps=True),
            Grid((*_COMPARED, arm_named("left-out")), (_SMALL,), _BUDGETS, 5),
        ),
        rates=(5e-3, 1e-2, 2e-2, 4e-2, 8e-2),
    ),
    "h100-half-hour": Preset(
        SWEEP_TEXTS["h100-half-hour"],
        _LARGE,
        (
            Grid(_COMPARED, _LARGE_SIZES, (3e15, 1e16), 2),
            Grid((*_CAUSAL, *_EXPERTS), (_LARGE,), (3e15,), 2),
            Grid(_RECOVERING, (_LARGE,), (3e15,), 2, equal_steps=True),
        ),
        rates=(1e-3, 2e-3, 4e-3),
    ),
    "tiny": Preset(
        SWEEP_TEXTS["tiny"],
        _TINY,
        (
            Grid(_COMPARED, sizes_like(_TINY, "8x2", "16x2", "24x2"), (4e8,), 2),
            Grid((*_CAUSAL, *_EXPERTS), (_TINY,), (4e8,), 2),
            Grid(_RECOVERING, (_TINY,), (4e8,), 2, equal_steps=True),
        ),
        rates=(1e-2,),
        held_out=16,
    ),
}
