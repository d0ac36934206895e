"""All routers of a model at once: finding them, pairing them with their routings, moving their
state.

What a router remembers (a running quantile, a balancing bias) is a leaf of the model that no
optimizer touches. `trainable` says which leaves an optimizer may have; `update_state` alone moves
the others, after a step and from what the step saw, never during it.
"""

import numbers
from collections.abc import Callable
from typing import TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from ._block import Routings
from ._precision import is_shaped
from ._router import Router
from ._routing import RouterState, Routing
from ._select import TokenChoice


Result = TypeVar("Result")


def _is_router(node: PyTree) -> bool:
    return isinstance(node, Router)


def routers(model: PyTree) -> list[Router]:
    """Every router in `model`, in the order in which its routings are returned.

    Routers of layers that are scanned over are one router with stacked leaves.
    """
    return [node for node in jax.tree.leaves(model, is_leaf=_is_router) if _is_router(node)]


def map_routers(function: Callable[[Router], Router], model: PyTree) -> PyTree:
    """A copy of `model` with `function` applied to each router: surgery on all layers at once.

    >>> import equinox as eqx, jax, mode
    >>> model = mode.mod_decoder(256, 32, depth=4, num_heads=2, key=jax.random.key(0))
    >>> control = mode.map_routers(
    ...     lambda r: eqx.tree_at(lambda r: r.select, r, mode.RandomChoice()), model
    ... )
    """
    return jax.tree.map(
        lambda node: function(node) if _is_router(node) else node, model, is_leaf=_is_router
    )


def trainable(model: PyTree) -> PyTree[bool]:
    """A filter for `eqx.partition`: true for the parameters, false for router state and the rest.

    `eqx.is_inexact_array` alone would hand an optimizer the router state as well: its gradient is
    0, but weight decay would pull thresholds and biases to 0. Of a model's shapes alone
    (`equinox.filter_eval_shape`) it says the same.

    >>> import equinox as eqx, jax, mode
    >>> model = mode.mod_decoder(256, 32, depth=4, num_heads=2, key=jax.random.key(0))
    >>> parameters, rest = eqx.partition(model, mode.trainable(model))
    >>> mode.routers(parameters)[0].state.threshold is None
    True
    """

    def decide(node: PyTree) -> PyTree[bool]:
        if isinstance(node, RouterState):
            return jax.tree.map(lambda _: False, node)
        return is_shaped(node) and jnp.issubdtype(node.dtype, jnp.inexact)

    return jax.tree.map(decide, model, is_leaf=lambda node: isinstance(node, RouterState))


def for_each_router(
    function: Callable[[Router, Routing], Result], model: PyTree, routings: Routings
) -> list[Result]:
    """`function(router, routing)` for every router of `model` with the routing it returned.

    Where layers are stacked for a scan, `function` sees one layer at a time and its results are
    stacked again.

    **Raises:** `ValueError` where the routings cannot be those of the model's routers.
    """
    if not isinstance(routings, tuple | list):
        raise ValueError(
            "`routings` must be the tuple that the model's call returned, one routing per router, "
            f"got a single {type(routings).__name__}. Pass `(routing,)`."
        )
    found = routers(model)
    if len(found) != len(routings):
        raise ValueError(
            f"`routings` must hold one routing per router of `model`, {len(found)}, got "
            f"{len(routings)}. Pass the tuple that the model's call returned."
        )
    results = []
    for router, routing in zip(found, routings, strict=True):
        stacked = router.state.threshold.shape[:-1]
        leading = routing.index.shape[: len(stacked)]
        expected = (stacked, router.num_experts, router.state.bias.shape[-1])
        if expected != (leading, routing.num_experts, routing.logits.shape[-1]):
            raise ValueError(
                "`routings` must be in the order of the routers of `model`: expected [*layers], "
                f"experts and choices {expected}, got "
                f"{(leading, routing.num_experts, routing.logits.shape[-1])}."
            )
        call = function
        for _ in stacked:
            call = eqx.filter_vmap(call)
        results.append(call(router, routing))
    return results


