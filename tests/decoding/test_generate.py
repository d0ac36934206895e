"""Generation: one program for many steps, and each text depends on its prompt and key alone."""

import functools
import logging
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mode
from tests.decoding.answers import answers, ask, by_token
from tests.decoding.cases import BATCH, LENGTHS, PROMPT, VOCAB, build, draw_texts
from tests.helpers import assert_close


pytestmark = pytest.mark.optimized


HALF = "mod quantile sigmoid, half of the slots"
STAGED = "staged quantile softmax"
STOP = 7
SAMPLER = mode.Sampler(temperature=1.0, top_k=8, top_p=0.9)


def prompts() -> jax.Array:
    return draw_texts()[:, :PROMPT]


def keys(batch: int = BATCH) -> jax.Array:
    return jax.random.split(jax.random.key(4), batch)


@functools.cache
def free() -> mode.Generation:
    """Twelve tokens after prompts of one length."""
    return mode.generate(build(STAGED), prompts(), steps=12, sampler=SAMPLER, keys=keys())


def test_hundreds_of_steps_are_the_oracle() -> None:
    """Every routing is the oracle's, and so are the logits at the end."""
    model = build("mod quantile identity")
    generation = mode.generate(model, prompts(), steps=200, sampler=SAMPLER, keys=keys())
    assert len(np.unique(generation.tokens)) > VOCAB / 2
    text = jnp.concatenate([prompts(), generation.tokens], axis=1)
    want = ask(model, text, margin=1e-4)
    assert_close(generation.state.logits, want.logits[:, -1], scale=10)
    assert_generated(model, generation, want.routings)


def assert_generated(model: mode.Transformer, generation: mode.Generation, expected: Any) -> None:
    """The routings of all steps are those of a text without padding."""
    for got, want in zip(by_token(model, generation.routings), expected, strict=True):
        # [steps, repeats, batch, 1, experts], and [repeats, batch, tokens, experts].
        selected, weight = (
            np.moveaxis(leaf[..., 0, :], 0, 2) for leaf in (got.selected, got.weight)
        )
        np.testing.assert_array_equal(selected, want.selected[:, :, PROMPT:])
        assert_close(weight.astype(np.float32), want.weight[:, :, PROMPT:], scale=20)


def test_routings_of_a_staged_layer() -> None:
    """Those of the experts hold what the depth selected; metrics read them as any others."""
    model = build(STAGED)
    text = jnp.concatenate([prompts(), free().tokens], axis=1)
    want = ask(model, text, margin=1e-4)
    assert_generated(model, free(), want.routings)
    for routing, whole in zip(free().routings, want.routings, strict=True):
        assert routing.index.shape[:3] == (12, 2, BATCH)
        new = whole.selected[:, :, PROMPT:]
        metrics = mode.routing_metrics(routing)
        real = np.asarray(routing.valid).sum()
        assert_close(metrics.coverage, new.any(axis=-1).sum() / real)
        assert_close(metrics.compute, new.sum() / real)


def test_a_stop_token_ends_a_sequence() -> None:
    """The token fills the rest, and a sequence that is done counts as padding."""
    first = free().tokens[0].tolist()
    stop = next(token for token in first if first.index(token) >= 2)
    generation = mode.generate(
        build(STAGED), prompts(), steps=12, sampler=SAMPLER, keys=keys(), stop_token=stop
    )
    for row in range(BATCH):
        ends = np.flatnonzero(np.asarray(free().tokens[row]) == stop)
        length = int(ends[0]) + 1 if len(ends) else 12
        assert generation.lengths[row] == length
        assert generation.done[row] == bool(len(ends))
        tokens, whole = generation.tokens[row].tolist(), free().tokens[row].tolist()
        assert tokens == whole[:length] + [stop] * (12 - length)
        valid = np.asarray(generation.routings[0].valid)[:, :, row, 0]
        assert valid.tolist() == [[step < length] * 2 for step in range(12)]
        assert not np.asarray(generation.routings[0].filled)[length:, :, row].any()
    assert (generation.state.length == PROMPT + generation.lengths).all()
    assert 3 <= generation.lengths[0] < 12


def test_steps_after_the_last_stop_token_do_not_run() -> None:
    """Where every sequence is done, all that is left is padding."""
    model = build(STAGED)
    generation, _ = mode.prefill(model, prompts(), max_tokens=24)
    likeliest = generation.logits.argmax(axis=-1)
    only = eqx.tree_at(lambda s: s.logits, generation, generation.logits.at[:, STOP].set(99.0))
    made = mode.continue_generation(model, only, steps=6, stop_token=STOP)
    assert made.lengths.tolist() == [1, 1]
    assert (made.tokens == STOP).all()
    assert not np.asarray(made.routings[0].valid[1:]).any()
    assert (made.routings[0].index[1:] == made.routings[0].num_tokens).all()
    assert made.state.length.tolist() == [PROMPT + 1] * 2
    assert (likeliest != STOP).any()


