"""Calibration: thresholds from data, so that a causal model computes what it was trained to."""

from typing import Any, ClassVar

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import PyTree

from .._capacity import Capacity
from .._dtypes import Module
from .._types import ExpertMask
from ._causal import make_causal
from ._quantile import score_quantile
from ._router import Router
from ._selector import AbstractTokenSelector, RoutingInputs
from ._state_update import update_router_state
from ._surgery import map_routers, routers
from ._token_selectors import QuantileThreshold


class _BatchQuantile(AbstractTokenSelector):
    """Selects the tokens above the quantile of the batch itself, as the threshold will."""

    capacity: float = eqx.field(static=True)
    max_capacity: Capacity | None = eqx.field(  # pyright: ignore[reportIncompatibleVariableOverride]
        static=True
    )
    is_causal: ClassVar[bool] = True

    def requested_mask(self, inputs: RoutingInputs) -> ExpertMask:
        scores = inputs.scores[..., : inputs.num_experts].astype(jnp.float32)
        quantile = score_quantile(scores, inputs.valid, self.capacity)
        return scores > jnp.expand_dims(quantile, range(scores.ndim - 1))


def calibrate_thresholds(model: Module, *batches: Any) -> Module:
    """Sets the thresholds of `QuantileThreshold` from data: the mean of the batches' quantiles.

    A running quantile follows a router that still moves, and one that was trained under top-k saw
    the hidden states of top-k. Calibrated, `make_causal(model)` selects a fraction `capacity` of
    the tokens of text like this. Each layer sees the hidden states that the thresholds below it
    make, so one pass over the batches is enough.

    **Arguments:**

    - `model`: as `make_causal` takes it, called as `model(x)` or `model(x, info)`.
    - `batches`: each is `x`, or a tuple of the arguments of the call. A few thousand tokens in all
        bring the fraction within a few percent.

    **Returns:** a copy of `model` with new thresholds, and the selectors it had.

    **Raises:** `ValueError` without a batch; as `update_router_state`.

    >>> import jax, jax.numpy as jnp, mode
    >>> model = mode.mod_transformer(256, 32, depth=4, num_heads=2, key=jax.random.key(0))
    >>> text = jax.random.randint(jax.random.key(1), (8, 128), 0, 256)
    >>> model = mode.make_causal(mode.calibrate_thresholds(model, text))
    >>> round(mode.routing_metrics(model(text)[1][0]).compute.item(), 3)
    0.125
    """
    if not callable(model):
        raise ValueError(f"`model` must be called with a batch, got {type(model).__name__}.")
    if not batches:
        raise ValueError("`batches` must hold at least one batch, got none.")
    for batch in batches:
        if not (isinstance(batch, tuple) or hasattr(batch, "ndim")):
            raise ValueError(
                "`batches` must each be an array or a tuple of arguments, got "
                f"{type(batch).__name__}. Of a list of batches, pass `*batches`."
            )

    def measured(router: Router) -> Router:
        select = router.select
        if isinstance(select, QuantileThreshold):
            select = _BatchQuantile(router.selected_fraction, select.max_capacity)
        start = jnp.zeros_like(router.state.updates)
        return eqx.tree_at(lambda r: (r.select, r.state.updates), router, (select, start))

    result = map_routers(measured, make_causal(model))
    for batch in batches:
        args = batch if isinstance(batch, tuple) else (batch,)
        result = _update(result, args)
    states = iter([(router.state.threshold, router.state.updates) for router in routers(result)])
    return map_routers(
        lambda router: eqx.tree_at(
            lambda r: (r.state.threshold, r.state.updates), router, next(states)
        ),
        model,
    )


@eqx.filter_jit
def _update(model: PyTree, args: tuple[Any, ...]) -> PyTree:
    # At rate 0 the update is the plain mean over all batches so far.
    return update_router_state(model, model(*args)[1], quantile_rate=0.0, bias_rate=0.0)
