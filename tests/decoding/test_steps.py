"""Decoding, in any pieces, is the teacher-forced forward pass, and both are the NumPy oracle."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array, Int

import mode
from tests.decoding.answers import RoutedTokens, answers, ask, by_token
from tests.decoding.cases import (
    BATCH,
    CASES,
    DIM,
    LENGTHS,
    PROMPT,
    TOKENS,
    VOCAB,
    build,
    draw_texts,
    mod,
)
from tests.helpers import assert_close, run
from tests.layers import ranked


# Float32 against float64, through four layers.
SCALE = 10


def assert_routed(
    model: mode.Transformer, routings: tuple[mode.Routing, ...], expected: list[RoutedTokens]
) -> None:
    """The routings hold these decisions on each token."""
    for got, want in zip(by_token(model, routings), expected, strict=True):
        np.testing.assert_array_equal(got.selected, want.selected)
        assert_close(got.weight.astype(np.float32), want.weight, scale=SCALE)
        assert_close(got.logits.astype(np.float32), want.logits, scale=SCALE)


def assert_prompts_routed(
    model: mode.Transformer,
    routings: tuple[mode.Routing, ...],
    expected: list[RoutedTokens],
    lengths: Int[Array, " batch"],
) -> None:
    """The routings of a prefill select the oracle's tokens of each prompt, and no padding."""
    for got, want in zip(by_token(model, routings), expected, strict=True):
        for row, length in enumerate(lengths):
            part = got.selected[:, row]
            np.testing.assert_array_equal(part[:, :length], want.selected[:, row, :length])
            assert not part[:, length:].any()


def assert_state(state: mode.DecodeState, expected: np.ndarray) -> None:
    """The logits of a state are those after its last tokens."""
    rows = np.arange(len(expected))
    assert_close(state.logits, expected[rows, np.asarray(state.length) - 1], scale=SCALE)


def following(
    text: Array, state: mode.DecodeState, count: int = 1
) -> tuple[Array, list[list[int]]]:
    """The next tokens of each sequence, and where they stand in the text; the last one repeats."""
    at = np.minimum(np.asarray(state.length)[:, None] + np.arange(count), text.shape[1] - 1)
    return jnp.take_along_axis(text, jnp.asarray(at), axis=1), at.tolist()


def assert_forward(state: mode.DecodeState, forward: Array) -> None:
    """The next token's logits are those of the forward pass, to 1e-5 of the largest."""
    expected = np.asarray(forward)[np.arange(BATCH), np.asarray(state.length) - 1]
    bound = 1e-5 * np.abs(expected).max()
    np.testing.assert_allclose(state.logits, expected, rtol=0, atol=bound)


@pytest.mark.parametrize("name", CASES)
def test_decoding_is_the_forward_and_the_oracle(name: str) -> None:
    """A ragged prefill, single steps, and several new tokens at once, a part of them padding."""
    model, text, want = build(name), draw_texts(), answers(name)
    forward, routings = run(model, text)
    assert_close(forward, want.logits, scale=SCALE)
    assert_routed(model, routings, want.routings)

    state, routings = mode.prefill(model, text[:, :PROMPT], LENGTHS, max_tokens=TOKENS)
    assert_state(state, want.logits)
    assert_forward(state, forward)
    assert_prompts_routed(model, routings, want.routings, LENGTHS)

    for _ in range(3):
        new, at = following(text, state)
        state, routings = mode.decode_step(model, state, new[:, 0])
        assert_state(state, want.logits)
        assert_forward(state, forward)
        assert_routed(model, routings, [one.at(at) for one in want.routings])

    new, at = following(text, state, 4)  # from 8 and 5 tokens to 12 and 9
    logits, state, routings = mode.decode_tokens(model, state, new)
    assert_close(logits, want.logits[np.arange(BATCH)[:, None], at], scale=SCALE)
    assert_state(state, want.logits)
    assert_routed(model, routings, [one.at(at) for one in want.routings])

    new, at = following(text, state, 4)  # one sequence is full, the other gets its last three
    logits, state, _ = mode.decode_tokens(model, state, new, jnp.array([0, 3]))
    assert_close(logits[1, :3], want.logits[1, at[1][:3]], scale=SCALE)
    assert state.length.tolist() == [TOKENS, TOKENS]
    assert_state(state, want.logits)
    assert_forward(state, forward)


@pytest.mark.parametrize(
    ("name", "chunk"),
    [
        ("mod quantile sigmoid, half of the slots", 3),
        ("token choice 2 selected softmax", 2),
        ("staged quantile softmax", 2),
    ],
)
def test_a_prefill_in_chunks_is_the_prefill(name: str, chunk: int) -> None:
    """Prompts end inside a chunk, and the last chunk may be a short one."""
    model, text, want = build(name), draw_texts(), answers(name)
    lengths = jnp.array([8, 3])
    state, routings = mode.prefill(model, text[:, :8], lengths, max_tokens=TOKENS, chunk=chunk)
    assert state.length.tolist() == lengths.tolist()
    assert_state(state, want.logits)
    assert_prompts_routed(model, routings, want.routings, lengths)
    new, at = following(text, state)
    state, routings = mode.decode_step(model, state, new[:, 0])
    assert_state(state, want.logits)
    assert_routed(model, routings, [one.at(at) for one in want.routings])