def test_a_text_in_pieces_is_the_text() -> None:
    """However its steps are split over calls; what is done stays done."""
    model = build(STAGED)
    options: dict[str, Any] = {"sampler": mode.Sampler(), "keys": keys(), "stop_token": 2}
    whole = mode.generate(model, prompts(), LENGTHS, steps=10, max_tokens=24, **options)
    made, _ = mode.prefill(model, prompts(), LENGTHS, max_tokens=24)
    pieces: list[mode.Generation] = []
    for steps in (2, 6, 2):
        made = mode.continue_generation(model, made, steps=steps, **options)
        pieces.append(made)
    tokens = jnp.concatenate([piece.tokens for piece in pieces], axis=1)
    assert (tokens == whole.tokens).all()
    assert (pieces[-1].done == whole.done).all()
    assert sorted(whole.done.tolist()) == [False, True]
    lengths = np.sum([piece.lengths for piece in pieces], axis=0)
    assert lengths.tolist() == whole.lengths.tolist()
    for place, routing in enumerate(whole.routings):
        joined = jnp.concatenate([piece.routings[place].selected for piece in pieces])
        np.testing.assert_array_equal(joined, routing.selected)


def test_a_sequences_text_is_its_own() -> None:
    """Alone, and among others whose prompts are longer: the same tokens."""
    model = build("token choice 1 softmax, no-ops")
    texts, lengths = draw_texts(1, 4, PROMPT), jnp.array([5, 1, 3, 4])
    options: dict[str, Any] = {"steps": 7, "sampler": SAMPLER, "stop_token": STOP}
    together = mode.generate(model, texts, lengths, keys=keys(4), **options)
    for row in (0, 1):
        one = slice(row, row + 1)
        alone = mode.generate(model, texts[one], lengths[one], keys=keys(4)[one], **options)
        assert (alone.tokens[0] == together.tokens[row]).all()
        assert alone.lengths[0] == together.lengths[row]


def test_the_likeliest_tokens_are_greedy_steps() -> None:
    """At temperature 0, `generate` is `decode_step` of the likeliest token, again and again."""
    model = build(HALF)
    generation = mode.generate(model, prompts(), LENGTHS, steps=7, max_tokens=12)
    state, _ = mode.prefill(model, prompts(), LENGTHS, max_tokens=12)
    assert (state.logits.argmax(-1) == answers(HALF).logits[[0, 1], LENGTHS - 1].argmax(-1)).all()
    for step in range(7):
        token = jnp.argmax(state.logits, axis=-1).astype(jnp.int32)
        assert (generation.tokens[:, step] == token).all()
        state, _ = mode.decode_step(model, state, token)
    assert_close(generation.state.logits, state.logits, scale=5)


def test_one_program_for_all_pieces() -> None:
    """Where arrays are bound to a device, as those read from a checkpoint are, too."""
    arrays, rest = eqx.partition(build("dense"), eqx.is_array)
    model = eqx.combine(jax.device_put(arrays, jax.devices()[0]), rest)
    made, _ = mode.prefill(model, prompts(), LENGTHS, max_tokens=12)
    made = mode.continue_generation(model, made, steps=2, stop_token=STOP)
    with jax.log_compiles(), pytest.MonkeyPatch.context() as patch:
        compiled: list[str] = []
        patch.setattr(
            logging.Logger, "_log", lambda self, level, msg, *rest, **_: compiled.append(msg)
        )
        for _ in range(2):
            made = mode.continue_generation(model, made, steps=2, stop_token=STOP)
    named = [text for text in compiled if "XLA compilation" in text and "_generate" in text]
    assert not named


def test_a_donated_cache_is_written_in_place() -> None:
    """A step's own memory is a part of the caches: none of them is copied."""

    def wide(key: jax.Array) -> mode.Residual:
        return mode.Residual(mode.TransformerBlock(64, 2, num_kv_heads=1, key=key))

    model = mode.Transformer(VOCAB, 64, [wide], key=jax.random.key(0))
    state, _ = mode.prefill(model, draw_texts(0, 16, 2), max_tokens=1024)

    def step(caches: Any, state: mode.DecodeState, tokens: jax.Array) -> Any:
        state = eqx.tree_at(lambda s: s.caches, state, caches)
        return mode.decode_step(model, state, tokens)[0].caches

    arguments = (state.caches, state, jnp.zeros(16, jnp.int32))
    compiled = jax.jit(step, donate_argnums=0).lower(*arguments).compile()
    memory: Any = compiled.memory_analysis()
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(state.caches))
    assert memory.temp_size_in_bytes < whole / 4


def test_old_style_keys_draw_as_typed_ones_do() -> None:
    """`[batch, 2]` numbers are keys as well."""
    model = build("dense")
    old = jax.random.key_data(keys())
    texts = [
        mode.generate(model, prompts(), steps=4, sampler=SAMPLER, keys=each).tokens
        for each in (keys(), old)
    ]
    assert texts[0].shape == texts[1].shape == (BATCH, 4)
    assert (texts[0] == texts[1]).all()
    assert (texts[0] < VOCAB).all()
