"""Causal selection: the rules for a model trained under top-k, which sees the future."""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import PyTree

from .._capacity import Capacity
from .._checks import check_instance
from .._dtypes import Module
from .._types import ExpertMask
from ._record import Routing, Routings, selected_mask
from ._router import Router
from ._surgery import map_router_routings, map_routers, outer_axes, routers
from ._token_selectors import AbstractThreshold, PredictorThreshold, QuantileThreshold


def make_causal(
    model: Module,
    *,
    threshold: AbstractThreshold | None = None,
    max_capacity: Capacity | None = 1.0,
) -> Module:
    """Replaces the selectors of a model so that no token's routing depends on later tokens.

    Each selector that is not causal, and each threshold, becomes `threshold`; the others stay.
    `RandomChoice`, `Strided` and `Replay` assign whole sequences: a model with them can be
    evaluated, but `prefill` raises an error.

    Causal means independent of the *content* of later tokens. Their *number* still counts under
    `TokenChoice`, `Strided` or a `max_capacity` below 1: the slots are a fraction of the whole
    length, so compare at one length, padded at the end.

    **Arguments:**

    - `model`: any tree with routers in it: a layer, a model, a training state.
    - `threshold`: the new selector of every router. By default `PredictorThreshold` for a router
        with a predictor and `QuantileThreshold` for any other. A quantile that
        `update_router_state` never updated is one that about half of the tokens pass, and one that
        lags behind its router lets another fraction than `capacity` pass:
        `calibrate_thresholds(model, text)` sets it from data.
    - `max_capacity`: of the default thresholds, as in `AbstractThreshold`. To train under `None`,
        call `make_causal` inside the loss: an optimizer's state has the structure of the model it
        was made for, selectors included.

    **Returns:** a copy of `model` with the same parameters and router state.

    **Raises:** `ValueError` for a `threshold` that is not an instance of one, and for a
    `max_capacity` beside it.

    >>> import jax, jax.numpy as jnp, mode
    >>> model = mode.mod_transformer(256, 32, depth=4, num_heads=2, key=jax.random.key(0))
    >>> mode.routers(mode.make_causal(model))[0].select
    QuantileThreshold(max_capacity=1.0)

    *Source:* arXiv:2404.02258, section 3.5.
    """
    if threshold is not None:
        check_instance("threshold", threshold, AbstractThreshold, "QuantileThreshold()")
        if max_capacity != 1.0:
            raise ValueError(
                "`max_capacity` must be left out where `threshold` is given, which has its own: "
                f"got {max_capacity!r} beside {threshold!r}. Write "
                f"`threshold={type(threshold).__name__}(max_capacity={max_capacity!r})`."
            )

    def replace(router: Router) -> Router:
        if router.select.is_causal and not isinstance(router.select, AbstractThreshold):
            return router
        default = QuantileThreshold if router.predictor is None else PredictorThreshold
        select = default(max_capacity) if threshold is None else threshold
        return eqx.tree_at(lambda r: r.select, router, select)

    return map_routers(replace, model)


def causal_selection(
    model: PyTree, routings: Routings, *, threshold: AbstractThreshold | None = None
) -> list[ExpertMask]:
    """Returns what the selectors of `make_causal(model)` would select, given recorded logits.

    Compare the masks with the recorded ones by `selection_accuracy(routing, mask)`. (The causal
    model itself makes other hidden states from its second routed layer on.)

    Arguments and errors are those of `map_router_routings` and `make_causal`.

    **Returns:** one mask per router, of the shape of `routing.selected`, which it is for a router
    whose selector `make_causal` keeps.

    >>> import jax, jax.numpy as jnp, mode
    >>> model = mode.mod_transformer(256, 32, depth=4, num_heads=2, key=jax.random.key(0))
    >>> logits, routings = model(jnp.zeros((2, 64), int))
    >>> (mask,) = mode.causal_selection(model, routings)
    >>> mask.shape
    (2, 2, 64, 1)
    """

    def select(router: Router, routing: Routing) -> ExpertMask:
        if not isinstance(router.select, AbstractThreshold):  # `make_causal` kept it
            return routing.selected
        slots = router.slots(routing.num_tokens)
        inputs = router.inputs(routing.logits, routing.predictor, routing.valid, slots)
        return selected_mask(router.select(inputs).index, routing.num_tokens)

    causal = make_causal(model, threshold=threshold)
    masks = map_router_routings(select, causal, routings)
    return [
        _outer_first(mask, routing, len(router.state.layers))
        for router, routing, mask in zip(routers(causal), routings, masks, strict=True)
    ]


def _outer_first(mask: ExpertMask, routing: Routing, layers: int) -> ExpertMask:
    """Moves the axes of layers back behind those that `jax.vmap` put before them."""
    outer = outer_axes(routing, layers)
    return jnp.moveaxis(mask, range(layers), range(outer, outer + layers))
