"""The sampler: from logits to the next token."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from .._checks import check_count, is_finite
from .._dtypes import float32_or_wider
from .._types import Key, Scalar


class Sampler(eqx.Module):
    r"""Draws a token from $\text{softmax}(\text{logits} / T)$ at temperature $T$, or from the
    likeliest part of it.

    **Arguments:**

    - `temperature`: 0 takes the likeliest token, of equals the one with the lower id, and needs no
        key; 1 samples from the model's own distribution. It and `top_p` may be arrays.
    - `top_k`: keep so many of the likeliest tokens, of equals the ones with lower ids; `None`, or a
        number above the vocabulary's, keeps all.
    - `top_p`: of those, keep the fewest whose probabilities, renormalised, reach `top_p`; at least
        one, and all of them at 1.

    Of logits that are no distribution, with NaN, plus infinity or no finite number, it draws -1.

    **Raises:** `ValueError` for a `temperature` that is negative or not finite, `top_k` below 1,
    or `top_p` outside (0, 1]; at the call, where `temperature` is above 0 and there is no `key`.

    >>> import jax, jax.numpy as jnp, mode
    >>> logits = jnp.array([[0.0, 3.0, 2.0], [5.0, 0.0, 1.0]])
    >>> keys = jax.random.split(jax.random.key(0), 2)
    >>> jax.vmap(mode.Sampler(temperature=0.8, top_k=1))(logits, keys).tolist()
    [1, 0]

    *Source:* top-k, arXiv:1805.04833, section 5.4; top-p, the nucleus of arXiv:1904.09751, section
    3.1. *Relative to the papers:* both together cut by `top_k` first.
    """

    # Numbers that a program takes as data: another temperature is no other program.
    temperature: Scalar | None
    top_k: int | None = eqx.field(static=True)
    top_p: Scalar | None

    def __init__(
        self,
        temperature: int | float | Scalar = 1.0,
        top_k: int | None = None,
        top_p: int | float | Scalar = 1.0,
    ):
        given = isinstance(temperature, jax.Array)  # then its number may not be known yet
        if not given and not (is_finite(temperature) and temperature >= 0):
            raise ValueError(
                f"`temperature` must be a finite number of at least 0, got {temperature!r}. "
                "0 takes the likeliest token."
            )
        if not isinstance(top_p, jax.Array) and not (is_finite(top_p) and 0 < top_p <= 1):
            raise ValueError(
                f"`top_p` must be above 0 and at most 1, got {top_p!r}. 1.0 keeps every token."
            )
        self.top_k = None if top_k is None else check_count("top_k", top_k, 1)
        # At 0 there is nothing to draw, and at 1 nothing to sort: other programs than for the rest.
        is_zero = isinstance(temperature, int | float) and temperature == 0
        self.temperature = None if is_zero else jnp.asarray(temperature, float)
        self.top_p = (
            None if isinstance(top_p, int | float) and top_p == 1 else jnp.asarray(top_p, float)
        )

    def __call__(self, logits: Float[Array, " vocab"], key: Key = None) -> Int[Array, ""]:
        """`logits`: `[vocab]`, of one sequence; `jax.vmap` with a key for each of them keeps a
        sequence's text independent of its neighbours. Returns a token id."""
        if not jnp.issubdtype(logits.dtype, jnp.floating):
            raise ValueError(f"`logits` must be of a floating dtype, got {logits.dtype}.")
        top = jnp.max(logits)  # NaN where any is
        return jnp.where(jnp.isfinite(top), self._draw(logits, key), -1)

    def _draw(self, logits: Float[Array, " vocab"], key: Key) -> Int[Array, ""]:
        if self.temperature is None:
            return jnp.argmax(logits)
        if key is None:
            raise ValueError(
                "`key` is needed by a `Sampler` whose temperature is above 0, got None. Pass "
                "`key=`, or use `temperature=0`, which draws nothing."
            )
        wide = logits.astype(float32_or_wider(logits.dtype))
        top = jnp.max(wide)
        # Relative to the likeliest, so that a tiny temperature leaves 0 for it and not infinity.
        scaled = jnp.where(wide == top, 0, (wide - top) / self.temperature)
        if self.top_k is None and self.top_p is None:
            return jax.random.categorical(key, scaled)
        kept, ids = jax.lax.top_k(scaled, min(int(self.top_k or logits.size), logits.size))
        if self.top_p is not None:
            probability = jax.nn.softmax(kept)
            likelier = jnp.cumsum(probability) - probability  # of all tokens before this one
            # A `top_p` too small for the dtype is 0 in it; the likeliest stays all the same.
            outside = (likelier >= self.top_p).at[0].set(False)
            kept = jnp.where(outside, -jnp.inf, kept)
        return ids[jax.random.categorical(key, kept)]
