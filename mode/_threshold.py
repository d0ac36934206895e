"""Causal selection: a token is taken because of what it is, not because of who comes later."""

import abc
from fractions import Fraction

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ._capacity import Share, exact_fraction, is_finite
from ._select import AbstractTokenwise, Request, check_instance


class AbstractRule(eqx.Module):
    """What `Threshold` compares with 0 to decide membership, token by token."""

    @abc.abstractmethod
    def __call__(self, request: Request) -> Float[Array, "*groups tokens experts"]:
        """The margin of every token and expert: above 0 the token is taken."""


class ByPredictor(AbstractRule):
    """The predictor's own logit: sigmoid above a half. The router's weight still gates.

    *Source:* the second method of arXiv:2404.02258, section 3.5.
    """

    def __call__(self, request: Request) -> Float[Array, "*groups tokens experts"]:
        if request.predictor is None:
            raise ValueError(
                "`by=ByPredictor()` needs a router with a predictor, got a router without one. "
                "Build the layer with `predictor=Predictor(dim, key=key)`, or decide "
                "`by=ByQuantile()` or `by=ByLogit()`."
            )
        return request.predictor


class ByLogit(AbstractRule):
    """The router's own logit, for a router trained with `router_bce`.

    *Source:* the first method of arXiv:2404.02258, section 3.5.
    """

    def __call__(self, request: Request) -> Float[Array, "*groups tokens experts"]:
        return request.logits[..., : request.num_experts]


class ByQuantile(AbstractRule):
    """The router's score above the running quantile that `update_state` keeps.

    Needs no predictor and no loss, and sees no future at all. With a softmax gate the score is the
    logarithm of the probability, as that is what `ExpertChoice` compares. A router with several
    `position_bins` has a quantile for each, and a token is held to that of its own position.

    *Source:* Expert Threshold routing, arXiv:2603.11535. *Relative to the paper:* applied to
    Mixture-of-Depths too; quantiles by position.
    """

    def __call__(self, request: Request) -> Float[Array, "*groups tokens experts"]:
        scores = request.scores[..., : request.num_experts]
        missing = range(scores.ndim - request.threshold.ndim)
        return scores - jnp.expand_dims(request.threshold, missing)


class Threshold(AbstractTokenwise):
    """Take every token whose margin is above 0, first come first served up to a static limit.

    Causal: a token's fate depends on itself and, where the limit is reached, on earlier ones.

    **Arguments:**

    - `by`: the rule that gives the margin: `ByPredictor()`, `ByLogit()` or `ByQuantile()`.
    - `limit`: slots as a share of the group's tokens, above 0 and at most 1. `1.0` takes every
        token that asks. `None` means the router's own capacity, so that training under the
        threshold costs what training under top-k did. What was turned away counts as dropped.

    **Raises:** `ValueError` for a `limit` outside (0, 1], or a `by` that is no rule.
    """

    by: AbstractRule = ByQuantile()
    limit: Share | None = eqx.field(static=True, default=1.0)

    def __check_init__(self):
        check_instance("by", self.by, AbstractRule, "ByQuantile()")
        if self.limit is not None and not (is_finite(self.limit) and 0 < self.limit <= 1):
            raise ValueError(
                f"`limit` of `Threshold` must be in (0, 1] or None, got {self.limit!r}. "
                "1.0 takes every token that asks."
            )

    def share(self, fraction: Fraction) -> Fraction:
        return fraction if self.limit is None else exact_fraction("limit", self.limit)

    def asks(self, request: Request) -> Bool[Array, "*groups tokens experts"]:
        return self.by(request) > 0
