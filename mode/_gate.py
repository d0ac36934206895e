"""Gates: from a router's logits to the weights that multiply what the experts return.

Gates are functions of one token's logits. A softmax over the *tokens* of a sequence, which some
public codes use, makes every weight depend on the future; it has no place here.
"""

import abc

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


class AbstractGate(eqx.Module):
    """Weights of the experts for every token, and the scores by which tokens compete.

    A user's own gate implements both methods. Logits and results are float32 or wider.
    """

    @abc.abstractmethod
    def scores(
        self, logits: Float[Array, "*groups tokens choices"]
    ) -> Float[Array, "*groups tokens choices"]:
        """What selectors compare. Does not saturate where the weights do: two tokens differ as long
        as the exponential of what separates a choice from the others is a number above 0."""

    @abc.abstractmethod
    def __call__(
        self,
        logits: Float[Array, "*groups tokens choices"],
        selected: Bool[Array, "*groups tokens experts"],
    ) -> Float[Array, "*groups tokens experts"]:
        """The weight of each expert, for every token, whether it was selected or not."""


class Raw(AbstractGate):
    """The router's output itself, as equation 1 of arXiv:2404.02258 prints it."""

    def scores(
        self, logits: Float[Array, "*groups tokens choices"]
    ) -> Float[Array, "*groups tokens choices"]:
        return logits

    def __call__(
        self,
        logits: Float[Array, "*groups tokens choices"],
        selected: Bool[Array, "*groups tokens experts"],
    ) -> Float[Array, "*groups tokens experts"]:
        return logits[..., : selected.shape[-1]]


class Sigmoid(AbstractGate):
    """`scale * sigmoid(logit)`, as section 3.5 of arXiv:2404.02258 speaks of the weights.

    **Arguments:**

    - `scale`: the largest weight. 2 makes an undecided router (logit 0) pass the update whole.
    """

    scale: float = eqx.field(static=True, default=1.0)

    def scores(
        self, logits: Float[Array, "*groups tokens choices"]
    ) -> Float[Array, "*groups tokens choices"]:
        return logits

    def __call__(
        self,
        logits: Float[Array, "*groups tokens choices"],
        selected: Bool[Array, "*groups tokens experts"],
    ) -> Float[Array, "*groups tokens experts"]:
        return self.scale * jax.nn.sigmoid(logits[..., : selected.shape[-1]])


class Tanh(AbstractGate):
    """`scale * tanh(logit)`: bounded, and 0 for an undecided router. As in arXiv:2412.04449."""

    scale: float = eqx.field(static=True, default=1.0)

    def scores(
        self, logits: Float[Array, "*groups tokens choices"]
    ) -> Float[Array, "*groups tokens choices"]:
        return logits

    def __call__(
        self,
        logits: Float[Array, "*groups tokens choices"],
        selected: Bool[Array, "*groups tokens experts"],
    ) -> Float[Array, "*groups tokens experts"]:
        return self.scale * jnp.tanh(logits[..., : selected.shape[-1]])


class Softmax(AbstractGate):
    """The probability among all choices, no-ops included, not renormalised over the selected.

    *Source:* arXiv:2202.09368, section 3.
    """

    def scores(
        self, logits: Float[Array, "*groups tokens choices"]
    ) -> Float[Array, "*groups tokens choices"]:
        # A bias of plus infinity leaves the other choices no chance: minus infinity, not NaN.
        top = jnp.max(logits, axis=-1, keepdims=True)
        shifted = jnp.where(logits == top, 0, logits - top)
        # The best choice is the 1 of log1p: added to the others, it would swallow them at a gap of
        # 17, and all tokens beyond would tie.
        best = jnp.argmax(logits, axis=-1, keepdims=True)
        places = jnp.expand_dims(jnp.arange(logits.shape[-1]), range(logits.ndim - 1))
        others = jnp.where(places == best, 0, jnp.exp(shifted))
        return shifted - jnp.log1p(jnp.sum(others, axis=-1, keepdims=True))

    def __call__(
        self,
        logits: Float[Array, "*groups tokens choices"],
        selected: Bool[Array, "*groups tokens experts"],
    ) -> Float[Array, "*groups tokens experts"]:
        return jax.nn.softmax(logits, axis=-1)[..., : selected.shape[-1]]


class SelectedSoftmax(AbstractGate):
    """The probability among those experts alone that gave the token a slot.

    The weights of a token that any expert took sum to 1. `Router` refuses it together with
    `TokenChoice(1)`: the one weight would always be 1, and the router would get no gradient.
    """

    def scores(
        self, logits: Float[Array, "*groups tokens choices"]
    ) -> Float[Array, "*groups tokens choices"]:
        return Softmax().scores(logits)

    def __call__(
        self,
        logits: Float[Array, "*groups tokens choices"],
        selected: Bool[Array, "*groups tokens experts"],
    ) -> Float[Array, "*groups tokens experts"]:
        # A token that nobody took has no weights to normalise; softmax over nothing is NaN.
        allowed = selected | ~jnp.any(selected, axis=-1, keepdims=True)
        chosen = jnp.where(allowed, logits[..., : selected.shape[-1]], -jnp.inf)
        return jax.nn.softmax(chosen, axis=-1)
