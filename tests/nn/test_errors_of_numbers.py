"""Numbers out of their range: each error names the argument, its range and the value."""

import math
from collections.abc import Callable
from typing import Any

import jax
import pytest

import mode
from tests.helpers import assert_number_is_refused, each_number
from tests.layers import DIM, expert, transformer_block


pytestmark = pytest.mark.usefixtures("without_type_checks")

KEY = jax.random.key(0)


def mod(capacity: Any) -> mode.MixtureOfDepths:
    return mode.MixtureOfDepths(transformer_block(KEY), DIM, capacity, key=KEY)


def moe(num_experts: Any = 4, **options: Any) -> mode.MixtureOfExperts:
    return mode.MixtureOfExperts(expert, DIM, num_experts, key=KEY, **options)


def heads(num_heads: Any, num_kv_heads: Any = None) -> mode.TransformerBlock:
    return mode.TransformerBlock(DIM, num_heads, num_kv_heads=num_kv_heads, key=KEY)


NUMBERS: list[tuple[str, Callable[[Any], Any], list[Any], str]] = [
    (
        "capacity",
        lambda v: mod(v),
        [0, 0.0, -0.5, 1.5, math.nan, math.inf, "0.5"],
        "must be above 0 and at most 1",
    ),
    (
        "capacity",
        lambda v: mode.staged_mode_layer(expert, DIM, 2, 2, capacity=v, key=KEY),
        [0.0, 1.01],
        "must be above 0 and at most 1",
    ),
    (
        "capacity_factor",
        lambda v: moe(capacity_factor=v),
        [0, 0.0, -1.0, math.nan, math.inf, "1"],
        "must be a finite number above 0",
    ),
    ("num_experts", lambda v: moe(v), [0, -1], "must be at least 1"),
    ("num_experts", lambda v: moe(v), [2.5], "must be an integer of at least 1"),
    ("num_noop", lambda v: moe(num_noop=v), [-1], "must be at least 0"),
    (
        "num_noop",
        lambda v: mode.integrated_mode_layer(expert, DIM, 2, 2, v, key=KEY),
        [-2],
        "must be at least 0",
    ),
    ("num_shared", lambda v: moe(num_shared=v), [-2], "must be at least 0"),
    ("num_heads", lambda v: heads(v), [0, -1], "must be at least 1"),
    ("num_kv_heads", lambda v: heads(2, v), [0, -1], "must be at least 1"),
    ("window", lambda v: mode.CausalAttention(window=v), [0, -4], "must be at least 1"),
    ("block_size", lambda v: mode.CausalAttention(block_size=v), [0, 8], "must be at least 16"),
    *[
        (
            f"{name}` of `CausalAttention",
            lambda v, name=name: mode.CausalAttention(**{name: v}),
            [0.0, -1.0, math.nan, math.inf],
            "must be a finite number above 0 or None",
        )
        for name in ("scale", "soft_cap")
    ],
]


@each_number(NUMBERS)
def test_a_number_out_of_its_range(
    name: str, call: Callable[[Any], Any], value: Any, rule: str
) -> None:
    assert_number_is_refused(name, call, value, rule)
