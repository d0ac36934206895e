"""Models that break: logits without a likeliest token, and ids outside the vocabulary.

Tried of the kind: NaN parameters, an overflow of float16, infinite logits, no finite logit; every
temperature, `top_k`, `top_p`; one broken sequence beside sound ones; a program around `generate`;
ids below 0 and above the vocabulary, in the padding, in models that are routed everywhere.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array

import mode


def small(**options: Any) -> mode.Transformer:
    """A model that decodes."""
    model = mode.mod_transformer(32, 16, depth=2, num_heads=2, key=jax.random.key(0), **options)
    return mode.make_causal(model)


def poisoned(model: mode.Transformer, token: int) -> mode.Transformer:
    """The model with one row of its embedding NaN, and a head of its own without."""
    row = model.embedding.at[token].set(jnp.nan)
    head = mode.Linear(16, 32, key=jax.random.key(1))
    return eqx.tree_at(
        lambda m: (m.embedding, m.head), model, (row, head), is_leaf=lambda x: x is None
    )


SAMPLERS = {
    "likeliest": mode.Sampler(temperature=0),
    "all": mode.Sampler(),
    "top k": mode.Sampler(top_k=3),
    "top p": mode.Sampler(0.5, top_p=0.9),
}


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize(
    "logits",
    [
        [0.0, np.nan, 1.0, 0.0],
        [np.nan] * 4,
        [0.0, np.inf, 0.0, 0.0],
        [np.inf, np.inf, 0.0, np.nan],
        [-np.inf] * 4,
    ],
    ids=str,
)
def test_a_sampler_draws_no_token(name: str, logits: list[float]) -> None:
    """The result is -1, an id that no vocabulary has."""
    assert SAMPLERS[name](jnp.array(logits), jax.random.key(0)).item() == -1
    assert SAMPLERS[name](jnp.array([-np.inf, 0.5, -np.inf, -np.inf]), jax.random.key(0)) == 1


@pytest.mark.parametrize("name", SAMPLERS)
def test_generate_says_which_sequence_and_which_token(name: str) -> None:
    """One sequence reads the poisoned token, and the other does not."""
    model, keys = poisoned(small(), 7), jax.random.split(jax.random.key(2), 2)
    prompts = jnp.array([[1, 2, 3], [1, 7, 3]])
    with pytest.raises(FloatingPointError, match=r"logits of sequence [01] are not finite at new"):
        mode.generate(model, prompts, steps=4, sampler=SAMPLERS[name], keys=keys)


def test_an_overflow_of_float16_is_seen() -> None:
    """Activations beyond 65504 are infinite; their norm is NaN."""
    model = eqx.tree_at(
        lambda m: m.embedding, small(dtype=jnp.float16), replace_fn=lambda e: e * 1e6
    )
    with pytest.raises(FloatingPointError, match="not finite"):
        mode.generate(model, jnp.ones((1, 3), int), steps=2)


def test_a_program_around_it_sees_the_token() -> None:
    """Nothing can be raised there."""

    @eqx.filter_jit
    def tokens(model: mode.Transformer) -> Array:
        return mode.generate(model, jnp.array([[1, 7, 3], [1, 2, 3]]), steps=2).tokens

    drawn = tokens(poisoned(small(), 7))
    assert drawn[0].tolist() == [-1, -1]
    assert jnp.all(drawn[1] >= 0)


@pytest.mark.parametrize("bad", [-1, -33, 32, 2**31 - 1])
def test_ids_outside_the_vocabulary_are_refused(bad: int) -> None:
    """By every function that takes prompts, where the numbers are known."""
    model, tokens = small(), jnp.array([[1, 2, 3, bad]])
    with pytest.raises(ValueError, match="must be ids from 0 to 31"):
        model(tokens)
    with pytest.raises(ValueError, match="must be ids from 0 to 31"):
        mode.generate(model, tokens, steps=1)
    info = mode.TokenInfo.packed(jnp.array([[1, 1, 1, 0]]))
    assert jnp.isfinite(model(tokens, info)[0][:, :3]).all()  # anything may stand in the padding


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("bad", [-1, 32])
def test_inside_a_program_they_give_nan(bad: int, every: int) -> None:
    """At their own position, also where all layers are routed, and in no other sequence."""
    model = small(every=every, offset=0)
    logits, _ = eqx.filter_jit(model)(jnp.array([[1, 2, bad, 3], [1, 2, 4, 3]]))
    assert jnp.isnan(logits[0, 2]).all()
    assert jnp.isfinite(logits[1]).all()


def test_another_temperature_is_no_other_program() -> None:
    """Nor another `top_p`: both are data."""
    traces = []

    @eqx.filter_jit
    def draw(sampler: mode.Sampler, key: Array) -> Array:
        traces.append(None)
        return sampler(jnp.arange(8.0), key)

    for temperature in (0.3, 1.0, 1, 2.5):
        draw(mode.Sampler(temperature), jax.random.key(0))
    for top_p in (0.3, 0.9):
        draw(mode.Sampler(0.7, top_p=top_p), jax.random.key(0))
    assert len(traces) == 2
    many = jax.vmap(lambda t, k: mode.Sampler(t)(jnp.arange(8.0), k))
    assert many(jnp.array([1e-3, 1e3]), jax.random.split(jax.random.key(0), 2)).shape == (2,)


@pytest.mark.parametrize(("function", "lengths"), [("append", 5), ("append", -1), ("rewind", -1)])
def test_lengths_out_of_range_are_refused(function: str, lengths: int) -> None:
    """They would move the length of a sequence past tokens that were never run, or below 0."""
    model = small()
    state, _ = mode.prefill(model, jnp.array([[1, 2, 3]]), max_tokens=16)
    given = jnp.array([lengths])
    calls = {
        "append": lambda: mode.decode_tokens(model, state, jnp.ones((1, 4), int), given),
        "rewind": lambda: mode.rewind(state, given, state.logits),
    }
    with pytest.raises(ValueError, match="`lengths` must be from 0 to"):
        calls[function]()
