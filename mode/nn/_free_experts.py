"""Experts that cost next to nothing: copies of the token, and constants."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from .._dtypes import float32_or_wider
from .._types import Hidden


class FreeExperts(eqx.Module):
    r"""Copy experts, $E(x) = x$, and constant ones, $E(x) = \alpha_1 x + \alpha_2 v$.

    $\alpha = \text{softmax}(W x)$; $v$ is learned and starts at 0. They have neither slots nor
    dispatch: their sum is a weighted sum of the token and of a few vectors.

    **Attributes:**

    - `num_copy`: copy experts.
    - `mix`: $W$ of each constant expert, `[constants, dim, 2]`.
    - `constant`: $v$ of each, `[constants, dim]`.

    *Source:* MoE++, arXiv:2410.07348, section 3.1.
    """

    num_copy: int = eqx.field(static=True)
    mix: Float[Array, "constants dim two"]
    constant: Float[Array, "constants dim"]

    def __init__(self, dim: int, num_copy: int, num_constant: int, *, key: PRNGKeyArray):
        self.num_copy = num_copy
        self.mix = dim**-0.5 * jax.random.normal(key, (num_constant, dim, 2), jnp.float32)
        self.constant = jnp.zeros((num_constant, dim), jnp.float32)

    @property
    def count(self) -> int:
        """How many there are."""
        return self.num_copy + self.mix.shape[0]

    def __call__(self, x: Hidden, weight: Float[Array, "*groups tokens free"]) -> Hidden:
        """Adds up the experts of each token by their weights, those of the copies first."""
        wide = x.astype(float32_or_wider(x.dtype))
        copies, constants = jnp.split(weight.astype(wide.dtype), [self.num_copy], axis=-1)
        logits = jnp.einsum("...d,cda->...ca", wide, self.mix.astype(wide.dtype))
        alpha = jax.nn.softmax(logits, axis=-1) * constants[..., None]
        of_token = jnp.sum(copies, axis=-1) + jnp.sum(alpha[..., 0], axis=-1)
        of_constants = alpha[..., 1] @ self.constant.astype(wide.dtype)
        return (of_token[..., None] * wide + of_constants).astype(x.dtype)
