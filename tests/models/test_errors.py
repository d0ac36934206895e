"""Errors of models: each names the argument, the rule, the value and the fix."""

import functools
import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mode
from tests.helpers import assert_number_is_refused, each_number
from tests.layers import DIM, VOCAB, transformer_block, with_selector


pytestmark = pytest.mark.usefixtures("without_type_checks")

KEY = jax.random.key(0)


def dense(key: Any) -> mode.Residual:
    return mode.Residual(transformer_block(key))


def mod_transformer(**options: Any) -> mode.Transformer:
    return mode.mod_transformer(VOCAB, DIM, **{"depth": 4, "num_heads": 2, "key": KEY, **options})


def transformer(*period: Any, **options: Any) -> mode.Transformer:
    return mode.Transformer(VOCAB, DIM, period, key=KEY, **options)


@functools.cache
def model() -> mode.Transformer:
    return mod_transformer()


NUMBERS: list[tuple[str, Callable[[Any], Any], list[Any], str]] = [
    ("capacity", lambda v: mod_transformer(capacity=v), [0.0, 2.0], "above 0 and at most 1"),
    ("capacity", lambda v: mod_transformer(capacity=(0.5, v)), [-1.0], "above 0 and at most 1"),
    ("depth", lambda v: mod_transformer(depth=v), [0], "must be at least 1"),
    ("every", lambda v: mod_transformer(every=v), [0], "must be at least 1"),
    ("offset", lambda v: mod_transformer(offset=v), [-2], "must be at least 0"),
    ("depth", lambda v: mode.interleave(dense, dense, v), [0, -4], "must be at least 1"),
    ("every", lambda v: mode.interleave(dense, dense, 4, every=v), [0, -1], "must be at least 1"),
    ("offset", lambda v: mode.interleave(dense, dense, 4, offset=v), [-1], "must be at least 0"),
    ("vocab", lambda v: mode.Transformer(v, DIM, [dense], key=KEY), [0], "must be at least 1"),
    ("dim", lambda v: mode.Transformer(VOCAB, v, [dense], key=KEY), [0], "must be at least 1"),
    ("repeats", lambda v: transformer(dense, repeats=v), [0, -1], "must be at least 1"),
    ("repeats", lambda v: mode.stack_layers([dense], v, key=KEY), [1.5], "must be an integer"),
]


@each_number(NUMBERS)
def test_a_number_out_of_its_range(
    name: str, call: Callable[[Any], Any], value: Any, rule: str
) -> None:
    assert_number_is_refused(name, call, value, rule)


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "a block as a layer": (
        lambda: transformer(transformer_block),
        r"`period` must build layers, .* got a block, `TransformerBlock`.*`Residual\(block\)`",
    ),
    "a bare module as a layer": (
        lambda: transformer(lambda key: eqx.nn.MLP(DIM, DIM, 8, 1, key=key)),
        r"`period` must build layers, called as .*got MLP",
    ),
    "a layer in place of its constructor": (
        lambda: transformer(dense(KEY)),
        r"`period` must hold functions, .*builds a layer from a key, got Residual",
    ),
    "no layers": (lambda: transformer(), "`period` must be a list of functions, at least one"),
    "neither a period nor stacks": (
        lambda: mode.Transformer(VOCAB, DIM, key=KEY),
        r"exactly one of `period` .* and `stacks`, got neither",
    ),
    "a period and stacks": (
        lambda: transformer(dense, stacks=[([dense], 2)]),
        r"exactly one of `period` .* and `stacks`, got both",
    ),
    "repeats of stacks": (
        lambda: mode.Transformer(VOCAB, DIM, repeats=2, stacks=[([dense], 2)], key=KEY),
        r"`repeats` goes with `period`, got repeats=2 beside `stacks`",
    ),
    "no stacks": (
        lambda: mode.Transformer(VOCAB, DIM, stacks=[], key=KEY),
        r"`stacks` must be at least 1, got 0",
    ),
    "a schedule of another length": (
        lambda: mod_transformer(capacity=(0.5, 0.25, 0.125)),
        r"`capacity` must have one number per routed layer, 2, got 3",
    ),
    "a schedule in an array": (
        lambda: mod_transformer(capacity=np.array([0.5, 0.25])),
        r"`capacity` must be above 0 and at most 1, got array\(\[0\.5",
    ),
    "a schedule of layers of another length": (
        lambda: mode.interleave(dense, [dense], 4),
        r"`routed` must have one layer per routed layer, 2, got 1",
    ),
    "random routing without a key": (
        lambda: with_selector(mode.RandomChoice(), model())(jnp.zeros((2, 8), int)),
        r"`key` is needed by `RandomChoice`, got None",
    ),
    "token ids that are not integers": (
        lambda: model()(jnp.zeros((2, 8))),
        r"`tokens` must be integers .*shape \(2, 8\) and dtype float32",
    ),
    "a single token id": (
        lambda: model()(jnp.zeros((), int)),
        r"`tokens` must be integers with the axes .*shape \(\)",
    ),
    "a capacity that is no number": (
        lambda: mod_transformer(capacity=math.nan),
        r"`capacity` must be above 0 and at most 1, got nan",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_says_why(name: str) -> None:
    """Where the model is built or the program is traced; nothing need run."""
    call, words = REFUSED[name]
    with pytest.raises(ValueError, match=words):
        eqx.filter_eval_shape(call)
