"""The arms that are compared beside those of the ablation: each differs from one in one thing."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial

import jax.numpy as jnp
from jaxtyping import Array, Float

import mode

from ..arms import ARMS, Arm, depths, predictor_loss


def _bce(weight: float) -> Callable[[tuple[mode.Routing, ...]], Float[Array, ""]]:
    def loss(routings: tuple[mode.Routing, ...]) -> Float[Array, ""]:
        return weight * jnp.mean(jnp.stack([mode.router_bce(routing) for routing in routings]))

    return loss


def _predictor_and_bce(
    weight: float,
) -> Callable[[tuple[mode.Routing, ...]], Float[Array, ""]]:
    bce = _bce(weight)
    return lambda routings: predictor_loss(routings) + bce(routings)


_NAMED = {arm.name: arm for arm in ARMS}
_MOD, _PREDICTOR, _RANDOM = (_NAMED[name] for name in ("mod", "mod-predictor", "mod-random"))
_SIGMOID, _TWICE = mode.Sigmoid(), mode.Sigmoid(scale=2.0)


def _under(suffix: str, share: float, when: str) -> Arm:
    about = f"Mixture-of-Depths: {when} under a running quantile"
    return dataclasses.replace(_MOD, name=f"mod-{suffix}", description=about, under_rule=share)


def _taught(suffix: str, weight: float, **options: mode.AbstractGate) -> Arm:
    return Arm(
        f"mod-bce{suffix}",
        f"Mixture-of-Depths as published: cross entropy of weight {weight} on the router itself",
        partial(depths, **options) if options else depths,
        rule=mode.ByLogit(),
        auxiliary=_bce(weight),
    )


def _gated(arm: Arm, suffix: str, gate: mode.AbstractGate, **options: bool) -> Arm:
    about = f"{arm.description}; gate {gate}"
    routed = partial(depths, gate=gate, **options)
    return dataclasses.replace(arm, name=f"{arm.name}-{suffix}", description=about, routed=routed)


VARIANTS: tuple[Arm, ...] = (
    *ARMS,
    # When training goes under the causal rule.
    _under("after", 0.0, "top-k to the end, run"),
    _under("tenth", 0.1, "top-k, the last tenth of training"),
    _under("half", 0.5, "top-k, the last half of training"),
    _under("start", 0.95, "all of training but the first twentieth"),
    # How fast the quantile moves.
    *(
        dataclasses.replace(
            _MOD,
            name=f"mod-rate-{rate}",
            description=f"{_MOD.description} that moves at rate {rate}",
            quantile_rate=rate,
        )
        for rate in (0.003, 0.01, 0.1)
    ),
    dataclasses.replace(
        _MOD,
        name="mod-position",
        description=f"{_MOD.description}, one for each of five bins of positions",
        routed=partial(depths, position_bins=5),
    ),
    # What the router is taught besides.
    _taught("-0.01", 0.01),
    _taught("-0.1", 0.1),
    _taught("-1", 1.0),
    _taught("-0.1-sigmoid", 0.1, gate=_SIGMOID),
    dataclasses.replace(
        _PREDICTOR,
        name="mod-predictor-bce-0.1",
        description="both: a predictor for sampling, and cross entropy of weight 0.1 on the router",
        auxiliary=_predictor_and_bce(0.1),
    ),
    # What multiplies the update.
    _gated(_MOD, "sigmoid", _SIGMOID),
    _gated(_MOD, "twice-sigmoid", _TWICE),
    _gated(_PREDICTOR, "sigmoid", _SIGMOID, predictor=True),
    _gated(_PREDICTOR, "twice-sigmoid", _TWICE, predictor=True),
    dataclasses.replace(
        _RANDOM,
        name="mod-random-sigmoid",
        description=f"{_RANDOM.description}; gate {_SIGMOID}",
        routed=partial(depths, gate=_SIGMOID, select=mode.RandomChoice()),
    ),
    # Which layers are routed.
    dataclasses.replace(
        _MOD, name="mod-every", description=f"{_MOD.description}; every layer routed", every=1
    ),
    dataclasses.replace(
        _NAMED["moe"],
        name="moe-after",
        description="expert-choice Mixture-of-Experts: top-k to the end, run under a quantile",
        under_rule=0.0,
    ),
)
_BY_NAME = {arm.name: arm for arm in VARIANTS}


def variants_named(names: Sequence[str]) -> list[Arm]:
    """The arms of those names, in their order.

    **Raises:** `ValueError` for no name, an unknown one, or one that repeats.
    """
    unknown = sorted(set(names) - _BY_NAME.keys())
    if unknown or not names:
        raise ValueError(
            f"`arms` must be one or more of {', '.join(_BY_NAME)}, got "
            f"{', '.join(unknown) or 'none'}."
        )
    check_once("arms", names)
    return [_BY_NAME[name] for name in names]


def check_once(name: str, values: Sequence[object]) -> None:
    """Refuse what is named twice."""
    again = sorted({str(value) for value in values if values.count(value) > 1})
    if again:
        raise ValueError(f"`{name}` must not repeat, got {', '.join(again)} more than once.")
