"""Gates: from a router's logits to the weights of the experts' outputs.

A gate is a function of one token's logits. A softmax over the *tokens* of a sequence, as in some
public code, would make every weight depend on the future.
"""

import abc

import equinox as eqx
import jax
import jax.numpy as jnp

from .._types import ExpertLogits, ExpertMask, Logits


class AbstractGate(eqx.Module):
    """Maps logits to the experts' weights, and to the scores by which tokens compete.

    Logits and results are float32 or wider. A gate of your own implements both methods.
    """

    @abc.abstractmethod
    def scores(self, logits: Logits) -> Logits:
        """Returns what selectors compare: logits or log-probabilities, not probabilities.

        It must not saturate where the weights do, so that confident tokens still rank.
        """

    @abc.abstractmethod
    def __call__(self, logits: Logits, selected: ExpertMask) -> ExpertLogits:
        """Returns the weight of every expert for every token, selected or not."""

    def median_score(self, deviation: float) -> float:
        """The median of the scores of logits around 0 with this standard deviation.

        Running thresholds start there: half of the tokens pass before anything is learned.
        """
        del deviation
        return 0.0


class _LogitGate(AbstractGate):
    """A gate that acts on each expert's logit by itself: the score is the logit."""

    def scores(self, logits: Logits) -> Logits:
        return logits


class AbsoluteGate(AbstractGate):
    """The weight is the absolute value of the logit, and so is the score.

    The weight is never negative and free in scale: a cost on it (`router_l1_loss`) pulls tokens of
    no use to 0, from both sides, and a token that was never selected with them into reach.
    """

    def scores(self, logits: Logits) -> Logits:
        return jnp.abs(logits)

    def __call__(self, logits: Logits, selected: ExpertMask) -> ExpertLogits:
        return jnp.abs(logits[..., : selected.shape[-1]])

    def median_score(self, deviation: float) -> float:
        return 0.6744897501960817 * deviation  # the third quartile of a normal distribution


class IdentityGate(_LogitGate):
    """The weight is the logit itself, as equation 1 of arXiv:2404.02258 prints it."""

    def __call__(self, logits: Logits, selected: ExpertMask) -> ExpertLogits:
        return logits[..., : selected.shape[-1]]


class SigmoidGate(_LogitGate):
    """The weight is `scale * sigmoid(logit)`.

    With a `scale` of 2, an undecided router (logit 0) adds the whole update.

    *Source:* section 3.5 of arXiv:2404.02258, which speaks of the sigmoid of the weight.
    """

    scale: float = eqx.field(static=True, default=1.0)

    def __call__(self, logits: Logits, selected: ExpertMask) -> ExpertLogits:
        return self.scale * jax.nn.sigmoid(logits[..., : selected.shape[-1]])


class TanhGate(_LogitGate):
    """The weight is `scale * tanh(logit)`: bounded, and 0 for an undecided router.

    *Source:* arXiv:2412.04449.
    """

    scale: float = eqx.field(static=True, default=1.0)

    def __call__(self, logits: Logits, selected: ExpertMask) -> ExpertLogits:
        return self.scale * jnp.tanh(logits[..., : selected.shape[-1]])


class StraightThroughGate(_LogitGate):
    """Experts that selected a token weigh the same, together 1; the gradient is a sigmoid's.

    So a trained block that gets a router is the same function for the tokens that it selects. The
    backward pass takes the weight for the sigmoid of the logit: a token whose update helps gets a
    larger logit.

    *Source:* arXiv:1308.3432, section 3, for the estimator.
    """

    def __call__(self, logits: Logits, selected: ExpertMask) -> ExpertLogits:
        count = jnp.maximum(jnp.sum(selected, axis=-1, keepdims=True), 1)
        soft = jax.nn.sigmoid(logits[..., : selected.shape[-1]])
        return 1 / count.astype(logits.dtype) + (soft - jax.lax.stop_gradient(soft))


class _ProbabilityGate(AbstractGate):
    """A gate of a softmax: the score is the log-softmax, exact for confident tokens.

    `jax.nn.log_softmax` adds the best choice's 1 to the other exponentials, and from a gap of 17 on
    the 1 swallows them. Here `log1p` adds it.
    """

    def scores(self, logits: Logits) -> Logits:
        # Equal logits give 0 here, so an infinite bias does not become NaN: the others get -inf.
        top = jnp.max(logits, axis=-1, keepdims=True)
        shifted = jnp.where(logits == top, 0, logits - top)
        best = jnp.argmax(logits, axis=-1, keepdims=True)
        choice = jnp.expand_dims(jnp.arange(logits.shape[-1]), range(logits.ndim - 1))
        others = jnp.where(choice == best, 0, jnp.exp(shifted))
        return shifted - jnp.log1p(jnp.sum(others, axis=-1, keepdims=True))


class SoftmaxGate(_ProbabilityGate):
    """The weight is the probability among all choices, not renormalised over the selected experts.

    *Source:* arXiv:2202.09368, section 3.
    """

    def __call__(self, logits: Logits, selected: ExpertMask) -> ExpertLogits:
        return jax.nn.softmax(logits, axis=-1)[..., : selected.shape[-1]]


class SelectedSoftmaxGate(_ProbabilityGate):
    """The weight is the probability among the experts that selected the token.

    The weights of a token with at least one slot sum to 1. `Router` does not accept it with
    `TokenChoice(1)`: the one weight would always be 1, and the router would get no gradient.
    """

    def __call__(self, logits: Logits, selected: ExpertMask) -> ExpertLogits:
        # A token without a slot has no weights to normalise: a softmax over nothing is NaN.
        allowed = selected | ~jnp.any(selected, axis=-1, keepdims=True)
        chosen = jnp.where(allowed, logits[..., : selected.shape[-1]], -jnp.inf)
        return jax.nn.softmax(chosen, axis=-1)
