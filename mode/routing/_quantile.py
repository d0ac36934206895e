"""The quantile of scores that thresholds follow, without a sort."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from .._types import ExpertLogits, TokenMask


_Bounds = tuple[Int[Array, "1 experts"], Int[Array, "1 experts"]]


def score_quantile(
    scores: ExpertLogits, valid: TokenMask, capacity: float
) -> Float[Array, " experts"]:
    """Returns the score that separates each expert's best tokens from the rest.

    The best are a fraction `capacity` of the real tokens of all groups, at least one. The result
    is half way between the last of them and the next: their minimum if rounding selects all tokens,
    and the lowest float, which every token passes, if `capacity >= 1`.
    """
    if capacity >= 1:
        return jnp.full(scores.shape[-1], jnp.finfo(jnp.float32).min)
    eligible = jnp.where(valid[..., None], scores, -jnp.inf).reshape(-1, scores.shape[-1])
    total = jnp.sum(valid, dtype=jnp.int32)
    rounded = jnp.round(capacity * total.astype(jnp.float32)).astype(jnp.int32)
    count = jnp.clip(rounded, 1, total)
    last = nth_largest(eligible, count)
    reached = jnp.sum(eligible >= last, axis=0, dtype=jnp.int32)
    below = jnp.max(jnp.where(eligible < last, eligible, -jnp.inf), axis=0)
    following = jnp.where(reached > count, last[0], below)
    return jnp.where(count < total, (last[0] + following) / 2, last[0])


def nth_largest(
    values: Float[Array, "rows experts"], count: Int[Array, ""]
) -> Float[Array, "1 experts"]:
    """Returns the `count`-th largest value of each column; NaN where a column has one.

    It bisects over the 32 bits of a float32, whose order as integers is that of the numbers. On a
    mesh only counts of rows move between devices; a sort would bring every row to every device.
    """
    ends = jnp.iinfo(jnp.int32)
    bits = jax.lax.bitcast_convert_type(values + 0.0, jnp.int32)  # one zero: -0.0 + 0.0 is 0.0
    ordered = jnp.where(bits < 0, bits ^ ends.max, bits)

    def halve(_: int | Int[Array, ""], bounds: _Bounds) -> _Bounds:
        # At least `count` rows reach the lower bound; fewer reach a value above the upper bound.
        low, high = bounds
        middle = (low >> 1) + (high >> 1) + ((low | high) & 1)
        reach = jnp.sum(ordered >= middle, axis=0, keepdims=True, dtype=jnp.int32) >= count
        return jnp.where(reach, middle, low), jnp.where(reach, high, middle - 1)

    bounds = (jnp.full_like(ordered[:1], ends.min), jnp.full_like(ordered[:1], ends.max))
    nth, _ = jax.lax.fori_loop(0, 32, halve, bounds)
    largest = jax.lax.bitcast_convert_type(jnp.where(nth < 0, nth ^ ends.max, nth), jnp.float32)
    return jnp.where(jnp.any(jnp.isnan(values), axis=0, keepdims=True), jnp.nan, largest)
