"""All routers of a model at once."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from .._dtypes import Module, is_shaped
from ._record import RouterState, Routing
from ._router import Router


Result = TypeVar("Result")


def _is_router(node: PyTree) -> bool:
    return isinstance(node, Router)


def routers(model: PyTree) -> list[Router]:
    """Lists every router in `model`, in the order in which their routings are returned.

    The routers of stacked layers are one router with stacked leaves.
    """
    return [node for node in jax.tree.leaves(model, is_leaf=_is_router) if _is_router(node)]


def map_routers(function: Callable[[Router], Router], model: Module) -> Module:
    """Applies `function` to each router and returns a copy of `model` with the results.

    >>> import equinox as eqx, jax, mode
    >>> model = mode.mod_transformer(256, 32, depth=4, num_heads=2, key=jax.random.key(0))
    >>> random = lambda router: eqx.tree_at(lambda r: r.select, router, mode.RandomChoice())
    >>> control = mode.map_routers(random, model)
    """
    return jax.tree.map(
        lambda node: function(node) if _is_router(node) else node, model, is_leaf=_is_router
    )


def is_trainable(model: PyTree) -> PyTree[bool]:
    """Makes a filter for `eqx.partition`: true for parameters, false for router state and the rest.

    With `eqx.is_inexact_array`, weight decay would pull thresholds and biases to 0. `model` may be
    one of shapes (`eqx.filter_eval_shape`).

    >>> import equinox as eqx, jax, mode
    >>> model = mode.mod_transformer(256, 32, depth=4, num_heads=2, key=jax.random.key(0))
    >>> parameters, rest = eqx.partition(model, mode.is_trainable(model))
    >>> assert mode.routers(parameters)[0].state.threshold is None
    """

    def decide(node: PyTree) -> PyTree[bool]:
        if isinstance(node, RouterState):
            return jax.tree.map(lambda _: False, node)
        return is_shaped(node) and jnp.issubdtype(node.dtype, jnp.inexact)

    return jax.tree.map(decide, model, is_leaf=lambda node: isinstance(node, RouterState))


def count_parameters(model: PyTree) -> int:
    """Returns how many numbers of a model, or of its shapes, are parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(eqx.filter(model, is_trainable(model))))


def outer_axes(routing: Routing, layers: int) -> int:
    """Returns how many axes were put before the `layers` axes of stacked layers."""
    return max(0, routing.valid.ndim - 1 - routing.group_axes - layers)


def _layers_first(routing: Routing, layers: int) -> Routing:
    outer = outer_axes(routing, layers)
    if not outer:
        return routing
    axes = tuple(range(layers))
    return jax.tree.map(lambda leaf: jnp.moveaxis(leaf, [outer + a for a in axes], axes), routing)


def map_router_routings(
    function: Callable[[Router, Routing], Result], model: PyTree, routings: Sequence[Routing]
) -> list[Result]:
    """Applies `function(router, routing)` to every router of `model` and the routing it returned.

    `routings` is the tuple that the model's call returned, one routing per router. Of stacked
    layers `function` gets one at a time, and its results are stacked again. Further leading axes,
    of `jax.vmap(model)` or of micro-batches that were scanned over, become axes of groups.

    **Raises:** `ValueError` if the routings cannot be those of the model's routers.
    """
    if not isinstance(routings, tuple | list):
        raise ValueError(
            "`routings` must be the tuple that the model's call returned, one routing per router, "
            f"got a single {type(routings).__name__}. Pass `(routing,)`."
        )
    other = next((part for part in routings if not isinstance(part, Routing)), None)
    if other is not None:
        raise ValueError(
            "`routings` must be the tuple of `Routing` that the model's call returned, got "
            f"{type(other).__name__} in it. It is the second of the two results: `model(x)[1]`."
        )
    own = routers(model)
    if len(own) != len(routings):
        raise ValueError(
            f"`routings` must hold one routing per router of `model`, {len(own)}, got "
            f"{len(routings)}. Pass the tuple that the model's call returned."
        )
    results = []
    for router, routing in zip(own, routings, strict=True):
        layers = router.state.layers
        routing = _layers_first(routing, len(layers))
        expected = (layers, router.num_experts, router.state.bias.shape[-1])
        got = (routing.index.shape[: len(layers)], routing.num_experts, routing.logits.shape[-1])
        if expected != got:
            raise ValueError(
                "`routings` must be in the order of the routers of `model`: expected [*layers], "
                f"experts and choices {expected}, got {got}."
            )
        call = function
        for _ in layers:
            call = eqx.filter_vmap(call)
        results.append(call(router, routing))
    return results
