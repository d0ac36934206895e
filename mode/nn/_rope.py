"""Rotary embeddings, and how models of long texts stretch their wavelengths."""

import abc
import math

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._checks import check_positive
from .._dtypes import float32_or_wider
from .._types import Ids


Frequencies = Float[Array, " half"]


class AbstractRopeScaling(eqx.Module):
    """Changes the frequencies of rotary embeddings, for positions beyond those of training."""

    @abc.abstractmethod
    def __call__(self, frequency: Frequencies) -> Frequencies:
        """Maps the angle per position of each pair to the one that is used."""


class LinearRopeScaling(AbstractRopeScaling):
    """Divides every frequency by `factor`. arXiv:2306.15595, section 2.3.

    **Raises:** `ValueError` for a factor that is not a finite number above 0.
    """

    factor: float = eqx.field(static=True)

    def __check_init__(self):
        check_positive("factor", self.factor)

    def __call__(self, frequency: Frequencies) -> Frequencies:
        """See `AbstractRopeScaling`."""
        return frequency / self.factor


class Llama3RopeScaling(AbstractRopeScaling):
    r"""Divides low frequencies by `factor`, keeps high ones, and blends those between.

    With $p$ the number of turns that a pair makes in `original_max_positions`, the frequency $f$
    becomes $(1 - s) f / \text{factor} + s f$ with
    $s = (p - \text{low}) / (\text{high} - \text{low})$, cut to [0, 1].

    **Arguments:**

    - `factor`: the divisor of low frequencies.
    - `low_freq_factor`, `high_freq_factor`: numbers of turns, low below high.
    - `original_max_positions`: tokens in the sequences of the first training.

    **Raises:** `ValueError` for a number that is not finite and above 0, or low not below high.

    *Source:* arXiv:2407.21783, section 3.4.1, and the configuration files of Llama 3.1.
    """

    factor: float = eqx.field(static=True)
    low_freq_factor: float = eqx.field(static=True, default=1.0)
    high_freq_factor: float = eqx.field(static=True, default=4.0)
    original_max_positions: int = eqx.field(static=True, default=8192)

    def __check_init__(self):
        for name in ("factor", "low_freq_factor", "high_freq_factor", "original_max_positions"):
            check_positive(name, getattr(self, name))
        if self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(
                "`low_freq_factor` must be below `high_freq_factor`, got "
                f"{self.low_freq_factor} and {self.high_freq_factor}."
            )

    def __call__(self, frequency: Frequencies) -> Frequencies:
        """See `AbstractRopeScaling`."""
        turns = self.original_max_positions * frequency / (2 * math.pi)
        kept = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        kept = jnp.clip(kept, 0, 1)
        return (1 - kept) * frequency / self.factor + kept * frequency


def rope(
    x: Float[Array, "*groups tokens heads head_dim"],
    positions: Ids,
    theta: float = 10_000.0,
    scaling: AbstractRopeScaling | None = None,
) -> Float[Array, "*groups tokens heads head_dim"]:
    """Rotates each pair `(x[i], x[i + head_dim / 2])` by `positions * theta ** (-2 i / head_dim)`.

    **Arguments:**

    - `x`: queries or keys, `[*groups, tokens, heads, head_dim]`, `head_dim` even.
    - `positions`: `[*groups, tokens]`, original positions: a token that was gathered keeps its own.
    - `theta`: base of the wavelengths.
    - `scaling`: changes the frequencies; `None` leaves them as they are.

    **Returns:** an array of the shape and dtype of `x`.

    >>> import jax.numpy as jnp, mode
    >>> mode.rope(jnp.ones((1, 1, 2)), jnp.array([0])).tolist()  # position 0 turns nothing
    [[[1.0, 1.0]]]

    *Source:* arXiv:2104.09864, section 3.4.2, equation 34, in the split-halves layout.
    """
    half = x.shape[-1] // 2
    wide = float32_or_wider(x.dtype)
    frequency = theta ** (-jnp.arange(half, dtype=wide) / half)
    frequency = frequency if scaling is None else scaling(frequency)
    angle = positions[..., None, None].astype(wide) * jnp.expand_dims(frequency, range(x.ndim - 1))
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    # One sweep with a roll: joining two rotated halves takes three times as long on CPU.
    cos = jnp.concatenate([cos, cos], axis=-1)
    sin = jnp.concatenate([-sin, sin], axis=-1)
    x_wide = x.astype(wide)
    return (x_wide * cos + jnp.roll(x_wide, half, axis=-1) * sin).astype(x.dtype)
