"""The sampler against the distribution written from the papers."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

import mode
from tests import reference as ref


DRAWS = 20_000
LOGITS = np.array([0.3, 2.0, -1.0, 2.0, 0.9, -3.0, 1.4])


def frequencies(sampler: mode.Sampler, logits: ref.Floats) -> ref.Floats:
    """How often each token is drawn."""
    keys = jax.random.split(jax.random.key(0), DRAWS)
    draw = jax.jit(jax.vmap(sampler, in_axes=(None, 0)))
    tokens = draw(jnp.asarray(logits, jnp.float32), keys)
    return np.bincount(np.asarray(tokens), minlength=len(logits)) / DRAWS


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 3.0},
        {"top_k": 3},
        {"top_k": 1},
        {"top_k": 100},
        {"top_p": 0.7},
        {"top_p": 1e-6},
        {"temperature": 2.0, "top_k": 5, "top_p": 0.8},
    ],
    ids=str,
)
def test_frequencies(options: dict[str, Any]) -> None:
    """Within five standard errors of the oracle's distribution; never outside its support."""
    expected = ref.sampling_distribution(LOGITS, **options)
    drawn = frequencies(mode.Sampler(**options), LOGITS)
    assert np.all(drawn[expected == 0] == 0)
    error = np.sqrt(expected * (1 - expected) / DRAWS)
    assert np.all(np.abs(drawn - expected) <= 5 * error)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    logits=st.lists(st.integers(-8, 8), min_size=1, max_size=9),
    temperature=st.sampled_from([0.0, 0.25, 1.0, 4.0]),
    top_k=st.none() | st.integers(1, 12),
    top_p=st.sampled_from([0.05, 0.33, 0.61, 0.97, 1.0]),
)
def test_support(logits: list[int], temperature: float, top_k: int | None, top_p: float) -> None:
    """No draw outside the oracle's support, ties included."""
    expected = ref.sampling_distribution(np.array(logits, float), temperature, top_k, top_p)
    sampler = mode.Sampler(temperature, top_k, top_p)
    keys = jax.random.split(jax.random.key(1), 64)
    tokens = jax.vmap(sampler, in_axes=(None, 0))(jnp.array(logits, jnp.float32), keys)
    assert np.all(expected[np.asarray(tokens)] > 0)


def test_a_sequence_does_not_depend_on_its_neighbours() -> None:
    sampler = mode.Sampler(temperature=1.5, top_k=20, top_p=0.9)
    logits = jax.random.normal(jax.random.key(0), (16, 64))
    keys = jax.random.split(jax.random.key(1), 16)
    together = eqx.filter_jit(jax.vmap(sampler))(logits, keys)
    alone = [int(eqx.filter_jit(sampler)(row, key)) for row, key in zip(logits, keys, strict=True)]
    assert together.tolist() == alone


def test_zero_temperature_takes_the_first_of_equals_without_a_key() -> None:
    assert int(mode.Sampler(temperature=0)(jnp.array([1.0, 3.0, 3.0]))) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.5}, r"`temperature` must be .* at least 0, got -0\.5"),
        ({"temperature": float("nan")}, r"`temperature` must be a finite number .* got nan"),
        ({"top_k": 0}, r"`top_k` must be at least 1, got 0"),
        ({"top_p": 0.0}, r"`top_p` must be above 0 and at most 1, got 0\.0"),
        ({"top_p": 1.5}, r"`top_p` must be above 0 and at most 1, got 1\.5"),
        ({"top_p": float("nan")}, r"`top_p` must be above 0 and at most 1, got nan"),
    ],
)
def test_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mode.Sampler(**options)


def test_a_missing_key() -> None:
    with pytest.raises(
        ValueError, match="`key` is needed by a `Sampler` whose temperature is above 0"
    ):
        mode.Sampler()(jnp.zeros(4))


@pytest.mark.parametrize("options", [{}, {"top_k": 2}, {"top_p": 0.9}], ids=str)
@pytest.mark.parametrize("temperature", [1e-20, 1e-36, 1e-38, 1e-45, 5e-324])
def test_tiny_temperatures_take_the_likeliest(temperature: float, options: dict[str, Any]) -> None:
    """Numbers that overflow when they are divided by the temperature, or a temperature that is 0
    in float32."""
    logits = jnp.array([0.3, 2.0, -1.0, 400.0, -jnp.inf])
    sampler = mode.Sampler(temperature=temperature, **options)
    assert int(sampler(logits, jax.random.key(0))) == 3
