"""Asserts the shapes of routings, that slots are filled, skipped tokens kept, and routers learn."""

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from .._capacity import token_capacity
from .._types import Key, Scalar
from ..routing import Replay, is_trainable, routers
from ._case import Case, Info, Model, Shaped, call_model


def assert_static_shapes(model: Model, x: Shaped, info: Info = None, *, key: Key = None) -> None:
    """Asserts that every shape is what the configuration says, before anything runs.

    Hidden states keep shape and dtype; token ids become logits, `[*groups, tokens, vocab]`. Every
    routing has the slots of its router's capacity. Arrays of `model`, `x` and `info` may be
    `jax.ShapeDtypeStruct`, so a model for a large accelerator can be checked on a laptop.
    """
    case = Case(model, x, info, key, shapes=True)
    output, routings = eqx.filter_eval_shape(call_model, model, x, info, case.key)
    chex.assert_shape(output, (*x.shape, None) if case.has_ids else x.shape)
    chex.assert_type(output, float if case.has_ids else x.dtype)
    for router, routing in case.pair_routers(routings):
        groups = (*router.state.layers, *case.shape[:-1])
        tokens, select = routing.num_tokens, router.select
        slots = select.index.shape[-1] if isinstance(select, Replay) else router.slots(tokens)
        choices = router.state.bias.shape[-1]
        chex.assert_shape([routing.index, routing.weight], (*groups, router.num_experts, slots))
        chex.assert_shape(routing.logits, (*groups, tokens, choices))
        chex.assert_shape(routing.load, (*groups, choices))
        chex.assert_shape(routing.valid, (*groups, tokens))
        chex.assert_type([routing.index, routing.load], jnp.int32)
        if jnp.finfo(routing.logits.dtype).bits < 32:
            raise AssertionError(f"the router computed in {routing.logits.dtype}, below float32.")


def assert_exact_capacity(model: Model, x: Array, info: Info = None, *, key: Key = None) -> None:
    """Asserts that every expert selects exactly its capacity of tokens, each once, in time order.

    In a group with fewer real tokens than slots, all real tokens must be selected. This is for
    selectors that fill their slots; `TokenChoice` and the thresholds may leave some empty.
    """
    case = Case(model, x, info, key)
    _check_routed(model)
    for router, routing in case.pair_routers(case.run()[1]):
        slots = token_capacity(routing.num_tokens, router.capacity)
        filled, index = np.asarray(routing.filled), np.asarray(routing.index)
        if index.shape[-1] != slots:
            raise AssertionError(
                f"an expert has {index.shape[-1]} slots, but its capacity of {routing.num_tokens} "
                f"tokens is {slots}."
            )
        real = np.asarray(routing.valid).sum(axis=-1)[..., None]
        empty = int((np.minimum(real, slots) - filled.sum(axis=-1)).clip(0).sum())
        if empty:
            raise AssertionError(
                f"{empty} slots are empty that a token could fill, as `TokenChoice` and the "
                "thresholds may leave some: this is for selectors that fill their slots."
            )
        if not np.all((np.diff(index, axis=-1) > 0) | ~filled[..., 1:]):
            raise AssertionError(
                "the tokens of an expert are not in time order, or a token is there twice."
            )


def assert_residual_identity(layer: Model, x: Array, info: Info = None, *, key: Key = None) -> None:
    """Asserts that tokens which the first router did not select leave the layer bit for bit.

    For one layer, on hidden states: `MixtureOfDepths`, or `Residual(MixtureOfExperts(...))` without
    shared experts. A layer that changes every token, as integrated MoDE's attention does, fails.
    """
    case = Case(layer, x, info, key)
    if case.has_ids:
        raise ValueError(
            f"`x` must be hidden states, [*groups, tokens, dim], got the dtype {x.dtype}. Pass one "
            "layer of the model and hidden states."
        )
    hidden, routings = case.run()
    if not routings:
        raise AssertionError("the layer returned no routing: no token was skipped.")
    skipped = ~np.asarray(routings[0].selected).any(axis=-1)
    if skipped.shape != case.shape:
        raise AssertionError("the routing has an axis of layers: pass one layer, not a stack.")
    if not skipped.any():
        raise AssertionError(
            "the first router selected every token: there is nothing to check. Pass more tokens, "
            "or a layer with a smaller capacity."
        )
    before, after = np.asarray(x)[skipped], np.asarray(hidden)[skipped]
    if before.tobytes() != after.tobytes():
        changed = np.any(before != after, axis=-1)
        raise AssertionError(
            f"{changed.sum()} of {len(changed)} tokens that the first router skipped were changed. "
            "This assertion is not for a layer that changes every token, as by a shared expert."
        )


def assert_router_gradients(model: Model, x: Array, info: Info = None, *, key: Key = None) -> None:
    """Asserts that the gradient of the output reaches every router's scorer, and is finite."""
    case = Case(model, x, info, key)
    _check_routed(model)
    valid = jnp.asarray(case.valid())
    parameters, rest = eqx.partition(model, is_trainable(model))

    @jax.jit
    @jax.grad
    def gradient(parameters: PyTree) -> Scalar:
        output, _ = call_model(eqx.combine(parameters, rest), x, info, case.key)
        return jnp.sum(jnp.sin(jnp.where(valid[..., None], output.astype(jnp.float32), 0)))

    gradients = gradient(parameters)
    if not all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradients)):
        raise AssertionError("a gradient is not finite.")
    pairs = zip(routers(model), routers(gradients), strict=True)
    for number, (router, router_gradient) in enumerate(pairs):
        stacked = len(router.state.layers)
        for leaf in jax.tree.leaves(router_gradient.scorer):
            norms = np.abs(np.asarray(leaf)).sum(axis=tuple(range(stacked, leaf.ndim)))
            if not np.all(norms > 0):
                raise AssertionError(f"no gradient reaches the scorer of router {number}.")


def _check_routed(model: Model) -> None:
    if not routers(model):
        raise AssertionError("the model has no router: there is nothing to check.")
