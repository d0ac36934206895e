"""The number of slots of an expert. A capacity is rounded here and nowhere else."""

import math
from fractions import Fraction

from ._checks import check_count, is_finite


Capacity = int | float | Fraction


def exact_fraction(name: str, value: Capacity) -> Fraction:
    """Returns the simplest fraction that equals a float: `0.1` is 1/10 and `1.1 / 8` is 11/80.

    Its author meant that number; its binary value would put `400 * 1.1 / 8` above 55.
    """
    if not is_finite(value) or isinstance(value, bool) or value <= 0:
        raise ValueError(
            f"`{name}` must be a finite number above 0, got {value!r}. "
            "It is slots per token of a group; 0.125 selects one token in eight."
        )
    if isinstance(value, Fraction):
        return value
    # Compared in the value's own precision: NumPy's float32 of 0.1 means 1/10 too.
    binary = Fraction(float(value))
    candidates = (binary.limit_denominator(10**digits) for digits in range(18))
    return next((c for c in candidates if type(value)(float(c)) == value), binary)


def check_capacity(capacity: Capacity) -> None:
    """Checks that `capacity` is above 0 and at most 1."""
    if not (is_finite(capacity) and 0 < capacity <= 1):
        raise ValueError(
            f"`capacity` must be above 0 and at most 1, got {capacity!r}. It is the fraction of a "
            "group's tokens that the block computes; the paper's best is 0.125."
        )


def token_capacity(num_tokens: int, capacity: Capacity, *, multiple_of: int = 1) -> int:
    r"""Returns the number of slots of one expert in a group of `num_tokens` tokens.

    $\min(T, \max(1, m \lceil \lfloor T c \rfloor / m \rceil))$ for $T$ tokens, a capacity of $c$
    and a multiple of $m$, exactly. Above $T c$ only by alignment, or where $T c$ is below 1.

    **Arguments:**

    - `num_tokens`: tokens in one routing group, at least 1.
    - `capacity`: slots per token, above 0. Above 1, every token has one slot.
    - `multiple_of`: alignment in slots, such as the tile of a matrix unit.

    **Raises:** `ValueError` for a count below 1, or a `capacity` that is not finite and positive.

    >>> token_capacity(2048, 0.125), token_capacity(400, 1.1 / 8), token_capacity(4, 0.125)
    (256, 55, 1)
    >>> token_capacity(100, 0.25, multiple_of=8)
    32

    *Source:* the capacity $C$ of arXiv:2404.02258, sections 3.1 and 3.4, and $k = n c / e$ of
    arXiv:2202.09368, section 3. *Relative to the papers:* neither gives a rounding rule.
    """
    num_tokens = check_count("num_tokens", num_tokens, 1)
    multiple_of = check_count("multiple_of", multiple_of, 1)
    budget = math.floor(num_tokens * exact_fraction("capacity", capacity))
    aligned = -(-budget // multiple_of) * multiple_of
    return min(num_tokens, max(1, aligned))
