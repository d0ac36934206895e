"""The predictor: it learns which tokens top-k selects, for use where the future is unknown."""

import equinox as eqx
import jax
from jaxtyping import PRNGKeyArray

from .._linear import Linear
from .._types import ExpertLogits, Hidden


class Predictor(eqx.Module):
    """Predicts from a token alone whether top-k selects it: one logit per expert.

    The router stops the gradient to its input, and decides by it only which tokens are selected.

    **Arguments:**

    - `dim`, `num_experts`: as in its router.
    - `hidden`: features of the hidden layer; by default half of `dim`.

    *Source:* the "second router" of arXiv:2404.02258, section 3.5, which gives no width.
    """

    up: Linear
    down: Linear

    def __init__(
        self, dim: int, num_experts: int = 1, hidden: int | None = None, *, key: PRNGKeyArray
    ) -> None:
        hidden = max(1, dim // 2) if hidden is None else hidden
        up_key, down_key = jax.random.split(key)
        self.up = Linear(dim, hidden, key=up_key)
        self.down = Linear(hidden, num_experts, key=down_key)

    def __call__(self, x: Hidden) -> ExpertLogits:
        """`x`: `[*groups, tokens, dim]`. Returns `[*groups, tokens, experts]`."""
        return self.down(jax.nn.silu(self.up(x)))
