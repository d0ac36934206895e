"""The update of router state after a training step."""

import math
import numbers

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._dtypes import Module
from .._types import Logits, Scalar
from ._quantile import score_quantile
from ._record import RouterState, Routing, Routings
from ._router import Router
from ._surgery import map_router_routings, map_routers
from ._token_selectors import TokenChoice


# The farthest that the biases of no-ops go in one step, in units of a logit: where all tokens are
# to request experts alone, or none, no number is far enough.
_FARTHEST = 100.0


def update_router_state(
    model: Module,
    routings: Routings,
    *,
    quantile_rate: float | Scalar = 0.03,
    bias_rate: float | Scalar = 0.001,
) -> Module:
    r"""Updates the state of every router with the routings of one training step.

    Thresholds move towards the score $q$ that separates the best of all real tokens of the step, a
    fraction `capacity`, from the rest: $t \leftarrow t + \max(\rho, 1/(n+1)) (q - t)$ after $n$
    updates, at first a plain mean and later an exponential average. Biases, of routers with a
    `TokenChoice` selector, move by $u \, \text{sign}(\bar L_c - L_c)$, where $L_c$ is the number of
    assignments that requested choice $c$ and $\bar L_c$ its mean over the choices. Where the router
    has `experts_per_token`, the mean is over the experts, or over the no-ops; and the biases of all
    no-ops follow, at the rate of the thresholds, the number at which the tokens of the step request
    so many experts.

    **Arguments:**

    - `model`, `routings`: as in `map_router_routings`. Micro-batches are one step where their
        routings are stacked: by `jax.lax.scan`, or `jax.tree.map(lambda *r: jnp.stack(r), *parts)`.
    - `quantile_rate`: $\rho$, between 0 and 1.
    - `bias_rate`: $u$, in units of a logit.

    **Returns:** a copy of `model` with new router state. All other leaves are the same arrays.

    **Raises:** `ValueError` as `map_router_routings`; for a rate outside [0, 1]; for state that was
    cast below float32, in which small steps round to none; for a step of fewer than `1 / capacity`
    tokens, none of which could be among the best. (Where so few are real, thresholds stay.)

    >>> import jax, jax.numpy as jnp, mode
    >>> model = mode.mod_transformer(256, 32, depth=4, num_heads=2, key=jax.random.key(0))
    >>> logits, routings = model(jnp.zeros((2, 64), int))
    >>> mode.routers(mode.update_router_state(model, routings))[0].state.updates.tolist()
    [1, 1]

    *Source:* thresholds, arXiv:2603.11535; biases, arXiv:2408.15664, algorithm 1. *Relative to
    the papers:* the bias is added to the logits, not to a sigmoid of them, and no-op experts are
    balanced like the others.
    """
    for name, rate in (("quantile_rate", quantile_rate), ("bias_rate", bias_rate)):
        # The value of a traced schedule is not known.
        if isinstance(rate, numbers.Real) and not 0 <= rate <= 1:
            raise ValueError(f"`{name}` must be between 0 and 1, got {rate}.")

    def update(router: Router, routing: Routing) -> RouterState:
        state, routing = router.state, jax.lax.stop_gradient(routing)
        least = math.ceil(1 / router.capacity)
        _check_update(router, routing, least)
        old = state.threshold.astype(jnp.float32)
        scores = router.scores(routing.logits)[..., : router.num_experts].astype(jnp.float32)
        target = score_quantile(scores, routing.valid, router.selected_fraction)
        rate = jnp.maximum(quantile_rate, 1 / (state.updates.astype(jnp.float32) + 1))
        # Scores are infinite under an infinite bias: there is nothing to learn from them.
        known = (jnp.sum(routing.valid) >= least) & jnp.isfinite(target)
        threshold = jnp.where(known, old + rate * (target - old), old)
        bias = state.bias
        if isinstance(router.select, TokenChoice):
            load = jnp.sum(routing.load.reshape(-1, bias.shape[-1]), axis=0).astype(jnp.float32)
            moved = bias.astype(jnp.float32) + bias_rate * jnp.sign(_balanced(router, load) - load)
            if router.experts_per_token is not None:
                shift = jnp.clip(_noop_shift(router, routing), -_FARTHEST, _FARTHEST)
                seen = jnp.any(known) & jnp.isfinite(shift)
                moved = moved.at[router.num_experts :].add(jnp.where(seen, rate * shift, 0))
            bias = moved.astype(bias.dtype)
        updates = state.updates + jnp.any(known).astype(state.updates.dtype)
        return RouterState(bias, threshold.astype(state.threshold.dtype), updates)

    states = iter(map_router_routings(update, model, routings))
    return map_routers(lambda router: eqx.tree_at(lambda r: r.state, router, next(states)), model)


def _balanced(router: Router, load: Float[Array, " choices"]) -> Float[Array, " choices"]:
    """The load at which all choices are alike, or the experts, and the no-ops, among each other."""
    cuts = [] if router.experts_per_token is None else [router.num_experts]
    parts = jnp.split(load, cuts)
    return jnp.concatenate([jnp.full_like(part, jnp.mean(part)) for part in parts])


def _noop_shift(router: Router, routing: Routing) -> Scalar:
    """Computes what to add to the biases of all no-ops, so that the tokens request the target.

    The expert of rank $i$ is among the best $k$ choices if its logit is above that of the no-op of
    rank $k - i + 1$. So the number of experts that tokens request falls by one at each difference
    of the two that the shift passes, and the shift is a quantile of all differences.
    """
    assert isinstance(router.select, TokenChoice)
    assert router.experts_per_token is not None
    k, bias = router.select.k, router.state.bias.astype(jnp.float32)
    logits = routing.logits.astype(jnp.float32)
    biased = logits + jnp.expand_dims(bias, range(logits.ndim - 1))

    def best(part: Logits) -> Float[Array, "*groups tokens k"]:
        count = min(k, part.shape[-1])
        fill = jnp.full((*part.shape[:-1], k - count), -jnp.inf, part.dtype)
        return jnp.concatenate([jax.lax.top_k(part, count)[0], fill], axis=-1)

    experts, noops = jnp.split(biased, [router.num_experts], axis=-1)
    margins = best(experts) - best(noops)[..., ::-1]
    pooled = margins.reshape(*margins.shape[:-2], -1, 1)
    valid = jnp.repeat(routing.valid, k, axis=-1)
    return score_quantile(pooled, valid, router.experts_per_token / k)[0]


def _check_update(router: Router, routing: Routing, least: int) -> None:
    dtype = router.state.threshold.dtype
    if jnp.finfo(dtype).bits < 32:
        raise ValueError(
            f"router state must be float32, got {dtype}, in which a running mean sticks. Cast "
            "parameters alone, those that `is_trainable(model)` marks."
        )
    if not isinstance(router.select, TokenChoice) and routing.valid.size < least:
        raise ValueError(
            f"`routings` must be of at least {least} tokens where the capacity is "
            f"{float(router.capacity):.4g}, got {routing.valid.size}: the best fraction of fewer "
            "has no threshold. Use more tokens in a step, or update with several steps' at once."
        )
