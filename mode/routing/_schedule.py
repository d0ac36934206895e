"""Capacities that change: of a whole model, and in the course of a training."""

import itertools
from collections.abc import Sequence
from fractions import Fraction

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from .._capacity import Capacity, check_capacity, exact_fraction
from .._checks import check_count, is_finite
from .._dtypes import Module
from ._router import Router
from ._surgery import map_routers, routers


# Every stage of a schedule compiles the training step once more.
_MOST_STAGES = 16


def with_capacity(model: Module, capacity: Capacity | Sequence[Capacity]) -> Module:
    """Changes the capacity of the routers of `model`.

    The capacity is no array, so neither `equinox.tree_at` nor a file of arrays changes it. Running
    thresholds belong to the old one: the next `update_router_state` starts them anew. Works on a
    training state too, whose optimizer moments have the structure of the model.

    **Arguments:**

    - `capacity`: as `Router` takes it, for all routers or one for each, in the order of
        `routers(model)`. For experts, slots per token of each expert.

    **Returns:** a copy. Its programs compile anew, as its tensors have other sizes.

    **Raises:** `ValueError` for a capacity that is not finite and positive, and for a sequence that
    does not have one for each router.

    >>> import jax, mode
    >>> model = mode.mod_transformer(256, 32, depth=4, num_heads=2, key=jax.random.key(0))
    >>> float(mode.routers(mode.with_capacity(model, 0.5))[0].capacity)
    0.5
    """
    is_sequence = isinstance(capacity, Sequence)
    exact = [exact_fraction("capacity", c) for c in (capacity if is_sequence else (capacity,))]
    count = len(routers(model))
    # Optimizer moments repeat the model's routers.
    if is_sequence and (count % len(exact) if exact else count):
        raise ValueError(
            f"`capacity` must be one number, or one for each router of `model`, {count}, got "
            f"{len(exact)} numbers."
        )
    following = itertools.cycle(exact)

    def change(router: Router) -> Router:
        capacity = next(following)
        if router.capacity == capacity:
            return router
        if router.state.updates is not None:  # it is in a tree of moments
            router = eqx.tree_at(lambda r: r.state.updates, router, replace_fn=jnp.zeros_like)
        leaves, structure = jax.tree.flatten(router)
        router = jax.tree.unflatten(structure, leaves)  # a copy, not yet seen by anybody
        object.__setattr__(router, "capacity", capacity)
        return router

    return map_routers(change, model)


def capacity_schedule(
    model: PyTree, steps: int, *, start: Capacity = 1.0, until: float = 0.3, stages: int = 3
) -> dict[int, tuple[Fraction, ...]]:
    """Plans a training that begins with more slots, so that routers get to know more tokens.

    In the first stages, Mixture-of-Depths layers have capacities that fall in equal ratios from
    `start` to their own, which they have from then on. Layers of experts keep theirs.

    **Arguments:**

    - `model`: with the capacities to end with.
    - `steps`: steps of the whole training.
    - `start`: the first capacity, in (0, 1]; layers with more than that keep their own.
    - `until`: the fraction of the steps from which on every layer has its own capacity.
    - `stages`: stages before that, of equal length. Each compiles the training step once more.

    **Returns:** from the number of a step, counted from 0, to the capacities of all routers from
    there on, as `with_capacity` takes them.

    **Raises:** `ValueError` for a number out of range, and where a stage would last less than a
    step.

    >>> import jax, mode
    >>> model = mode.mod_transformer(256, 32, depth=4, num_heads=2, key=jax.random.key(0))
    >>> for first, capacities in mode.capacity_schedule(model, steps=1000).items():
    ...     model = mode.with_capacity(model, capacities)  # and the optimizer's state
    ...     print(first, float(capacities[0]))
    0 1.0
    100 0.5
    200 0.25
    300 0.125
    """
    check_count("steps", steps, 1)
    check_count("stages", stages, 1)
    check_capacity(start)
    if stages > _MOST_STAGES:
        raise ValueError(
            f"`stages` must be at most {_MOST_STAGES}, got {stages}: each compiles a program of "
            "its own."
        )
    if not (is_finite(until) and 0 < until < 1):
        raise ValueError(
            f"`until` must be a fraction of the training, above 0 and below 1, got {until!r}."
        )
    if steps * until < stages:
        raise ValueError(
            f"`until` must give each stage at least one step, got {until:g} of {steps} steps for "
            f"{stages} stages. Use fewer stages or a longer training."
        )
    own = [router.capacity for router in routers(model)]
    depths = [router.num_experts == 1 and router.num_noop == 0 for router in routers(model)]

    def at(stage: int, capacity: Fraction, is_depth: bool) -> Fraction:
        if not is_depth or capacity >= start or stage == stages:
            return capacity
        ratio = float(capacity) / float(start)
        return exact_fraction("capacity", round(float(start) * ratio ** (stage / stages), 6))

    return {
        round(steps * until * stage / stages): tuple(
            at(stage, *pair) for pair in zip(own, depths, strict=True)
        )
        for stage in range(stages + 1)
    }
