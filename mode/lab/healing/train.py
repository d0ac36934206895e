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
from .options import Healing
from .teacher import Targets, divergence


Part = Literal["routers", "norms", "all"]


@dataclasses.dataclass(frozen=True)
class Phase:
    """Some steps, from `first` on, that share one program: what learns, with which capacities, and
    whether tokens are selected by the causal rule."""

    part: Part
    first: int
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
        if count:
            phases += [Phase(part, first + start, own) for start, own in stages.items()]
        first += count
    causal = round(options.causal * counts["all"]) if learns and counts["all"] > 1 else 0
    if causal:
        last = phases[-1]
        start = max(last.first + 1, first - causal)
        phases.append(dataclasses.replace(last, first=start, is_causal=True))
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


def rates(options: Healing, count: int) -> Float[np.ndarray, " steps"]:
    """The factor of the peak rate at each step of a phase: up in a line, down as half a cosine."""
    warmup = max(1, min(count - 1, count // 20))
    schedule = optax.warmup_cosine_decay_schedule(0.0, 1.0, warmup, max(count, 2), 0.05)
    return np.asarray(jax.vmap(schedule)(jnp.arange(count, dtype=jnp.float32) + 0.5))


class HealState(eqx.Module):
    """All that a step changes: what learns, what is fixed, and the moments of Adam."""

    learned: PyTree
    fixed: PyTree
    moments: PyTree

    @staticmethod
    def begin(model: mode.Transformer, part: Part) -> "HealState":
        """The state at the start of a phase, with arrays of its own: steps write over them, and a
        converted model shares those of its layers with the dense one."""
        model = jax.tree.map(lambda leaf: jnp.copy(leaf) if eqx.is_array(leaf) else leaf, model)
        learned, fixed = eqx.partition(model, learning(model, part))
        return HealState(learned, fixed, _optimizer().init(learned))

    @property
    def model(self) -> mode.Transformer:
        """The model as it is now."""
        return eqx.combine(self.learned, self.fixed)


def _optimizer() -> optax.GradientTransformation:
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1.0, b2=0.95))


Step = Callable[[tuple[Scalar, dict[str, Any], Targets, Array], HealState], tuple[HealState, Any]]


def make_step(options: Healing, is_causal: bool) -> Step:
    """One step of a factor of the rate, a sample, targets and a key, jitted. The state is donated.

    Returns the divergence from the teacher, which is NaN or infinite where the state is spoilt.
    """
    optimizer = _optimizer()

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
        with jax.numpy_dtype_promotion("standard"):  # optax mixes integers and floats
            updates, moments = optimizer.update(gradient, state.moments, state.learned)
        learned = eqx.apply_updates(state.learned, _scaled(options, factor, updates))
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


def _scaled(options: Healing, factor: Scalar, updates: PyTree) -> PyTree:
    """Multiplies the updates by the rates: routers have one of their own."""

    def is_router(node: Any) -> bool:
        return isinstance(node, mode.Router)

    def scale(node: Any) -> Any:
        rate = options.router_rate if is_router(node) else options.learning_rate
        return jax.tree.map(lambda update: rate * factor * update, node)

    return jax.tree.map(scale, updates, is_leaf=is_router)
