"""The linear map and the norms that the layers are made of.

All act on the last axis. Parameters are cast to the dtype of `x` at each use.
"""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from ._dtypes import float32_or_wider


def along_last(
    vector: Float[Array, " features"], x: Float[Array, "*axes features"]
) -> Float[Array, "*ones features"]:
    """Gives a vector the dtype and the number of axes of `x`, to multiply or add it."""
    return jnp.expand_dims(vector.astype(x.dtype), range(x.ndim - 1))


def project(
    x: Float[Array, "*axes in_features"],
    weight: Float[Array, "in_features out_features"],
    bias: Float[Array, " out_features"] | None = None,
) -> Float[Array, "*axes out_features"]:
    """Multiplies `x @ weight` in the dtype of `x`, as one product of two matrices, and adds a bias
    where there is one."""
    # The gradient of a product that contracts one axis takes half as long on XLA's CPU backend.
    rows = x.reshape(-1, x.shape[-1]) if x.ndim > 2 else x
    product = (rows @ weight.astype(x.dtype)).reshape(*x.shape[:-1], weight.shape[-1])
    return product if bias is None else product + along_last(bias, product)


class Linear(eqx.Module):
    """`x @ weight`, plus a bias where there is one, which starts at 0.

    The standard deviation of the initial weights is `std`, by default `in_features ** -0.5`.
    """

    weight: Float[Array, "in_features out_features"]
    bias: Float[Array, " out_features"] | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        use_bias: bool = False,
        std: float | None = None,
        key: PRNGKeyArray,
    ) -> None:
        scale = in_features**-0.5 if std is None else std
        self.weight = scale * jax.random.normal(key, (in_features, out_features), jnp.float32)
        self.bias = jnp.zeros(out_features, jnp.float32) if use_bias else None

    def __call__(self, x: Float[Array, "*axes in_features"]) -> Float[Array, "*axes out_features"]:
        return project(x, self.weight, self.bias)


class RMSNorm(eqx.Module):
    """`x / sqrt(mean(x ** 2) + eps) * weight`, with the mean square in float32 or wider.

    *Source:* arXiv:1910.07467, equation 4.
    """

    weight: Float[Array, " features"]
    eps: float = eqx.field(static=True)

    def __init__(self, features: int, eps: float = 1e-6) -> None:
        self.weight = jnp.ones(features, jnp.float32)
        self.eps = eps

    def __call__(self, x: Float[Array, "*axes features"]) -> Float[Array, "*axes features"]:
        wide = x.astype(float32_or_wider(x.dtype))
        mean_square = jnp.mean(wide * wide, axis=-1, keepdims=True)
        normed = (wide * jax.lax.rsqrt(mean_square + self.eps)).astype(x.dtype)
        return normed * along_last(self.weight, x)


class LayerNorm(eqx.Module):
    """`(x - mean) / sqrt(variance + eps) * weight + bias`, statistics in float32 or wider.

    *Source:* arXiv:1607.06450, equations 3 and 4.
    """

    weight: Float[Array, " features"]
    bias: Float[Array, " features"]
    eps: float = eqx.field(static=True)

    def __init__(self, features: int, eps: float = 1e-5) -> None:
        self.weight = jnp.ones(features, jnp.float32)
        self.bias = jnp.zeros(features, jnp.float32)
        self.eps = eps

    def __call__(self, x: Float[Array, "*axes features"]) -> Float[Array, "*axes features"]:
        wide = x.astype(float32_or_wider(x.dtype))
        wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
        variance = jnp.mean(wide * wide, axis=-1, keepdims=True)
        normed = (wide * jax.lax.rsqrt(variance + self.eps)).astype(x.dtype)
        return normed * along_last(self.weight, x) + along_last(self.bias, x)


Norm = RMSNorm | LayerNorm
MakeNorm = Callable[[int], Norm]
