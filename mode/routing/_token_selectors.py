"""Selectors that decide token by token: the thresholds, and token choice."""

import abc
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from .._capacity import Capacity
from .._checks import check_count, is_finite
from .._types import ExpertLogits, ExpertMask
from ._selector import AbstractTokenSelector, RoutingInputs


class AbstractThreshold(AbstractTokenSelector):
    """Selects every token whose margin is above 0, in time order, while slots are left.

    A threshold of your own implements `margin`.

    **Arguments:**

    - `max_capacity`: slots as a fraction of the group's tokens, above 0 and at most 1. `1.0` has a
        slot for every token. `None` is the router's own capacity, so that training under the
        threshold costs as much as training under top-k. Tokens without a slot count as dropped.

    **Raises:** `ValueError` for a `max_capacity` outside (0, 1].
    """

    max_capacity: Capacity | None = eqx.field(  # pyright: ignore[reportIncompatibleVariableOverride]
        static=True, default=1.0
    )

    def __check_init__(self) -> None:
        given = self.max_capacity
        if given is not None and not (is_finite(given) and 0 < given <= 1):
            raise ValueError(
                f"`max_capacity` of `{type(self).__name__}` must be in (0, 1] or None, got "
                f"{given!r}. 1.0 has a slot for every token."
            )

    @abc.abstractmethod
    def margin(self, inputs: RoutingInputs) -> ExpertLogits:
        """Returns the margin of every token and expert: above 0 the token requests the expert."""

    def requested_mask(self, inputs: RoutingInputs) -> ExpertMask:
        return self.margin(inputs) > 0


class QuantileThreshold(AbstractThreshold):
    """Selects a token if its score is above the running quantile of `update_router_state`.

    It needs no predictor and no loss. Argument as in `AbstractThreshold`.

    *Source:* Expert Threshold routing, arXiv:2603.11535. *Relative to the paper:* applied to
    Mixture-of-Depths too.
    """

    def margin(self, inputs: RoutingInputs) -> ExpertLogits:
        scores = inputs.scores[..., : inputs.num_experts]
        return scores - jnp.expand_dims(inputs.threshold, range(scores.ndim - 1))


class PredictorThreshold(AbstractThreshold):
    """Selects a token if its predictor's logit is positive, so that the sigmoid is above a half.

    Argument as in `AbstractThreshold`.

    **Raises:** `ValueError` at the call, for a router without a predictor.

    *Source:* the second method of arXiv:2404.02258, section 3.5.
    """

    def margin(self, inputs: RoutingInputs) -> ExpertLogits:
        if inputs.predictor is None:
            raise ValueError(
                "`PredictorThreshold` needs a router with a predictor, got a router without one. "
                "Build the layer with `predictor=Predictor(dim, key=key)`, or use "
                "`QuantileThreshold()` or `LogitThreshold()`."
            )
        return inputs.predictor


class LogitThreshold(AbstractThreshold):
    """Selects a token if the router's own logit is positive; for training with `router_bce`.

    It goes with a gate whose score is the logit, such as `IdentityGate()`: under `AbsoluteGate()`
    top-k selects by the size of the logit, whatever its sign.

    Argument as in `AbstractThreshold`.

    *Source:* the first method of arXiv:2404.02258, section 3.5.
    """

    def margin(self, inputs: RoutingInputs) -> ExpertLogits:
        return inputs.logits[..., : inputs.num_experts]


class UpdateThreshold(AbstractTokenSelector):
    """Selects a token for another round of a `Recursion` while the last one changed it enough.

    Early exit by the size of the update: a token takes part if the norm of its last update is at
    least `least` times the norm of its hidden state before. All tokens take part in the first
    round, and slots are those of the round's capacity. The router's score decides nothing; its
    weight still multiplies the update.

    **Arguments:**

    - `least`: the smallest relative change that calls for another round, above 0.

    **Raises:** `ValueError` for a `least` that is not a number above 0; at the call, in a layer
    without rounds.

    >>> import jax, jax.numpy as jnp, mode
    >>> k1, k2 = jax.random.split(jax.random.key(0))
    >>> block = mode.TransformerBlock(32, num_heads=4, key=k1)
    >>> rule = mode.UpdateThreshold(least=0.1)
    >>> layer = mode.Recursion(block, 32, (1, 1, 1), select=rule, key=k2)
    >>> hidden, routings = layer(jnp.ones((4, 64, 32)))
    >>> int(routings[0].load.sum())
    256

    *Source:* arXiv:2502.05171, section 6.1, where a looped model stops without training for it.
    *Relative to the paper:* hidden states of two rounds are compared, not predictions.
    """

    least: float = eqx.field(static=True)
    max_capacity: ClassVar[Capacity | None] = None

    def __check_init__(self) -> None:
        if not (is_finite(self.least) and self.least > 0):
            raise ValueError(
                f"`least` of `UpdateThreshold` must be a number above 0, got {self.least!r}."
            )

    def requested_mask(self, inputs: RoutingInputs) -> ExpertMask:
        if inputs.change is None:
            raise ValueError(
                "`UpdateThreshold` needs the rounds of a `Recursion`, got a layer without rounds. "
                "Use `LogitThreshold()` or `QuantileThreshold()`."
            )
        return (inputs.change >= self.least)[..., None]


class TokenChoice(AbstractTokenSelector):
    """Each token requests its best `k` choices, experts or no-ops.

    A request is dropped where the expert has no slot left. Tokens are served *token-major*: all
    choices of a token come before any choice of the next one. The usual order, every first choice
    before any second choice, lets a later token evict an earlier one and so leaks the future. A
    no-op is one of the `k` choices, never runs out of slots, and costs nothing.

    **Arguments:**

    - `k`: choices per token, from 1 to the number of choices.

    **Raises:** `ValueError` for `k` below 1 or above the number of choices.

    *Source:* arXiv:2404.02258, sections 3.3 and 4.3 (no-op experts).
    """

    k: int = eqx.field(static=True)
    max_capacity: ClassVar[Capacity | None] = None

    def __check_init__(self) -> None:
        check_count("k` of `TokenChoice", self.k, 1)

    def requested_mask(self, inputs: RoutingInputs) -> Bool[Array, "*groups tokens choices"]:
        choices = inputs.scores.shape[-1]
        if self.k > choices:
            raise ValueError(
                "`k` of `TokenChoice` must be at most the number of choices (experts and no-op "
                f"experts), {choices}, got {self.k}. Lower `k` or add experts."
            )
        scores = jnp.where(jnp.isnan(inputs.scores), -jnp.inf, inputs.scores)  # NaN is no choice
        best, chosen = jax.lax.top_k(jax.lax.stop_gradient(scores), self.k)
        wanted = jax.nn.one_hot(chosen, choices, dtype=bool) & (best > -jnp.inf)[..., None]
        return jnp.any(wanted, axis=-2)
