"""Argument checks that several packages share."""

import inspect
import math
import numbers
import operator
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import jax.numpy as jnp
from jax.core import Tracer

from ._types import Hidden


def is_finite(value: object) -> bool:
    """Whether `value` is a finite real number: not a string, not an array, not NaN."""
    return isinstance(value, numbers.Real) and math.isfinite(value)


def is_known(values: object) -> bool:
    """Whether the numbers of an array can be looked at: not in a trace, nor on other hosts."""
    return not isinstance(values, Tracer) and getattr(values, "is_fully_addressable", True)


def check_count(name: str, value: object, least: int) -> int:
    """Returns `value` as a Python integer of at least `least`."""
    try:
        count = operator.index(value)  # pyright: ignore[reportArgumentType]
    except TypeError:
        raise ValueError(
            f"`{name}` must be an integer of at least {least}, got {value!r}."
        ) from None
    if count < least:
        raise ValueError(f"`{name}` must be at least {least}, got {value}.")
    return count


def check_positive(name: str, value: object) -> float:
    """Returns `value`, a finite number above 0."""
    if isinstance(value, bool) or not (is_finite(value) and value > 0):  # pyright: ignore
        raise ValueError(f"`{name}` must be a finite number above 0, got {value!r}.")
    return float(value)  # pyright: ignore[reportArgumentType]


def check_instance(name: str, value: object, kind: type, example: str) -> None:
    """Checks that `value` is an instance of the strategy `kind`, such as `example`."""
    if not isinstance(value, kind):
        got = type_name(value) if isinstance(value, type) else repr(value)
        raise ValueError(
            f"`{name}` must be an instance of `{kind.__name__}`, such as `{example}`, got {got}."
        )


def can_be_called(function: Any, *args: object, **kwargs: object) -> bool:
    """Whether a call with these arguments fits the signature of `function`."""
    try:
        inspect.signature(function).bind(*args, **kwargs)
    except TypeError:
        return False
    except ValueError:  # compiled functions may have no signature
        pass
    return True


def takes_key(function: Callable[..., object]) -> bool:
    """Whether `function` has a parameter `key`, as Equinox's modules have."""
    try:
        return "key" in inspect.signature(function).parameters
    except ValueError:  # compiled functions may have no signature
        return False


def type_name(value: object) -> str:
    """Returns the name of a value's type, where its repr would be too long for an error."""
    return f"the class `{value.__name__}`" if isinstance(value, type) else type(value).__name__


def check_kept_shape(name: str, got: tuple[int, ...], given: tuple[int, ...]) -> None:
    """Checks that the module `name` returned the shape that it was given."""
    if got != given:
        raise ValueError(
            f"`{name}` must keep the shape of its input, {given}, got {got}: its result is added "
            "to the residual stream."
        )


def check_array(name: str, value: object) -> None:
    """Checks that `value` is an array, and not a list of numbers."""
    if not hasattr(value, "ndim"):
        raise ValueError(
            f"`{name}` must be an array, got {type(value).__name__}. `jnp.asarray` makes one."
        )


def check_hidden(x: Hidden, dim: int | None = None) -> None:
    """Checks that `x` holds the hidden states of at least one token, with `dim` features."""
    check_array("x", x)
    if x.ndim < 2:
        raise ValueError(
            f"`x` must have the axes [*groups, tokens, dim], got shape {x.shape}. "
            "One sequence is [tokens, dim]; a batch of them is [batch, tokens, dim]."
        )
    if 0 in x.shape[:-1]:
        raise ValueError(f"`x` must hold at least one token, got shape {x.shape}.")
    if dim is not None and x.shape[-1] != dim:
        raise ValueError(
            f"`x` must have {dim} features on its last axis, as this layer was built with "
            f"`dim={dim}`, got shape {x.shape}."
        )
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(
            f"`x` must be of a floating dtype, got {x.dtype}. Token ids are embedded first."
        )


def check_installed(package: str, extra: str) -> None:
    """Checks that a package is installed which an extra of this one brings."""
    if find_spec(package) is None:
        raise ModuleNotFoundError(
            f"this needs the package `{package}`, which the extra `{extra}` installs: "
            f"`pip install 'mode-jax[{extra}]'`, or in a clone `pip install -e '.[{extra}]'`."
        )
