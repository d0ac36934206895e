"""A long prompt is read in pieces, which attend to the cache a block of slots at a time."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mode
from mode.nn import Cache, Layer
from tests.helpers import assert_close


OPTIONS: dict[str, mode.CausalAttention] = {
    "plain": mode.CausalAttention(block_size=16),
    "window": mode.CausalAttention(block_size=16, window=20),
    "soft cap and scale": mode.CausalAttention(block_size=16, soft_cap=0.7, scale=1.5),
    "alibi": mode.CausalAttention(block_size=16, alibi=True),
}


def all_at_once(name: str) -> mode.CausalAttention:
    """The attention of a case, which forms all scores."""
    scoring = OPTIONS[name].scoring
    options = {field.name: getattr(scoring, field.name) for field in dataclasses.fields(scoring)}
    return mode.CausalAttention(**options, block_size=None)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("slots", [17, 32, 41])
@pytest.mark.parametrize("with_index", [False, True])
def test_blocks_of_a_cache_give_what_all_scores_give(
    name: str, slots: int, with_index: bool
) -> None:
    """Slots may be empty anywhere, a block may be empty, and the last one is rarely whole."""
    batch, new, queries, heads, kv_heads, size = 3, 24, 18, 4, 2, 8
    rng = np.random.default_rng(slots)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    filled = rng.random((batch, slots)) < 0.6
    filled[0] = False  # the first piece of a prompt
    filled[:, 16:] &= rng.random() < 0.5
    positions = np.sort(rng.integers(0, 60, (batch, slots)), axis=1)
    past = mode.TokenInfo(jnp.asarray(positions), jnp.asarray(filled.astype(np.int32)))
    entries = (draw(batch, kv_heads, slots, size), draw(batch, kv_heads, slots, size))
    cache = dataclasses.replace(Cache.empty(), entries=entries, info=past)
    at = jnp.broadcast_to(jnp.arange(60, 60 + new), (batch, new))
    own = mode.TokenInfo(at, jnp.ones((batch, new), jnp.int32))
    k, v = draw(batch, new, kv_heads, size), draw(batch, new, kv_heads, size)
    some = rng.permuted(np.tile(np.arange(new), (batch, 1)), axis=1)[:, :queries]
    extra = {"index": jnp.asarray(np.sort(some))} if with_index else {}
    q = draw(batch, queries if with_index else new, heads, size)
    attend = OPTIONS[name]
    found = attend.extend(q, k, v, own, cache, **extra)
    assert_close(found, all_at_once(name).extend(q, k, v, own, cache, **extra))


@pytest.mark.parametrize("kind", ["dense", "mod", "queries"])
@pytest.mark.parametrize("name", OPTIONS)
def test_a_prompt_in_pieces_gives_the_logits_of_the_forward_pass(name: str, kind: str) -> None:
    dim, vocab, attend = 16, 11, OPTIONS[name]

    def make(key: jax.Array) -> Layer:
        theta = None if name == "alibi" else 100.0
        block = mode.TransformerBlock(
            dim, 4, num_kv_heads=2, attend=attend, rope_theta=theta, key=key
        )
        kinds = {"mod": mode.MixtureOfDepths, "queries": mode.MixtureOfQueries}
        if kind == "dense":
            return mode.Residual(block)
        return kinds[kind](block, dim, 0.6, router_std=0.8, key=key)

    model = mode.Transformer(vocab, dim, [make], repeats=2, key=jax.random.key(1))
    model = mode.make_causal(model, threshold=mode.LogitThreshold(), max_capacity=1.0)
    tokens = jax.random.randint(jax.random.key(2), (2, 75), 0, vocab)
    lengths = jnp.array([75, 40])
    state, _ = mode.prefill(model, tokens, lengths, max_tokens=80, chunk=19)
    logits, _ = model(tokens)
    assert_close(state.logits, logits[jnp.arange(2), lengths - 1], scale=10)
