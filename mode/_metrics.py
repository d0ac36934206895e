"""What a routing did, as numbers: pure functions of the record that count no padding."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ._losses import masked_mean
from ._routing import Routing


class RoutingMetrics(eqx.Module):
    """One routing in numbers, over all its groups.

    **Attributes:**

    - `coverage`: share of real tokens that at least one expert took.
    - `compute`: slots filled per real token: what was computed, against one expert on all tokens.
    - `load`: `[choices]`, share of all assignments asked for that went to each choice.
    - `drop_rate`: share of the assignments asked for that found no slot.
    - `noop_rate`: share of the assignments asked for that went to a no-op by choice.
    - `entropy`: mean over real tokens of the entropy of the softmax over choices, in nats; with a
        single choice, of the two outcomes whose odds the logit gives.
    """

    coverage: Float[Array, ""]
    compute: Float[Array, ""]
    load: Float[Array, " choices"]
    drop_rate: Float[Array, ""]
    noop_rate: Float[Array, ""]
    entropy: Float[Array, ""]


def routing_metrics(routing: Routing) -> RoutingMetrics:
    """Coverage, load, rates and entropy of a routing, all groups together.

    >>> import jax, jax.numpy as jnp, mode
    >>> block = mode.TransformerBlock(32, num_heads=4, key=jax.random.key(0))
    >>> layer = mode.MixtureOfDepths(block, 32, capacity=0.125, key=jax.random.key(1))
    >>> _, (routing,) = layer(jax.random.normal(jax.random.key(2), (4, 64, 32)))
    >>> float(mode.routing_metrics(routing).coverage)
    0.125
    """
    dtype = routing.logits.dtype
    tokens = jnp.maximum(jnp.sum(routing.valid), 1).astype(dtype)
    load = jnp.sum(routing.load.reshape(-1, routing.load.shape[-1]), axis=0).astype(dtype)
    asked = jnp.maximum(jnp.sum(load), 1)
    return RoutingMetrics(
        coverage=masked_mean(jnp.any(routing.selected, axis=-1).astype(dtype), routing.valid),
        compute=jnp.sum(routing.num_filled).astype(dtype) / tokens,
        load=load / asked,
        drop_rate=jnp.sum(routing.num_dropped).astype(dtype) / asked,
        noop_rate=jnp.sum(routing.num_noop).astype(dtype) / asked,
        entropy=masked_mean(_entropy(routing.logits), routing.valid),
    )


def _entropy(logits: Float[Array, "*groups tokens choices"]) -> Float[Array, "*groups tokens"]:
    if logits.shape[-1] == 1:
        logits = jnp.concatenate([logits, jnp.zeros_like(logits)], axis=-1)
    log_probability = jax.nn.log_softmax(logits, axis=-1)
    return -jnp.sum(jnp.exp(log_probability) * log_probability, axis=-1)


class Agreement(eqx.Module):
    """How well one rule of membership foretells another, over real tokens and experts.

    Accuracy alone says little: at capacity 0.125 a rule that never takes a token is right 87.5 %
    of the time, with a recall of 0.

    **Attributes:**

    - `precision`: of those predicted, the share that was selected; 0 where none was predicted.
    - `recall`: of those selected, the share that was predicted; 0 where none was selected.
    - `accuracy`: share of all decisions that agree.
    """

    precision: Float[Array, ""]
    recall: Float[Array, ""]
    accuracy: Float[Array, ""]


def agreement(routing: Routing, predicted: Bool[Array, "*groups tokens experts"]) -> Agreement:
    """Precision, recall and accuracy of `predicted` against who was selected in `routing`.

    **Arguments:**

    - `routing`: the truth, as a rule recorded under top-k.
    - `predicted`: `[*groups, tokens, experts]`: `routing.predictor > 0`, `routing.logits > 0`, or
        the `selected` of a routing of the same tokens under another rule.
    """
    if predicted.shape != routing.selected.shape:
        raise ValueError(
            f"`predicted` must have the axes [*groups, tokens, experts] of `routing`, "
            f"{routing.selected.shape}, got {predicted.shape}."
        )
    dtype = routing.logits.dtype
    real = jnp.broadcast_to(routing.valid[..., None], predicted.shape)
    selected = routing.selected & real
    hits = jnp.sum(selected & predicted).astype(dtype)
    return Agreement(
        precision=hits / jnp.maximum(jnp.sum(predicted & real), 1).astype(dtype),
        recall=hits / jnp.maximum(jnp.sum(selected), 1).astype(dtype),
        accuracy=masked_mean((predicted == selected).astype(dtype), real),
    )
