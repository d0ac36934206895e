"""Numbers out of their range: the error names the argument, the range and the value."""

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest

import mode
from tests.helpers import assert_number_is_refused, each_number
from tests.routing.draws import plain_router, route


pytestmark = pytest.mark.usefixtures("without_type_checks")


NUMBERS: list[tuple[str, Callable[[Any], Any], list[Any], str]] = [
    (
        "capacity",
        lambda v: plain_router(capacity=v),
        [0, 0.0, -0.5, math.nan, math.inf],
        "must be a finite number above 0",
    ),
    (
        "capacity",
        lambda v: mode.token_capacity(8, v),
        [0.0, -0.1, math.nan, math.inf, Fraction(-1, 2)],
        "must be a finite number above 0",
    ),
    ("num_tokens", lambda v: mode.token_capacity(v, 0.5), [0, -3], "must be at least 1"),
    (
        "multiple_of",
        lambda v: mode.token_capacity(8, 0.5, multiple_of=v),
        [0, -8],
        "must be at least 1",
    ),
    ("num_tokens", lambda v: mode.token_capacity(v, 0.5), [2.0, "8"], "must be an integer"),
    ("k` of `TokenChoice", mode.TokenChoice, [0, -1], "must be at least 1"),
    ("k` of `TokenChoice", mode.TokenChoice, [1.5], "must be an integer"),
    *[
        (
            f"max_capacity` of `{kind.__name__}",
            kind,
            [0.0, -0.5, 1.5, math.nan, "half"],
            r"must be in \(0, 1\] or None",
        )
        for kind in (mode.QuantileThreshold, mode.PredictorThreshold, mode.LogitThreshold)
    ],
    (
        "max_capacity` of `QuantileThreshold",
        lambda v: mode.make_causal(plain_router(), max_capacity=v),
        [0.0, 2.0],
        r"must be in \(0, 1\] or None",
    ),
    (
        "quantile_rate",
        lambda v: mode.update_router_state(
            plain_router(), (route(plain_router()),), quantile_rate=v
        ),
        [-0.1, 1.5, math.nan],
        "must be between 0 and 1",
    ),
    (
        "bias_rate",
        lambda v: mode.update_router_state(plain_router(), (route(plain_router()),), bias_rate=v),
        [-0.1, 2.0],
        "must be between 0 and 1",
    ),
]


@each_number(NUMBERS)
def test_a_number_out_of_its_range(
    name: str, call: Callable[[Any], Any], value: Any, rule: str
) -> None:
    assert_number_is_refused(name, call, value, rule)
