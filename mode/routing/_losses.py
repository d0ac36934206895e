"""Losses on routings: pure functions of the record.

Each loss is a mean over tokens, groups and stacked layers. For all routings of a model take the
mean, weighted by `routing.index.shape[0]` where stacks differ in depth.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from .._types import ExpertLogits, Scalar
from ._record import Routing, check_routing


def masked_mean(values: Float[Array, "*axes"], mask: Bool[Array, "*axes"]) -> Scalar:
    """Returns the mean of `values` where `mask` is true; 0 if it is true nowhere."""
    count = jnp.sum(mask, dtype=values.dtype)
    return jnp.sum(jnp.where(mask, values, 0)) / jnp.maximum(count, 1)


def router_z_loss(routing: Routing) -> Scalar:
    r"""Penalises large logits: the mean over real tokens of $\log^2 \sum_c e^{\text{logit}_c}$.

    With a single choice, as in Mixture-of-Depths, this is the squared logit: it pulls the weight of
    an identity gate to 0 and that of a sigmoid gate to a half. Padding does not count.

    *Source:* arXiv:2202.08906, section 3.2, equation 5 (with a coefficient of 0.001).
    """
    check_routing(routing)
    total = jax.nn.logsumexp(routing.logits, axis=-1)
    return masked_mean(total * total, routing.valid)


def router_l1_loss(routing: Routing) -> Scalar:
    r"""Puts a cost on weights: the mean over real tokens and choices of $|\text{logit}|$.

    Without a cost, the logit of a token that is never selected never changes, and that of one that
    is of no use falls slowly. With it, at a coefficient such as 0.03, a token keeps its weight only
    where the next-token loss pays for it. It suits gates whose weight is the logit or its absolute
    value. Padding does not count.

    *Source:* the linear penalty on routing weights of arXiv:2412.14711, section 3.2, equation 5.
    *Relative to the paper:* on the logits of all tokens, selected or not, with a fixed coefficient.
    """
    check_routing(routing)
    cost = jnp.mean(jnp.abs(routing.logits), axis=-1)
    return masked_mean(cost, routing.valid)


def load_balance_loss(routing: Routing) -> Scalar:
    r"""Penalises unequal loads: $N \sum_c f_c P_c$ over the $N$ choices, the mean over groups.

    $f_c$ is the fraction of the group's assignments that requested choice $c$ (before slots run
    out), $P_c$ the mean probability that its real tokens give to $c$. At perfect balance the loss
    is 1 for every number of experts and every `k`. It is meant for `TokenChoice`; expert choice is
    balanced by construction. No-ops count as choices. Groups of padding alone are left out.

    *Source:* arXiv:2101.03961, section 2.2, equation 4. *Relative to the paper:* per routing group,
    the set whose tokens compete for slots, not per batch; divided by `k`.
    """
    check_routing(routing)
    load = routing.load.astype(routing.logits.dtype)
    frequency = load / jnp.maximum(jnp.sum(load, axis=-1, keepdims=True), 1)
    real = routing.valid[..., None]
    count = jnp.maximum(jnp.sum(real, axis=-2), 1)
    probability = jnp.where(real, jax.nn.softmax(routing.logits, axis=-1), 0)
    mean_probability = jnp.sum(probability, axis=-2) / count.astype(probability.dtype)
    loss = load.shape[-1] * jnp.sum(frequency * mean_probability, axis=-1)
    return masked_mean(loss, jnp.any(routing.valid, axis=-1))


def router_bce(routing: Routing) -> Scalar:
    """Trains the router's own logits to be positive for the tokens that top-k selected.

    The mean binary cross entropy of the logits against the selected mask, for gates whose score is
    the logit, such as `IdentityGate` and `SigmoidGate`. Its gradient reaches the router and the
    hidden states. `routing` must be recorded under top-k: under a threshold the
    target would be its own answer.

    *Source:* the first method of arXiv:2404.02258, section 3.5. The paper gives no coefficient.
    """
    check_routing(routing)
    return _selection_bce(routing.logits[..., : routing.num_experts], routing)


def predictor_bce(routing: Routing) -> Scalar:
    """Trains the predictor's logits to be positive for the tokens that top-k selected.

    As `router_bce`, but no gradient leaves the predictor.

    **Raises:** `ValueError` for the routing of a router without a predictor.

    *Source:* the second method of arXiv:2404.02258, section 3.5.
    """
    check_routing(routing)
    if routing.predictor is None:
        raise ValueError(
            "`routing` must come from a router with a predictor, got one without. Build the layer "
            "with `predictor=Predictor(dim, key=key)`."
        )
    return _selection_bce(routing.predictor, routing)


def _selection_bce(logits: ExpertLogits, routing: Routing) -> Scalar:
    target = routing.selected.astype(logits.dtype)
    loss = -target * jax.nn.log_sigmoid(logits) - (1 - target) * jax.nn.log_sigmoid(-logits)
    return masked_mean(loss, jnp.broadcast_to(routing.valid[..., None], loss.shape))