def update_state(
    model: PyTree,
    routings: Routings,
    *,
    quantile_rate: float | Float[Array, ""] = 0.03,
    bias_rate: float | Float[Array, ""] = 0.001,
) -> PyTree:
    """Move the state of every router by what one training step saw. Pure: returns a new model.

    Thresholds move towards the score that separates the best share `capacity` of all real tokens of
    the step from the rest, $t \\leftarrow t + \\max(\\rho, 1/(n+1)) (q - t)$ with $n$ earlier
    updates: a plain mean at first, an exponential average later. Biases, of routers with a
    `TokenChoice` selector, move by $u \\, \\text{sign}(\\bar L - L_c)$ with $L_c$ the assignments
    that asked for choice $c$.

    **Arguments:**

    - `model`: any tree with routers in it.
    - `routings`: what the step's forward pass returned.
    - `quantile_rate`: $\\rho$, between 0 and 1.
    - `bias_rate`: $u$, in units of a logit.

    **Raises:** `ValueError` where the routings cannot be those of the model's routers.

    *Source:* thresholds, arXiv:2603.11535; biases, arXiv:2408.15664, algorithm 1. *Relative to
    the papers:* the bias is added to the logits, not to a sigmoid of them, and no-op experts are
    balanced like the others.
    """
    for name, rate in (("quantile_rate", quantile_rate), ("bias_rate", bias_rate)):
        if isinstance(rate, numbers.Real) and not 0 <= rate <= 1:  # a schedule's is not known yet
            raise ValueError(f"`{name}` must be between 0 and 1, got {rate}.")

    def moved(router: Router, routing: Routing) -> RouterState:
        seen = jax.lax.stop_gradient(routing)
        state = router.state
        old, bias = (part.astype(jnp.float32) for part in (state.threshold, state.bias))
        scores = router.scores(seen.logits)[..., : router.num_experts].astype(jnp.float32)
        target = _quantile(scores, seen.valid, float(router.fraction))
        rate = jnp.maximum(quantile_rate, 1 / (state.updates.astype(jnp.float32) + 1))
        # Scores are infinite under an infinite bias: there is nothing to learn from them.
        known = jnp.any(seen.valid) & jnp.isfinite(target)
        threshold = jnp.where(known, old + rate * (target - old), old)
        if isinstance(router.select, TokenChoice):
            load = jnp.sum(seen.load.reshape(-1, bias.shape[-1]), axis=0).astype(jnp.float32)
            bias = bias + bias_rate * jnp.sign(jnp.mean(load) - load)
        return RouterState(
            bias.astype(state.bias.dtype),
            threshold.astype(state.threshold.dtype),
            state.updates + jnp.any(known).astype(state.updates.dtype),
        )

    states = iter(for_each_router(moved, model, routings))
    return map_routers(lambda router: eqx.tree_at(lambda r: r.state, router, next(states)), model)


def _quantile(
    scores: Float[Array, "*groups tokens experts"],
    valid: Bool[Array, "*groups tokens"],
    fraction: float,
) -> Float[Array, " experts"]:
    """The score that separates each expert's best `fraction` of the real tokens from the rest.

    Half way between the k-th and the next: the tokens above it are exactly the k best. A share of
    all is separated from nothing, and the lowest number lets every token pass; of a smaller share
    that a few tokens round up to all, the lowest of them stands for the quantile.
    """
    if fraction >= 1:
        return jnp.full(scores.shape[-1], jnp.finfo(jnp.float32).min)
    num_experts = scores.shape[-1]
    eligible = jnp.where(valid[..., None], scores, -jnp.inf).reshape(-1, num_experts)
    falling = jnp.sort(eligible, axis=0, descending=True)
    total = jnp.sum(valid, dtype=jnp.int32)
    share = jnp.round(fraction * total.astype(jnp.float32)).astype(jnp.int32)
    count = jnp.clip(share, 1, total)

    def nth(place: Int[Array, ""]) -> Float[Array, " experts"]:
        return jax.lax.dynamic_index_in_dim(falling, place, axis=0, keepdims=False)

    last = nth(count - 1)
    return jnp.where(count < total, (last + nth(count)) / 2, last)
