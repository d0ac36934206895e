"""Text as it comes, and caches in a dtype of their own."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mode
from tests.decoding.cases import BATCH, LENGTHS, PROMPT, VOCAB, build, draw_texts


SAMPLER = mode.Sampler(temperature=1.0, top_k=8)
KINDS = ("dense", "mod quantile identity", "staged quantile softmax")


def prompts() -> jax.Array:
    return draw_texts()[:, :PROMPT]


def options() -> dict[str, Any]:
    return {"sampler": SAMPLER, "keys": jax.random.split(jax.random.key(4), BATCH)}


@pytest.mark.parametrize("every", [1, 3, 20])
def test_pieces_are_the_text_of_generate(every: int) -> None:
    model = build(KINDS[1])
    whole = mode.generate(model, prompts(), LENGTHS, steps=7, **options())
    pieces = list(mode.stream(model, prompts(), LENGTHS, steps=7, every=every, **options()))
    assert [piece.shape[1] for piece in pieces] == [
        min(every, 7 - start) for start in range(0, 7, every)
    ]
    assert np.array_equal(jnp.concatenate(pieces, axis=1), whole.tokens)


def test_a_stream_ends_when_all_sequences_are_done() -> None:
    model = build("dense")
    first = mode.generate(model, prompts(), steps=1, **options()).tokens
    stop = int(first[0, 0])
    whole = mode.generate(model, prompts(), steps=64, stop_token=stop, **options())
    assert whole.done.all()
    pieces = list(mode.stream(model, prompts(), steps=64, stop_token=stop, **options()))
    assert len(pieces) == int(whole.lengths.max()) < 64
    assert np.array_equal(jnp.concatenate(pieces, axis=1), whole.tokens[:, : len(pieces)])


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_may_be_read_in_pieces(kind: str) -> None:
    model = build(kind)
    whole = mode.generate(model, prompts(), LENGTHS, steps=7, **options())
    chunked = mode.generate(model, prompts(), LENGTHS, steps=7, chunk=3, **options())
    pieces = list(mode.stream(model, prompts(), LENGTHS, steps=7, chunk=3, **options()))
    assert np.array_equal(chunked.tokens, whole.tokens)
    assert np.array_equal(jnp.concatenate(pieces, axis=1), whole.tokens)


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"steps": 0}, "`steps`"),
        ({"steps": 4, "every": 0}, "`every`"),
        ({"steps": 4, "max_tokens": 5}, "`steps` and `prompts` must fit"),
        ({"steps": 4, "chunk": 0}, "`chunk` must be"),
        ({"steps": 4, "cache_dtype": jnp.int8}, "`cache_dtype` must be a floating dtype"),
    ],
)
def test_errors_come_before_the_first_piece(given: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        mode.stream(build("dense"), prompts(), **given)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_caches_have_a_dtype_of_their_own(kind: str, dtype: Any) -> None:
    """Half of the bytes, logits near those of wide caches, and the dtype stays."""
    model, text = build(kind), draw_texts()
    found: dict[Any, Any] = {}
    for cache_dtype in (None, dtype):
        state, _ = mode.prefill(
            model, text[:, :PROMPT], max_tokens=16, chunk=3, cache_dtype=cache_dtype
        )
        before = {leaf.dtype for leaf in jax.tree.leaves(state.caches)}
        for token in range(PROMPT, 12):
            state, _ = mode.decode_step(model, state, text[:, token])
        assert {leaf.dtype for leaf in jax.tree.leaves(state.caches)} == before
        found[cache_dtype] = state
    wide, narrow = found[None], found[dtype]
    floating = [leaf for leaf in jax.tree.leaves(narrow.caches) if leaf.dtype.kind not in "ib"]
    assert {leaf.dtype for leaf in floating} == {jnp.dtype(dtype)}
    assert narrow.logits.dtype == wide.logits.dtype == jnp.float32
    error = np.abs(narrow.logits - wide.logits).max()
    assert 0 < error < 0.05 * np.abs(wide.logits).max()


def test_generate_takes_it_too() -> None:
    generation = mode.generate(
        build("dense"), prompts(), steps=3, cache_dtype=jnp.bfloat16, **options()
    )
    assert generation.tokens.max() < VOCAB
    dtypes = {leaf.dtype.name for leaf in jax.tree.leaves(generation.state.caches)}
    assert "bfloat16" in dtypes
    assert "float32" not in dtypes
