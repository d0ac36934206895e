"""`assert_decodes` passes on models that decode and fails on a block whose `extend` is wrong."""

from collections.abc import Callable, Iterator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jaxtyping
import pytest
from jaxtyping import Array

import mode
from mode.testing import assert_decodes
from tests.layers import DIM, VOCAB


KEY = jax.random.key(6)
TOKENS = jax.random.randint(jax.random.key(2), (3, 12), 0, VOCAB)


@pytest.fixture(autouse=True)
def _without_the_type_hook() -> Iterator[None]:
    """Users have none: the library's own errors are meant here."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


class Mean(mode.AbstractBlock):
    """Adds the mean of all tokens so far; `forgets` says when it leaves out the earlier ones."""

    forgets: Callable[[int], bool] = eqx.field(static=True, default=lambda new: False)

    def extend(
        self, x: Array, info: mode.TokenInfo, cache: mode.Cache, *, key: Array | None = None
    ) -> tuple[Array, tuple[()], Array]:
        real = jnp.where(info.valid[..., None], x, 0)
        total, count = jnp.cumsum(real, -2), jnp.cumsum(info.valid, -1)
        if cache.info is not None and not self.forgets(x.shape[-2]):
            earlier = jnp.where(cache.info.valid[..., None], cache.entries, 0)
            total += earlier.sum(-2, keepdims=True)
            count += cache.info.valid.sum(-1, keepdims=True)
        return total / jnp.maximum(count, 1).astype(x.dtype)[..., None], (), real


def model_of(block: Mean, **options: Any) -> mode.Transformer:
    def layer(key: Array) -> mode.MixtureOfDepths:
        return mode.MixtureOfDepths(block, DIM, capacity=0.5, key=key)

    def dense(key: Array) -> mode.Residual:
        return mode.Residual(block)

    model = mode.Transformer(VOCAB, DIM, [dense, layer], key=KEY, **options)
    return mode.make_causal(model)


@pytest.mark.parametrize("lengths", [None, [1, 7, 12], [12, 12, 12], [1, 1, 1]])
def test_a_right_block_passes(lengths: list[int] | None) -> None:
    assert_decodes(model_of(Mean()), TOKENS, None if lengths is None else jnp.array(lengths))


def test_a_narrow_model_has_its_own_tolerance() -> None:
    model = mode.mod_transformer(VOCAB, DIM, 2, 2, dtype=jnp.bfloat16, key=KEY)
    assert_decodes(mode.make_causal(model), TOKENS)
    with pytest.raises(AssertionError, match="differ by"):
        assert_decodes(mode.make_causal(model), TOKENS, tolerance=1e-7)


WRONG: dict[str, tuple[Callable[[int], bool], str]] = {
    "always": (lambda new: True, r"after step 1 of `decode_step`, the logits of sequence \d"),
    "with several tokens": (lambda new: new > 1, r"after 6 tokens at once by `decode_tokens`"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_block_fails(name: str) -> None:
    forgets, words = WRONG[name]
    with pytest.raises(AssertionError, match=words):
        assert_decodes(model_of(Mean(forgets)), TOKENS)


class OwnGPT(eqx.Module):
    """A model that this library cannot decode."""

    model: mode.Transformer

    def __call__(self, tokens: Array, info: Any = None, *, key: Any = None) -> Any:
        return self.model(tokens, info, key=key)


ERRORS: dict[str, tuple[Callable[[], None], str]] = {
    "a model of a user's own": (
        lambda: assert_decodes(OwnGPT(model_of(Mean())), TOKENS),  # pyright: ignore
        r"`model` must be a `Transformer`, which decodes, got OwnGPT\. Build a `Transformer` of",
    ),
    "a model that sees the future": (
        lambda: assert_decodes(mode.mod_transformer(VOCAB, DIM, 2, 2, key=KEY), TOKENS),
        r"make_causal",
    ),
    "one sequence": (
        lambda: assert_decodes(model_of(Mean()), TOKENS[0]),
        r"`tokens` must be token ids with the axes \[batch, tokens\], .* of shape \(12,\)",
    ),
    "one token": (
        lambda: assert_decodes(model_of(Mean()), TOKENS[:, :1]),
        r"at least 2 in a sequence, got int32 of shape \(3, 1\)",
    ),
    "hidden states": (
        lambda: assert_decodes(model_of(Mean()), jnp.ones((3, 12))),  # pyright: ignore
        r"must be token ids .* got float32",
    ),
    "an empty prompt": (
        lambda: assert_decodes(model_of(Mean()), TOKENS, jnp.array([0, 1, 2])),
        r"`lengths` must have 3 prompts' lengths from 1 to 12, got \[0, 1, 2\]",
    ),
    "a prompt that is too long": (
        lambda: assert_decodes(model_of(Mean()), TOKENS, jnp.array([13, 1, 2])),
        r"`lengths` must have 3 prompts' lengths from 1 to 12, got \[13, 1, 2\]",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_what_cannot_be_checked_says_why(name: str) -> None:
    call, words = ERRORS[name]
    with pytest.raises(ValueError, match=words):
        call()


def test_an_id_outside_the_vocabulary_is_told() -> None:
    with pytest.raises(AssertionError, match=r"the forward pass gave NaN\. Check that every token"):
        assert_decodes(model_of(Mean()), TOKENS.at[0, 0].set(VOCAB))
