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
        stacked = router.state.layers
        leading = routing.index.shape[: len(stacked)]
        expected = (stacked, router.num_experts, router.state.bias.shape[-1])
        if expected != (leading, routing.num_experts, routing.logits.shape[-1]):
            raise ValueError(
                "`routings` must be in the order of the routers of `model`: expected [*layers], "
                f"experts and choices {expected}, got "
                f"{(leading, routing.num_experts, routing.logits.shape[-1])}."
            )
        if router.state.position_bins > 1 and routing.positions is None:
            raise ValueError(
                f"`routings` must carry positions for a router of {router.state.position_bins} "
                "position bins, got one without. Pass the tuple that the model's call returned."
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

    With several `position_bins` the same holds in each bin, for the real tokens in it and with an
    $n$ of its own: a bin without any in this step stays where it is. Until it has seen its first,
    it follows the nearest bin that has, of two the earlier, so that a text longer than all in
    training does not meet a threshold of 0.

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
        threshold, updates = _thresholds(router, seen, quantile_rate)
        bias = state.bias.astype(jnp.float32)
        if isinstance(router.select, TokenChoice):
            load = jnp.sum(seen.load.reshape(-1, bias.shape[-1]), axis=0).astype(jnp.float32)
            bias = bias + bias_rate * jnp.sign(jnp.mean(load) - load)
        return RouterState(
            bias.astype(state.bias.dtype), threshold.astype(state.threshold.dtype), updates
        )

    states = iter(for_each_router(moved, model, routings))
    return map_routers(lambda router: eqx.tree_at(lambda r: r.state, router, next(states)), model)


def _thresholds(
    router: Router, seen: Routing, quantile_rate: float | Float[Array, ""]
) -> tuple[Float[Array, "*bins experts"], Int[Array, "*bins"]]:
    """The thresholds after a step, and how many times each bin was moved by then."""
    state = router.state
    old = state.threshold.astype(jnp.float32)
    scores = router.scores(seen.logits)[..., : router.num_experts].astype(jnp.float32)

    def towards(
        old: Float[Array, " experts"], updates: Int[Array, ""], among: Bool[Array, "*groups tokens"]
    ) -> tuple[Float[Array, " experts"], Int[Array, ""]]:
        target = _quantile(scores, among, float(router.fraction))
        rate = jnp.maximum(quantile_rate, 1 / (updates.astype(jnp.float32) + 1))
        # Scores are infinite under an infinite bias: there is nothing to learn from them.
        known = jnp.any(among) & jnp.isfinite(target)
        threshold = jnp.where(known, old + rate * (target - old), old)
        return threshold, updates + jnp.any(known).astype(updates.dtype)

    if state.position_bins == 1:
        return towards(old, state.updates, seen.valid)
    assert seen.positions is not None
    bins = jnp.where(seen.valid, state.bins(seen.positions), -1)
    places = jnp.arange(state.position_bins, dtype=jnp.int32)
    # One bin after the other: all at once would hold as many copies of the scores.
    threshold, updates = jax.lax.map(
        lambda each: towards(each[0], each[1], bins == each[2]), (old, state.updates, places)
    )
    # What has seen no token yet follows the nearest bin that has.
    apart = jnp.abs(places[:, None] - places[None])
    apart += jnp.where(updates > 0, 0, state.position_bins)[None]
    return threshold[jnp.argmin(apart, axis=-1)], updates


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
    total = jnp.sum(valid, dtype=jnp.int32)
    share = jnp.round(fraction * total.astype(jnp.float32)).astype(jnp.int32)
    count = jnp.clip(share, 1, total)
    last = _largest(eligible, count)
    reached = jnp.sum(eligible >= last, axis=0, dtype=jnp.int32)
    below = jnp.max(jnp.where(eligible < last, eligible, -jnp.inf), axis=0)
    following = jnp.where(reached > count, last[0], below)
    return jnp.where(count < total, (last[0] + following) / 2, last[0])


def _largest(
    values: Float[Array, "rows experts"], count: Int[Array, ""]
) -> Float[Array, "1 experts"]:
    """The `count`-th largest of each column; NaN where there is one.

    By bisection over the 32 bits of a float32, whose order is that of the numbers: each pass counts
    rows, so that on a mesh counts are all that moves. A sort would bring every row to every device:
    for 20 layers of 64 experts and half a million tokens, 5 GB.
    """
    bits = jax.lax.bitcast_convert_type(values + 0.0, jnp.int32)  # one zero: -0.0 + 0.0 is 0.0
    ordered = jnp.where(bits < 0, bits ^ jnp.iinfo(jnp.int32).max, bits)

    def halve(
        _: int | Int[Array, ""], bounds: tuple[Int[Array, "1 experts"], Int[Array, "1 experts"]]
    ) -> tuple[Int[Array, "1 experts"], Int[Array, "1 experts"]]:
        # At least `count` rows reach the lower bound, fewer what lies above the upper one.
        low, high = bounds
        middle = (low >> 1) + (high >> 1) + ((low | high) & 1)
        reach = jnp.sum(ordered >= middle, axis=0, keepdims=True, dtype=jnp.int32) >= count
        return jnp.where(reach, middle, low), jnp.where(reach, high, middle - 1)

    limits = jnp.iinfo(jnp.int32)
    ends = (jnp.full_like(ordered[:1], limits.min), jnp.full_like(ordered[:1], limits.max))
    found, _ = jax.lax.fori_loop(0, 32, halve, ends)
    largest = jax.lax.bitcast_convert_type(
        jnp.where(found < 0, found ^ limits.max, found), jnp.float32
    )
    return jnp.where(jnp.any(jnp.isnan(values), axis=0, keepdims=True), jnp.nan, largest)