@pytest.mark.parametrize(
    "name",
    [
        "dense",
        "mod quantile sigmoid, half of the slots",
        "token choice 2 selected softmax",
        "staged token choice, half of the slots",
    ],
)
def test_rejected_drafts_leave_nothing_behind(name: str) -> None:
    """Of four drafted tokens, one sequence keeps the first and the other none: neither a key nor a
    used slot of the others stays."""
    model, text, want = build(name), draw_texts(), answers(name)
    state, _ = mode.prefill(model, text[:, :PROMPT], LENGTHS, max_tokens=TOKENS)
    before = state.logits
    right, _ = following(text, state, 4)
    drafted = jnp.where(
        jnp.array([[True, False, False, False], [False] * 4]), right, (right + 1) % VOCAB
    )
    logits, state, _ = mode.decode_tokens(model, state, drafted)
    kept = jnp.stack([logits[0, 0], before[1]])
    state = mode.rewind(state, LENGTHS + jnp.array([1, 0]), kept)
    for _ in range(4):
        assert_state(state, want.logits)
        new, at = following(text, state)
        state, routings = mode.decode_step(model, state, new[:, 0])
        assert_routed(model, routings, [one.at(at) for one in want.routings])
    assert_state(state, want.logits)


def test_a_sequence_that_is_not_active_stays_as_it_is() -> None:
    """It counts as padding, and goes on later as if nothing had been."""
    name = "mod quantile sigmoid, half of the slots"
    model, text, want = build(name), draw_texts(), answers(name)
    state, _ = mode.prefill(model, text[:, :PROMPT], LENGTHS, max_tokens=TOKENS)
    before = np.asarray(state.logits)
    new, _ = following(text, state)
    state, (routing,) = mode.decode_step(model, state, new[:, 0], jnp.array([True, False]))
    assert state.length.tolist() == [6, 2]
    assert np.array_equal(state.logits[1], before[1])
    assert routing.valid[:, :, 0].tolist() == [[True, False]] * 2
    new, _ = following(text, state)
    state, _ = mode.decode_step(model, state, new[:, 0])
    assert_state(state, want.logits)


def test_a_routed_cache_holds_the_selected_tokens_and_no_more() -> None:
    """As many slots as `max_capacity` leaves; the original positions; nothing behind them."""
    name = "mod quantile sigmoid, half of the slots"
    model, text, want = build(name), draw_texts(), answers(name)
    state, _ = mode.prefill(model, text, max_tokens=TOKENS)
    whole, routed = state.caches[0]
    assert whole.info is not None
    assert routed.info is not None
    assert routed.length is not None
    slots = mode.token_capacity(TOKENS, 0.5)
    assert whole.info.positions.shape == (2, BATCH, TOKENS)
    assert routed.info.positions.shape == (2, BATCH, slots)
    assert {leaf.shape[:2] + leaf.shape[-2:-1] for leaf in jax.tree.leaves(routed.entries)} == {
        (2, BATCH, slots)
    }
    for repeat, row in np.ndindex(2, BATCH):
        selected = np.flatnonzero(want.routings[0].selected[repeat, row, :, 0])
        assert routed.length[repeat, row] == len(selected)
        positions = np.asarray(routed.info.positions[repeat, row])
        assert positions[: len(selected)].tolist() == selected.tolist()
        valid = np.asarray(routed.info.valid[repeat, row])
        assert valid.tolist() == (np.arange(slots) < len(selected)).tolist()


@pytest.mark.parametrize("wanted", [0, 1, 3, 5])
def test_any_number_of_sequences_may_need_a_block(wanted: int) -> None:
    """None, some, or all of five in every step, whatever the usual number of rows is."""
    model = first_feature_decides()
    text = jnp.where(jnp.arange(5)[:, None] < wanted, 1, 2) * jnp.ones((1, 6), jnp.int32)
    want = ask(model, text)
    assert want.routings[0].selected.sum() == 6 * wanted
    state, _ = mode.prefill(model, text[:, :2], max_tokens=6)
    while int(state.length[0]) < 6:
        state, _ = mode.decode_step(model, state, text[:, 0])
        assert_state(state, want.logits)


@functools.cache
def first_feature_decides() -> mode.Transformer:
    """A model whose one router selects token 1 and never token 2."""
    model = mode.Transformer(VOCAB, DIM, [mod(mode.TanhGate())], key=jax.random.key(0))
    embedding = model.embedding.at[1:3, 0].set(jnp.array([1.0, -1.0]))
    model = eqx.tree_at(lambda m: m.embedding, model, embedding)
    return mode.make_causal(ranked(model), threshold=mode.LogitThreshold())


@pytest.mark.parametrize("name", ["mod of equation 1", "token choice 2 selected softmax"])
def test_in_bfloat16(name: str) -> None:
    """The same tokens are selected, and logits are float32 and close to those of float32."""
    model = build(name, "bfloat16")
    text, want = draw_texts(), answers(name)
    state, _ = mode.prefill(model, text[:, :PROMPT], LENGTHS, max_tokens=TOKENS)
    for _ in range(4):
        new, at = following(text, state)
        state, routings = mode.decode_step(model, state, new[:, 0])
        assert state.logits.dtype == jnp.float32
        rows = np.arange(BATCH)
        expected = want.logits[rows, np.asarray(state.length) - 1]
        assert np.abs(state.logits - expected).max() < 0.05 * np.abs(want.logits).max()
        for got, whole in zip(by_token(model, routings), want.routings, strict=True):
            np.testing.assert_array_equal(got.selected, whole.at(at).selected)


def test_one_program_serves_every_step() -> None:
    """Shapes and dtypes of a state do not change from step to step."""
    model = build("staged quantile softmax")
    state, _ = mode.prefill(model, draw_texts()[:, :PROMPT], LENGTHS, max_tokens=TOKENS)
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.weak_type), state)
    for _ in range(3):
        new, _ = following(draw_texts(), state)
        state, _ = mode.decode_step(model, state, new[:, 0])
        again = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.weak_type), state)
        assert again == shapes
