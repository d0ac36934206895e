"""Metrics of routings: pure functions of the record that do not count padding."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._types import ExpertMask, Logits, Scalar
from ._losses import masked_mean
from ._record import Routing, check_routing


class RoutingMetrics(eqx.Module):
    """One routing in numbers, over all its groups.

    **Attributes:**

    - `coverage`: fraction of real tokens with a slot of at least one expert.
    - `compute`: filled slots per real token: the computation, relative to one expert on all tokens.
    - `load`: `[choices]`, fraction of the requested assignments that went to each choice.
    - `drop_rate`, `noop_rate`: fraction of them that got no slot, and that chose a no-op. Under
        expert choice no token chooses, and both are 0.
    - `noop_probability`: mean over real tokens of the softmax probability of all no-ops together,
        which the weights of the experts lack; 0 without no-ops.
    - `entropy`: mean over real tokens of the entropy of the softmax over choices, in nats; with a
        single choice, of the sigmoid of the logit and its complement.
    """

    coverage: Scalar
    compute: Scalar
    load: Float[Array, " choices"]
    drop_rate: Scalar
    noop_rate: Scalar
    noop_probability: Scalar
    entropy: Scalar


def routing_metrics(routing: Routing) -> RoutingMetrics:
    """Computes the metrics of a routing.

    >>> import jax, jax.numpy as jnp, mode
    >>> block = mode.PositionWise(jnp.tanh)
    >>> layer = mode.MixtureOfDepths(block, 8, capacity=0.125, key=jax.random.key(0))
    >>> _, (routing,) = layer(jnp.ones((4, 64, 8)))
    >>> float(mode.routing_metrics(routing).coverage)
    0.125
    """
    check_routing(routing)
    dtype = routing.logits.dtype
    tokens = jnp.maximum(jnp.sum(routing.valid), 1).astype(dtype)
    load = jnp.sum(routing.load.reshape(-1, routing.load.shape[-1]), axis=0).astype(dtype)
    requested = jnp.maximum(jnp.sum(load), 1)
    return RoutingMetrics(
        coverage=masked_mean(jnp.any(routing.selected, axis=-1).astype(dtype), routing.valid),
        compute=jnp.sum(routing.num_filled).astype(dtype) / tokens,
        load=load / requested,
        drop_rate=jnp.sum(routing.num_dropped).astype(dtype) / requested,
        noop_rate=jnp.sum(routing.num_noop).astype(dtype) / requested,
        noop_probability=masked_mean(_noop_probability(routing), routing.valid),
        entropy=masked_mean(_entropy(routing.logits), routing.valid),
    )


def _entropy(logits: Logits) -> Float[Array, "*groups tokens"]:
    if logits.shape[-1] == 1:
        logits = jnp.concatenate([logits, jnp.zeros_like(logits)], axis=-1)
    log_probability = jax.nn.log_softmax(logits, axis=-1)
    probability = jnp.exp(log_probability)
    # A choice that a scorer masks, by minus infinity, counts 0 and not NaN.
    return -jnp.sum(jnp.where(probability > 0, probability * log_probability, 0), axis=-1)


def _noop_probability(routing: Routing) -> Float[Array, "*groups tokens"]:
    probability = jax.nn.softmax(routing.logits, axis=-1)
    return jnp.sum(probability[..., routing.num_experts :], axis=-1)


class SelectionAccuracy(eqx.Module):
    """How well a predicted selection matches the recorded one, over real tokens and experts.

    At capacity 0.125 a rule that selects nothing has an accuracy of 0.875, and a recall of 0.

    **Attributes:**

    - `precision`: fraction of the predicted that was selected; 0 if nothing was predicted.
    - `recall`: fraction of the selected that was predicted; 0 if nothing was selected.
    - `accuracy`: fraction of all decisions that are equal.
    """

    precision: Scalar
    recall: Scalar
    accuracy: Scalar


def selection_accuracy(routing: Routing, predicted: ExpertMask) -> SelectionAccuracy:
    """Compares `predicted`, such as a mask of `causal_selection`, with the selection of `routing`.

    `predicted` is `[*groups, tokens, experts]`; `routing` is the truth, recorded under top-k.

    **Raises:** `ValueError` if `predicted` has another shape than `routing.selected`.
    """
    check_routing(routing)
    if predicted.shape != routing.selected.shape:
        raise ValueError(
            f"`predicted` must have the axes [*groups, tokens, experts] of `routing`, "
            f"{routing.selected.shape}, got {predicted.shape}."
        )
    dtype = routing.logits.dtype
    real = jnp.broadcast_to(routing.valid[..., None], predicted.shape)
    selected = routing.selected & real
    return SelectionAccuracy(
        precision=masked_mean(selected.astype(dtype), predicted & real),
        recall=masked_mean(predicted.astype(dtype), selected),
        accuracy=masked_mean((predicted == selected).astype(dtype), real),
    )
