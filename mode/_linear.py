"""The small parametric maps that the layers are made of.

Each acts on the last axis of `[..., features]` and computes in the dtype of its input: parameters
are kept in float32 and cast where they are used. All of them serve as an expert (one vector) as
well as a feed-forward (a batch of sequences).
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from ._precision import float32_or_wider


def project(
    x: Float[Array, "*axes in_features"], weight: Float[Array, "in_features out_features"]
) -> Float[Array, "*axes out_features"]:
    """`x @ weight` in the dtype of `x`, as one product of two matrices.

    With its leading axes flattened first: XLA's CPU backend takes twice as long for the gradient of
    a product that contracts two axes at once, [batch, tokens], as for one, [batch * tokens].
    """
    rows = x.reshape(-1, x.shape[-1]) if x.ndim > 2 else x
    return (rows @ weight.astype(x.dtype)).reshape(*x.shape[:-1], weight.shape[-1])


class Linear(eqx.Module):
    """`x @ weight`, without a bias; `weight` is `[in_features, out_features]`.

    **Arguments:**

    - `in_features`, `out_features`: sizes.
    - `std`: standard deviation of the initial weights; by default `in_features ** -0.5`.
    """

    weight: Float[Array, "in_features out_features"]

    def __init__(
        self, in_features: int, out_features: int, *, std: float | None = None, key: PRNGKeyArray
    ):
        scale = in_features**-0.5 if std is None else std
        self.weight = scale * jax.random.normal(key, (in_features, out_features), jnp.float32)

    def __call__(self, x: Float[Array, "*axes in_features"]) -> Float[Array, "*axes out_features"]:
        return project(x, self.weight)


class RMSNorm(eqx.Module):
    """`x / rms(x) * weight`, the mean square in float32 or wider. arXiv:1910.07467, equation 4."""

    weight: Float[Array, " features"]
    eps: float = eqx.field(static=True)

    def __init__(self, features: int, eps: float = 1e-6):
        self.weight = jnp.ones(features, jnp.float32)
        self.eps = eps

    def __call__(self, x: Float[Array, "*axes features"]) -> Float[Array, "*axes features"]:
        wide = x.astype(float32_or_wider(x.dtype))
        mean_square = jnp.mean(wide * wide, axis=-1, keepdims=True)
        normed = (wide * jax.lax.rsqrt(mean_square + self.eps)).astype(x.dtype)
        return normed * jnp.expand_dims(self.weight.astype(x.dtype), range(x.ndim - 1))


class SwiGLU(eqx.Module):
    """`(silu(x @ gate) * (x @ up)) @ down`. arXiv:2002.05202, equation 6.

    **Arguments:**

    - `dim`: features in and out.
    - `hidden`: features inside; by default 8/3 of `dim`, which has the parameters and the FLOPs of
        a `GELU` four times as wide as `dim`.
    """

    gate: Linear
    up: Linear
    down: Linear

    def __init__(self, dim: int, hidden: int | None = None, *, key: PRNGKeyArray):
        hidden = 8 * dim // 3 if hidden is None else hidden
        gate_key, up_key, down_key = jax.random.split(key, 3)
        self.gate = Linear(dim, hidden, key=gate_key)
        self.up = Linear(dim, hidden, key=up_key)
        self.down = Linear(hidden, dim, key=down_key)

    def __call__(self, x: Float[Array, "*axes dim"]) -> Float[Array, "*axes dim"]:
        with jax.named_scope("mode.SwiGLU"):
            return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class GELU(eqx.Module):
    """`gelu(x @ up) @ down`, in the tanh form. arXiv:1606.08415.

    **Arguments:**

    - `dim`: features in and out.
    - `hidden`: features inside; by default 4 times `dim`.
    """

    up: Linear
    down: Linear

    def __init__(self, dim: int, hidden: int | None = None, *, key: PRNGKeyArray):
        hidden = 4 * dim if hidden is None else hidden
        up_key, down_key = jax.random.split(key)
        self.up = Linear(dim, hidden, key=up_key)
        self.down = Linear(hidden, dim, key=down_key)

    def __call__(self, x: Float[Array, "*axes dim"]) -> Float[Array, "*axes dim"]:
        with jax.named_scope("mode.GELU"):
            return self.down(jax.nn.gelu(self.up(x)))
