"""Join the routings of consecutive pieces of a text into those of the whole."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PyTree

from .._types import Ids
from ..nn import AbstractRoutedLayer, Routings
from ..routing import Router, Routing


def join_routings(model: PyTree, pieces: list[Routings]) -> Routings:
    """Joins the routings that consecutive tokens of the same sequences got, router by router.

    The tokens of a router inside a routed layer are its slots. Joining moves the empty slots of all
    pieces to the end, there and in the records of the routers inside.
    """
    if len(pieces) == 1:
        return pieces[0]
    joined: list[Routing] = []
    orders: list[Int[Array, "*groups slots"]] = []
    for same, outer in zip(zip(*pieces, strict=True), _outer_routers(model), strict=True):
        routing = _concatenated(same)
        if outer is not None:
            routing = _with_tokens_in(routing, orders[outer])
        # Empty slots stand behind those that hold a token.
        order = jnp.argsort(routing.index, axis=-1)
        orders.append(order[..., 0, :])
        index = jnp.take_along_axis(routing.index, order, axis=-1)
        weight = jnp.take_along_axis(routing.weight, order, axis=-1)
        joined.append(dataclasses.replace(routing, index=index, weight=weight))
    return tuple(joined)


def _outer_routers(model: PyTree) -> list[int | None]:
    """For each router of the model, the number of the router of the depth that it is inside."""
    outer: list[int | None] = []

    def is_found(node: PyTree) -> bool:
        return isinstance(node, Router | AbstractRoutedLayer)

    def visit(node: PyTree, inside: int | None) -> None:
        for child in filter(is_found, jax.tree.leaves(node, is_leaf=is_found)):
            outer.append(inside)
            if isinstance(child, AbstractRoutedLayer):
                visit(child.block, len(outer) - 1)

    visit(model, None)
    return outer


def _concatenated(pieces: tuple[Routing, ...]) -> Routing:
    """The records one behind the other, with the empty slots of each piece where they are."""
    *starts, num_tokens = itertools.accumulate((0, *(piece.num_tokens for piece in pieces)))
    index = [
        jnp.where(piece.filled, piece.index + start, num_tokens)
        for piece, start in zip(pieces, starts, strict=True)
    ]
    predictors = [piece.predictor for piece in pieces if piece.predictor is not None]
    return Routing(
        index=jnp.concatenate(index, axis=-1),
        weight=jnp.concatenate([piece.weight for piece in pieces], axis=-1),
        logits=jnp.concatenate([piece.logits for piece in pieces], axis=-2),
        load=jnp.sum(jnp.stack([piece.load for piece in pieces]), axis=0),
        valid=jnp.concatenate([piece.valid for piece in pieces], axis=-1),
        predictor=jnp.concatenate(predictors, axis=-2) if predictors else None,
    )


def _with_tokens_in(routing: Routing, order: Ids) -> Routing:
    """The same record of tokens that stand in another order."""
    num_tokens = order.shape[-1]
    position = jnp.argsort(order, axis=-1)[..., None, :]  # where each token comes to stand
    token = jnp.take_along_axis(position, jnp.minimum(routing.index, num_tokens - 1), axis=-1)

    def moved(values: Array) -> Array:
        return jnp.take_along_axis(values, order[..., None], axis=-2)

    return dataclasses.replace(
        routing,
        index=jnp.where(routing.filled, token, num_tokens),
        logits=moved(routing.logits),
        valid=jnp.take_along_axis(routing.valid, order, axis=-1),
        predictor=None if routing.predictor is None else moved(routing.predictor),
    )
