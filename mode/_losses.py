"""Losses on routings: pure functions of the record. Their coefficients belong to the training
script, and each is a mean, so that they do not grow with the number of layers, groups or tokens.
Layers that are scanned over share one routing, stacked: its loss is their mean too. Of a model's
routings take the mean, weighted by `routing.index.shape[0]` where stacks differ in depth."""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from ._routing import Routing


def masked_mean(values: Float[Array, "*axes"], mask: Bool[Array, "*axes"]) -> Float[Array, ""]:
    """Mean of `values` where `mask` holds; 0 where it holds nowhere."""
    count = jnp.sum(mask, dtype=values.dtype)
    return jnp.sum(jnp.where(mask, values, 0)) / jnp.maximum(count, 1)


def router_z_loss(routing: Routing) -> Float[Array, ""]:
    """Mean over real tokens of $\\log^2 \\sum_c e^{\\text{logit}_c}$: keeps logits small.

    With a single choice, Mixture-of-Depths, this is the squared logit: it pulls the sigmoid of the
    weight to a half and a raw weight to 0. Padding counts for nothing.

    *Source:* arXiv:2202.08906, section 3.2, equation 5 (with a coefficient of 0.001).
    """
    total = jax.nn.logsumexp(routing.logits, axis=-1)
    return masked_mean(total * total, routing.valid)


def load_balance_loss(routing: Routing) -> Float[Array, ""]:
    """$N \\sum_c f_c P_c$ over the $N$ choices, the mean over groups: 1 at perfect balance.

    $f_c$ is the share of the group's assignments that asked for choice $c$ (before capacity
    limits), $P_c$ the mean probability its real tokens give to $c$. The value at balance is 1 for
    every number of experts and every `k`. For `TokenChoice`; expert choice is balanced by
    construction. No-op experts count as choices. Groups of padding only are left out.

    *Source:* arXiv:2101.03961, section 2.2, equation 4. *Relative to the paper:* per routing group,
    the set whose tokens compete for slots, not per batch; divided by `k`.
    """
    load = routing.load.astype(routing.logits.dtype)
    share = load / jnp.maximum(jnp.sum(load, axis=-1, keepdims=True), 1)
    real = routing.valid[..., None]
    count = jnp.maximum(jnp.sum(real, axis=-2), 1)
    probability = jnp.where(real, jax.nn.softmax(routing.logits, axis=-1), 0)
    mean_probability = jnp.sum(probability, axis=-2) / count.astype(probability.dtype)
    loss = load.shape[-1] * jnp.sum(share * mean_probability, axis=-1)
    return masked_mean(loss, jnp.any(routing.valid, axis=-1))


def router_bce(routing: Routing, *, stop_trunk: bool = False) -> Float[Array, ""]:
    """Teaches the router's own logits to say whether top-k took the token: sigmoid above a half.

    Binary cross entropy against the selected mask, the mean over real tokens and experts. It shifts
    the router itself, at a cost of 0.2 to 0.3 % of the language-model loss in the paper.

    **Arguments:**

    - `routing`: recorded under top-k; under a `Threshold` the target would be its own answer.
    - `stop_trunk`: whether the gradient stops at the hidden states and moves the router alone.

    *Source:* the first method of arXiv:2404.02258, section 3.5. The paper gives no coefficient.
    """
    logits = routing.detached_logits if stop_trunk else routing.logits
    return _membership_loss(logits[..., : routing.num_experts], routing)


def predictor_bce(routing: Routing) -> Float[Array, ""]:
    """Teaches the predictor whether top-k took the token. No gradient leaves the predictor.

    `routing` is recorded under top-k: under a `Threshold` the target would be its own answer.

    **Raises:** `ValueError` for the routing of a router without a predictor.

    *Source:* the second method of arXiv:2404.02258, section 3.5.
    """
    if routing.predictor is None:
        raise ValueError(
            "`routing` must come from a router with a predictor, got one without. Build the layer "
            "with `predictor=Predictor(dim, key=key)`."
        )
    return _membership_loss(routing.predictor, routing)


def _membership_loss(
    logits: Float[Array, "*groups tokens experts"], routing: Routing
) -> Float[Array, ""]:
    target = routing.selected.astype(logits.dtype)
    loss = optax.sigmoid_binary_cross_entropy(logits, target)
    return masked_mean(loss, jnp.broadcast_to(routing.valid[..., None], loss.shape))
