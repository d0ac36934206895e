"""The transformer: token ids in, logits out; dtypes, documents, padding and unknown ids."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array

import mode
from tests.helpers import assert_close, packed_info
from tests.layers import DIM, TOKENS, VOCAB, run, transformer_block
from tests.models.cases import IDS, KEY, dense, mixed, model, routed


def test_tied_and_untied() -> None:
    """A tied head is the embedding; logits of an untrained model have unit variance."""
    tied, untied = model(dense), model(dense, tied=False)
    assert tied.head is None
    assert untied.head is not None
    assert untied.head.weight.shape == (DIM, VOCAB)
    assert np.array_equal(tied.embedding, untied.embedding)
    logits, _ = run(untied, IDS)
    same = eqx.tree_at(lambda m: m.head.weight, untied, tied.embedding.T)
    assert_close(run(same, IDS)[0], run(tied, IDS)[0])
    assert np.any(logits != run(tied, IDS)[0])
    assert 0.5 < np.std(run(tied, IDS)[0]) < 2


def test_bfloat16_activations_float32_parameters() -> None:
    """Blocks see bfloat16; parameters, routers and logits are float32."""
    seen: list[Any] = []

    def spy(x: Array, info: mode.TokenInfo, *, key: Array | None = None) -> Any:
        seen.append(x.dtype)
        return jnp.zeros_like(x), ()

    narrow = model(lambda key: mode.Residual(spy), routed, mixed, dtype=jnp.bfloat16)
    parameters = jax.tree.leaves(eqx.filter(narrow, eqx.is_inexact_array))
    assert {leaf.dtype for leaf in parameters} == {jnp.dtype("float32")}
    logits, routings = run(narrow, IDS)
    assert seen == [jnp.bfloat16]
    assert logits.dtype == jnp.float32
    assert all(one.logits.dtype == one.weight.dtype == jnp.float32 for one in routings)
    wide, _ = run(model(dense, repeats=2), IDS)
    close, _ = run(model(dense, repeats=2, dtype=jnp.bfloat16), IDS)
    assert_close(close.astype(jnp.bfloat16), wide, scale=3)
    assert np.any(close != wide)


def test_double_precision() -> None:
    """Activations in float64 give logits in float64."""
    single, double = (
        mode.mod_transformer(VOCAB, DIM, 2, 2, dtype=dtype, key=KEY)
        for dtype in ("float32", "float64")
    )
    logits, _ = run(single, IDS)
    with jax.enable_x64(True):
        out, (routing,) = run(double, IDS)
        assert out.dtype == routing.logits.dtype == jnp.float64
        assert_close(np.asarray(out, np.float32), np.asarray(logits), scale=10)


def test_grouped_queries() -> None:
    """Fewer key-value heads, fewer parameters; repeated, they are the ordinary heads."""
    shared = transformer_block(KEY, num_kv_heads=1)
    weight = shared.attention.qkv.weight
    assert weight.shape == (DIM, 2 * DIM)
    query, key, value = jnp.split(weight, [DIM, DIM + DIM // 2], axis=1)
    repeated = jnp.concatenate([query, key, key, value, value], axis=1)
    plain = eqx.tree_at(
        lambda b: (b.attention.qkv.weight, b.attention.out, b.feedforward),
        transformer_block(KEY),
        (repeated, shared.attention.out, shared.feedforward),
    )
    x = jax.random.normal(KEY, (2, TOKENS, DIM))
    assert_close(run(mode.Residual(shared), x)[0], run(mode.Residual(plain), x)[0])


@pytest.mark.parametrize("lengths", [(16, 16), (5, 27), (1, 20)])
def test_packed_documents_are_alone(lengths: tuple[int, int]) -> None:
    """Two documents in one sequence get the logits that each gets alone."""
    blocks = model(lambda key: mode.Residual(transformer_block(key)))
    logits, _ = run(blocks, IDS[:1], packed_info(lengths, tokens=TOKENS))
    first, second = lengths
    for start, length in ((0, first), (first, second)):
        alone, _ = run(blocks, IDS[:1, start : start + length])
        assert_close(logits[:, start : start + length], alone, scale=10)


@pytest.mark.parametrize("unknown", [VOCAB, VOCAB + 7, -1])
def test_a_token_id_that_does_not_exist_is_seen(unknown: int) -> None:
    """Clamping it would train on another token in silence. In the padding any id may stand."""
    causal = mode.make_causal(mode.mod_transformer(VOCAB, DIM, 2, 2, key=KEY))
    tokens = jnp.arange(16).reshape(2, 8) % VOCAB
    whole, padded = mode.TokenInfo.plain((2, 8)), packed_info((5,), (5,), tokens=8)
    changed = tokens.at[0, 5].set(unknown)
    assert np.isnan(run(causal, changed, whole)[0][0, 5]).all()
    assert (run(causal, changed, whole)[0][1] == run(causal, tokens, whole)[0][1]).all()
    assert (run(causal, changed, padded)[0] == run(causal, tokens, padded)[0]).all()
