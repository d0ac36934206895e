"""Attention with a window, a soft cap, another scale or ALiBi decodes as it trains."""

import functools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

import mode
from tests.decoding.answers import ask
from tests.decoding.cases import DIM, LENGTHS, PROMPT, TOKENS, VOCAB, draw_texts
from tests.helpers import assert_close, run


SCALE = 10

# With the base of the rotary wavelengths that goes with it.
ATTENTION: dict[str, tuple[mode.CausalAttention, float | None]] = {
    "window": (mode.CausalAttention(window=3), 100.0),
    "soft cap and scale": (mode.CausalAttention(soft_cap=0.7, scale=1.5), 100.0),
    "alibi": (mode.CausalAttention(alibi=True), None),
}


def build(attend: Any, theta: float | None = 100.0) -> mode.Transformer:
    """A dense and a routed layer with this attention; about a half of the tokens are selected."""

    def block(key: PRNGKeyArray) -> mode.TransformerBlock:
        return mode.TransformerBlock(
            DIM, 2, num_kv_heads=1, attend=attend, rope_theta=theta, key=key
        )

    def dense(key: PRNGKeyArray) -> mode.Residual:
        return mode.Residual(block(key))

    def routed(key: PRNGKeyArray) -> mode.MixtureOfDepths:
        return mode.MixtureOfDepths(block(key), DIM, 0.5, router_std=0.8, key=key)

    return mode.Transformer(VOCAB, DIM, [dense, routed], key=jax.random.key(6))


@functools.cache
def causal(name: str) -> mode.Transformer:
    """The model of a case, whose routers decide by the sign of their logit."""
    return mode.make_causal(build(*ATTENTION[name]), threshold=mode.LogitThreshold())


@pytest.mark.parametrize("name", ATTENTION)
def test_an_option_decodes_in_dense_and_in_routed_layers(name: str) -> None:
    """By steps and several tokens at once. A window counts tokens of the text, not slots."""
    model, text = causal(name), draw_texts()
    want = ask(model, text)
    (selected,) = (one.selected[0, :, :, 0] for one in want.routings)
    assert (selected.sum(axis=1) >= 3).all()
    assert not selected.all(axis=1).any()
    _, theta = ATTENTION[name]
    plain = mode.make_causal(build(mode.CausalAttention(), theta), threshold=mode.LogitThreshold())
    assert np.abs(ask(plain, text).logits - want.logits).max() > 0.01

    assert_close(run(model, text)[0], want.logits, scale=SCALE)
    rows = np.arange(len(text))
    state, _ = mode.prefill(model, text[:, :PROMPT], LENGTHS, max_tokens=TOKENS)
    for _ in range(3):
        last = np.asarray(state.length) - 1
        assert_close(state.logits, want.logits[rows, last], scale=SCALE)
        state, _ = mode.decode_step(model, state, text[rows, last + 1])
    at = np.asarray(state.length)[:, None] + np.arange(4)
    logits, state, _ = mode.decode_tokens(model, state, text[rows[:, None], at])
    assert_close(logits, want.logits[rows[:, None], at], scale=SCALE)


class MeanAttention(mode.AbstractAttentionFunction):
    """An attention function of a user's own: the mean of the values so far, whatever the scores."""

    def extend(
        self,
        q: Float[Array, "batch new heads head_dim"],
        k: Float[Array, "batch new kv_heads head_dim"],
        v: Float[Array, "batch new kv_heads head_dim"],
        info: mode.TokenInfo,
        cache: mode.Cache,
    ) -> Float[Array, "batch new heads head_dim"]:
        """Sums new values up, and those in the cache."""
        real = info.valid[:, :, None, None].astype(v.dtype)
        total, count = jnp.cumsum(real * v, axis=1), jnp.cumsum(real, axis=1)
        if cache.info is not None:
            earlier = cache.info.valid[:, None, :, None].astype(v.dtype)
            total += jnp.sum(earlier * cache.entries[1], axis=2)[:, None]
            count += jnp.sum(earlier, axis=2)[:, None]
        mean = total / jnp.maximum(count, 1)
        return jnp.repeat(mean, q.shape[2] // v.shape[2], axis=2)


def test_an_attention_function_of_a_users_own_decodes() -> None:
    """It writes one method, and gets the cache."""
    model = mode.make_causal(build(MeanAttention()), threshold=mode.LogitThreshold())
    text = draw_texts()
    want, _ = run(model, text)
    state, _ = mode.prefill(model, text[:, :PROMPT], LENGTHS, max_tokens=TOKENS)
    rows = np.arange(len(text))
    at = np.asarray(LENGTHS)[:, None] + np.arange(4)
    logits, state, _ = mode.decode_tokens(model, state, text[rows[:, None], at])
    assert_close(logits, want[rows[:, None], at], scale=SCALE)


def sliding(
    q: Float[Array, "batch tokens heads head_dim"],
    k: Float[Array, "batch tokens kv_heads head_dim"],
    v: Float[Array, "batch tokens kv_heads head_dim"],
    info: mode.TokenInfo,
) -> Float[Array, "batch tokens heads head_dim"]:
    """A plain function for whole sequences: a window of 3 tokens."""
    k, v = (jnp.repeat(leaf, q.shape[2] // k.shape[2], axis=2) for leaf in (k, v))
    distance = info.positions[:, :, None] - info.positions[:, None, :]
    same = info.segment_ids[:, :, None] == info.segment_ids[:, None, :]
    seen = jnp.tril(same & (distance < 3))
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
    weights = jax.nn.softmax(jnp.where(seen[:, None], scores, -1e9), axis=-1)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v)


def test_a_plain_function_trains_and_is_refused_by_prefill_by_name() -> None:
    """It computes what it says, in routed layers by original positions, and has gradients."""
    model = mode.make_causal(build(sliding), threshold=mode.LogitThreshold())
    text = draw_texts()
    assert_close(run(model, text)[0], ask(causal("window"), text).logits, scale=SCALE)

    @eqx.filter_jit
    @eqx.filter_grad
    def gradient(model: mode.Transformer) -> Array:
        return jnp.mean(jnp.sin(model(text)[0]))

    leaves: PyTree = jax.tree.leaves(eqx.filter(gradient(model), eqx.is_array))
    assert all(np.isfinite(leaf).all() for leaf in leaves)
    words = r"attention function `sliding` in it has only the form for whole sequences"
    with pytest.raises(ValueError, match=words):
        mode.prefill(model, text, max_tokens=TOKENS)
