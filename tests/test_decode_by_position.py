"""Decoding with running quantiles by position: the forward of the causal model, token by token."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mode
from tests import reference as ref
from tests.helpers import assert_close, rng, run


DIM, VOCAB = 8, 17


def make_expert(key):
    return mode.GELU(DIM, 8, key=key)


def draw_tokens(seed, *shape):
    return jnp.asarray(rng(seed).integers(0, VOCAB, shape), jnp.int32)


def dense(key):
    return mode.Residual(mode.TransformerBlock(DIM, 2, num_kv_heads=1, key=key))


KINDS = {
    "mod": lambda key, bins: mode.MixtureOfDepths(
        mode.TransformerBlock(DIM, 2, key=key), DIM, 0.5, position_bins=bins, key=key
    ),
    "experts": lambda key, bins: mode.integrated_mode(
        make_expert, DIM, 2, 3, 1, position_bins=bins, key=key
    ),
    "staged": lambda key, bins: mode.staged_mode(
        make_expert, DIM, 2, 2, capacity=0.5, position_bins=bins, key=key
    ),
}


@functools.cache
def by_position(kind, bins=4, limit=1.0, dtype=jnp.float32):
    """A causal decoder that was calibrated on texts of 24 tokens, two of its bins."""
    make = functools.partial(KINDS[kind], bins=bins)
    model = mode.Transformer(VOCAB, DIM, [dense, make] * 2, dtype=dtype, key=jax.random.key(3))
    # Routers that are decided: rounding in another order turns no choice.
    model = mode.map_routers(
        lambda r: eqx.tree_at(lambda r: r.scorer.weight, r, 30 * r.scorer.weight), model
    )
    model = run(mode.update_state, model, run(model, draw_tokens(0, 16, 24))[1])
    return mode.causal(model, limit=limit)


@pytest.mark.parametrize(("kind", "limit"), [("experts", 0.5), ("staged", 1.0)])
def test_decoding_is_the_forward_past_the_training_length(kind, limit):
    """60 tokens, where 24 were seen: prompts end at other positions for every member."""
    model = by_position(kind, limit=limit)
    state = mode.routers(model)[0].state
    assert state.updates.tolist() == [[1, 1, 0, 0]] * 2
    assert len(np.unique(np.asarray(state.threshold[0, :, 0]))) == 2
    mode.testing.assert_decodes(model, vocab=VOCAB, tokens=60)


def test_decoding_takes_the_very_tokens_that_the_forward_takes():
    """And gives their logits, for members at different positions of one batch."""
    model = by_position("mod")
    steps = jnp.asarray([[0.0], [0.7], [-0.7], [0.7]])  # four bins that differ
    model = mode.map_routers(
        lambda r: eqx.tree_at(lambda r: r.state.threshold, r, r.state.threshold + steps[None]),
        model,
    )
    text = draw_tokens(1, 3, 60)
    logits, (routing,) = run(model, text)
    decoding = mode.prefill(model, text[:, :30], jnp.array([30, 1, 9]), max_tokens=60)
    members = np.arange(3)
    while decoding.length.min() < 60:
        assert_close(decoding.logits, logits[members, decoding.length - 1], scale=5)
        going = decoding.length < 60
        following = text[members, jnp.minimum(decoding.length, 59)]
        decoding = mode.step(model, decoding, following, going)
    (found,) = mode.entered(model, decoding)
    np.testing.assert_array_equal(found.count, routing.selected[..., 0].astype(int))
    places = np.array([ref.position_bin(position, 4) for position in range(60)])
    shares = [routing.selected[:, :, places == one].mean() for one in range(4)]
    assert shares[1] + 0.1 < shares[2] > shares[3] + 0.1


def test_bins_in_bfloat16():
    """Of the activations alone: thresholds stay float32, and move."""
    model = by_position("mod", dtype=jnp.bfloat16)
    logits, (routing,) = run(model, draw_tokens(2, 2, 30))
    state = mode.routers(run(mode.update_state, model, (routing,)))[0].state
    assert logits.dtype == state.threshold.dtype == jnp.float32
    assert state.updates.tolist() == [[2, 2, 1, 0]] * 2
    assert 0 < int(routing.num_filled.sum()) < routing.valid.size
