"""How many tokens an expert may take: the one place where capacity is rounded."""

import math
import numbers
import operator
from fractions import Fraction


Share = int | float | Fraction


def is_finite(value: object) -> bool:
    """Whether `value` is a finite real number: not a string, not an array, not NaN."""
    return isinstance(value, numbers.Real) and math.isfinite(value)


def check_count(name: str, value: object, least: int) -> int:
    """`value` as a Python integer, refused where it is not one of at least `least`.

    **Raises:** `ValueError`, naming `name`.
    """
    try:
        count = operator.index(value)  # pyright: ignore[reportArgumentType]
    except TypeError:
        raise ValueError(
            f"`{name}` must be an integer of at least {least}, got {value!r}."
        ) from None
    if count < least:
        raise ValueError(f"`{name}` must be at least {least}, got {value}.")
    return count


def exact_fraction(name: str, value: Share) -> Fraction:
    """The simplest fraction that equals a float: `0.1` is 1/10, `1.1 / 8` is 11/80, `1 / 3` is 1/3.

    A float is a rounded version of the number its author meant. Taking its binary value instead
    makes `400 * 1.1 / 8` come out above 55, and a ceiling then allots 56 slots.

    **Raises:** `ValueError`, naming `name`, where `value` is not a finite positive number.
    """
    if not is_finite(value) or value <= 0:
        raise ValueError(
            f"`{name}` must be a finite number above 0, got {value!r}. "
            "It is a share of the tokens of a group; 0.125 takes one token in eight."
        )
    if isinstance(value, Fraction):
        return value
    # In the value's own precision: NumPy's float32 of 0.1 means 1/10 too.
    kind = type(value)
    for digits in range(18):
        simplest = Fraction(float(value)).limit_denominator(10**digits)
        if kind(float(simplest)) == value:
            return simplest
    return Fraction(float(value))


def token_capacity(num_tokens: int, fraction: Share, *, multiple_of: int = 1) -> int:
    """The number of slots that `fraction` of a group of tokens comes to.

    $\\min(T, \\max(1, m \\lceil \\lfloor T f \\rfloor / m \\rceil))$, in exact arithmetic: the
    product is rounded down to whole tokens; then up to a multiple of `multiple_of`, so that
    alignment never takes slots away; then clipped to `[1, num_tokens]`. So the share asked for is
    exceeded by alignment alone, and where it comes to less than one token.

    **Arguments:**

    - `num_tokens`: tokens in one routing group, at least 1.
    - `fraction`: slots per token, above 0. Above 1 means every token, as no expert can take a
        token twice.
    - `multiple_of`: alignment of the result in slots, such as the tile of a matrix unit.

    **Returns:** a Python `int`, known when the program is traced.

    **Raises:** `ValueError` for `num_tokens` or `multiple_of` below 1, or a `fraction` that is not
    a finite positive number.

    >>> token_capacity(2048, 0.125), token_capacity(400, 1.1 / 8), token_capacity(4, 0.125)
    (256, 55, 1)
    >>> token_capacity(100, 0.25, multiple_of=8)
    32

    *Source:* the capacity $C$ of arXiv:2404.02258, sections 3.1 and 3.4 and $k = n c / e$ of
    arXiv:2202.09368, section 3. *Relative to the papers:* neither gives a rounding rule.
    """
    num_tokens = check_count("num_tokens", num_tokens, 1)
    multiple_of = check_count("multiple_of", multiple_of, 1)
    budget = math.floor(num_tokens * exact_fraction("fraction", fraction))
    aligned = -(-budget // multiple_of) * multiple_of
    return min(num_tokens, max(1, aligned))
