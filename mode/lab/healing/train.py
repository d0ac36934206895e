"""Healing one arm: routers first, then norms, then all parameters, on the dense model's text."""

import dataclasses
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PyTree

import mode
from mode._types import Scalar

from ..data import Batch
from ..step import apply_gradient
from .options import Healing
from .teacher import Targets, divergence


Part = Literal["routers", "norms", "all"]


@dataclasses.dataclass(frozen=True)
class Phase:
    """Some steps, from `first` to before `last`, that share one program: what learns, with which
    capacities, and whether tokens are selected by the causal rule. `steps` are the first and the
    last of all phases in which the same learns: they share the moments and a schedule of rates."""

    part: Part
    first: int
    last: int
    steps: tuple[int, int]
    capacities: tuple[Fraction, ...]
    is_causal: bool = False


def plan_phases(options: Healing, model: mode.Transformer, arm: str) -> tuple[int, list[Phase]]:
    """Returns the number of steps of an arm, and its phases.

    Arms without routers that learn spend the routers' steps on all parameters: all arms see the
    same text.
    """
    own = tuple(router.capacity for router in mode.routers(model))
    learns = arm == "learned"
    counts: dict[Part, int] = {
        "routers": options.router_steps if learns else 0,
        "norms": options.norm_steps,
        "all": options.steps + (0 if learns else options.router_steps),
    }
    phases: list[Phase] = []
    first = 0
    for part, count in counts.items():
        stages = {0: own}
        if part == "all" and own and math.floor(options.ramp * count) >= options.ramp_stages:
            stages = mode.capacity_schedule(
                model, count, until=options.ramp, stages=options.ramp_stages
            )
        starts = [first + start for start in stages] if count else []
        for start, last, capacities in zip(
            starts, [*starts[1:], first + count], stages.values(), strict=False
        ):
            phases.append(Phase(part, start, last, (first, first + count), capacities))
        first += count
    causal = round(options.causal * counts["all"]) if learns and counts["all"] > 1 else 0
    if causal:
        before = phases.pop()
        start = max(before.first + 1, first - causal)
        phases.append(dataclasses.replace(before, last=start))
        phases.append(dataclasses.replace(before, first=start, is_causal=True))
    return first, phases


def learning(model: PyTree, part: Part) -> PyTree[bool]:
    """Returns which leaves of a model learn in a phase. Router state never does."""

    def learns(node: Any) -> bool:
        return isinstance(node, mode.Router) or (
            part == "norms" and isinstance(node, mode.RMSNorm | mode.LayerNorm)
        )

    def mask(node: Any, trainable: PyTree[bool]) -> PyTree[bool]:
        return trainable if part == "all" or learns(node) else jax.tree.map(_no, trainable)

    return jax.tree.map(mask, model, mode.is_trainable(model), is_leaf=learns)


def _no(_: object) -> bool:
    return False


def rates(count: int) -> Float[np.ndarray, " steps"]:
    """The factor of the peak rate at each of some steps: up in a line, down as half a cosine.

    Other than in `learning_rates`, the first step has a rate above 0: there may be few.
    """
    warmup = max(1, min(count - 1, count // 20))
    schedule = optax.warmup_cosine_decay_schedule(0.0, 1.0, warmup, max(count, 2), 0.05)
    return np.asarray(jax.vmap(schedule)(jnp.arange(count, dtype=jnp.float32) + 0.5))


class HealState(eqx.Module):
    """All that a step changes: what learns, what is fixed, and the moments of Adam."""

    learned: PyTree
    fixed: PyTree
    moments: PyTree

    @staticmethod
    def begin(model: mode.Transformer, part: Part, options: Healing) -> "HealState":
        """The state before the first step of a part, with arrays of its own: steps write over
        them, and a converted model shares those of its layers with the dense one."""
        model = jax.tree.map(lambda leaf: jnp.copy(leaf) if eqx.is_array(leaf) else leaf, model)
        learned, fixed = eqx.partition(model, learning(model, part))
        return HealState(learned, fixed, _optimizer(options).init(learned))

    @property
    def model(self) -> mode.Transformer:
        """The model as it is now."""
        return eqx.combine(self.learned, self.fixed)


def _optimizer(options: Healing) -> optax.GradientTransformation:
    """Adam at the peak rates, of which routers have one of their own; a step gives the factor."""

    def is_router(node: Any) -> bool:
        return isinstance(node, mode.Router)

    def scale(node: Any) -> Any:
        rate = options.router_rate if is_router(node) else options.learning_rate
        return jax.tree.map(lambda update: rate * update, node)

    def scale_all(updates: PyTree, _: PyTree) -> PyTree:
        return jax.tree.map(scale, updates, is_leaf=is_router)

    adam = optax.adam(1.0, b2=0.95)
    return optax.chain(optax.clip_by_global_norm(1.0), adam, optax.stateless(scale_all))


Step = Callable[[tuple[Scalar, dict[str, Any], Targets, Array], HealState], tuple[HealState, Any]]


def make_step(options: Healing, is_causal: bool) -> Step:
    """One step of a factor of the rate, a sample, targets and a key, jitted. The state is donated.

    Returns the divergence from the teacher, which is NaN or infinite where the state is spoilt.
    """
    optimizer = _optimizer(options)

    @eqx.filter_jit(donate="all-except-first")
    def step(
        given: tuple[Scalar, dict[str, Int[Array, "batch sample"]], Targets, Array],
        state: HealState,
    ) -> tuple[HealState, Scalar]:
        factor, sample, targets, key = given
        batch = Batch.of(sample)

        def objective(learned: PyTree) -> tuple[Scalar, tuple[Scalar, Any]]:
            model = eqx.combine(learned, state.fixed)
            if is_causal:
                model = mode.make_causal(model, max_capacity=None)
            logits, routings = model(batch.inputs, batch.info, key=key)
            loss = divergence(logits, targets, batch)
            return loss + options.router_cost * _cost(routings), (loss, routings)

        gradient, (loss, routings) = jax.grad(objective, has_aux=True)(state.learned)
        learned, moments = apply_gradient(optimizer, state.learned, state.moments, gradient, factor)
        model = eqx.combine(learned, state.fixed)
        if not is_causal:  # thresholds follow the tokens that top-k selects
            model = mode.update_router_state(model, routings)
        learned, fixed = eqx.partition(
            model, jax.tree.map(lambda x: x is not None, learned, is_leaf=_none)
        )
        return HealState(learned, fixed, moments), loss

    return step


def _none(node: object) -> bool:
    return node is None


def _cost(routings: Any) -> Scalar:
    costs = [jnp.mean(jax.nn.sigmoid(routing.logits)) for routing in routings]
    return jnp.mean(jnp.stack(costs)) if costs else jnp.zeros(())
