"""What decoding refuses, matched on its words and values."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jaxtyping
import pytest

import mode

from .layers import DIM, VOCAB, Blend
from .test_decode import BATCH, KEY, LENGTHS, PROMPT, TOKENS, dense, texts


def without_method(block: Any) -> mode.Transformer:
    return mode.Transformer(VOCAB, DIM, [lambda key: mode.Residual(block(key))], key=KEY)


@functools.cache
def top_k() -> mode.Transformer:
    return mode.mod_decoder(VOCAB, DIM, 2, 2, key=KEY)


@functools.cache
def deep() -> mode.Transformer:
    return mode.causal(mode.mod_decoder(VOCAB, DIM, 4, 2, key=KEY))


def random() -> mode.Transformer:
    return mode.map_routers(
        lambda r: eqx.tree_at(lambda r: r.select, r, mode.RandomChoice()), top_k()
    )


def prefill(model: mode.Transformer | None = None, tokens: Any = None, **options: Any) -> Any:
    model = mode.causal(top_k()) if model is None else model
    tokens = texts()[:, :PROMPT] if tokens is None else tokens
    return mode.prefill(model, tokens, **{"max_tokens": TOKENS, **options})


def generate(tokens: Any = None, **options: Any) -> Any:
    tokens = texts()[:, :PROMPT] if tokens is None else tokens
    return mode.generate(mode.causal(top_k()), tokens, **{"steps": 2, **options})


class Extending(eqx.Module):
    """A block whose `extend` returns what a user might, by mistake."""

    result: Callable[[Any], Any] = eqx.field(static=True)

    def __call__(self, x: Any, info: Any, *, key: Any = None) -> Any:
        return x, ()

    def extend(self, x: Any, info: Any, past: mode.Past) -> Any:
        return self.result(x)


def extending(result: Callable[[Any], Any]) -> mode.Transformer:
    return without_method(lambda key: Extending(result))


def twice(go_on: Callable[..., Any]) -> Any:
    """As if the first call had left its argument alone."""
    decoding = prefill()
    for _ in range(2):
        if go_on is mode.step:
            mode.step(mode.causal(top_k()), decoding, texts()[:, 0])
        else:
            mode.sample(mode.causal(top_k()), decoding, steps=1)


def other_model(depth: int = 2, **options: Any) -> Any:
    other = mode.causal(mode.mod_decoder(VOCAB, DIM, depth, 2, key=KEY, **options))
    return mode.step(other, prefill(), texts()[:, 0])


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "top-k": (lambda: prefill(top_k()), r"`model` must decide .*`ExpertChoice`.*mode\.causal"),
    "random": (lambda: prefill(random()), r"`model` must decide .*`RandomChoice`.*whole sequences"),
    "a block that cannot": (
        lambda: prefill(without_method(Blend)),
        r"`model` must be able to decode, but `Blend` .* no method `extend\(x, info, past\)`",
    ),
    "a long prompt": (
        lambda: prefill(max_tokens=4),
        r"`tokens` must fit into .* max_tokens=4, got prompts of 6",
    ),
    "an empty prompt": (
        lambda: prefill(tokens=texts()[:, :0]),
        r"`tokens` must hold at least one token of one member, got shape \(5, 0\)",
    ),
    "a prompt of length 0": (
        lambda: prefill(lengths=LENGTHS.at[0].set(0)),
        r"`lengths` must be from 1 to the 6 tokens .*got \[0, 6",
    ),
    "lengths of others": (
        lambda: prefill(lengths=LENGTHS[:2]),
        r"`lengths` must hold one integer per member, \(5,\), got shape \(2,\)",
    ),
    "an unknown id": (
        lambda: prefill(tokens=texts()[:, :PROMPT].at[0, 1].set(VOCAB)),
        r"`tokens` must be ids from 0 to 31, .*to 32\.",
    ),
    "a negative id": (
        lambda: prefill(tokens=texts()[:, :PROMPT].at[0, 1].set(-1)),
        r"`tokens` must be ids from 0 to 31, .*from -1",
    ),
    "no steps": (lambda: generate(steps=0), r"`steps` must be at least 1, got 0"),
    "too many steps": (
        lambda: generate(max_tokens=7),
        r"`steps` and `prompts` must fit into max_tokens=7, got 2 steps after 6 tokens",
    ),
    "no keys": (
        lambda: generate(sampler=mode.Sampler()),
        r"`keys` must hold one key per member, 5 of them.*got NoneType",
    ),
    "one key": (
        lambda: generate(sampler=mode.Sampler(), keys=KEY),
        r"`keys` must hold one key per member, 5 of them.*of shape \(\)",
    ),
    "an unknown stop": (lambda: generate(stop=VOCAB), r"`stop` must be a token id .*got 32"),
    "another depth": (
        lambda: other_model(4),
        r"`decoding` must have been made by `prefill` with the same .*\(2, 5, 2, 16, 8\), got \(1",
    ),
    "another width of keys": (
        lambda: other_model(num_kv_heads=1),
        r"`decoding` must have been made by .* \(1, 5, 1, 16, 8\), got \(1, 5, 2, 16, 8\)",
    ),
    "the same, unrolled": (
        lambda: mode.step(mode.unrolled(deep()), prefill(deep()), texts()[:, 0]),
        r"`decoding` must have been made by .*`unrolled`",
    ),
    "another limit": (
        lambda: mode.step(mode.causal(top_k(), limit=0.5), prefill(), texts()[:, 0]),
        r"`decoding` must have been made by .*another `limit`",
    ),
    "no room": (
        lambda: mode.sample(mode.causal(top_k()), prefill(), steps=11),
        r"`steps` must fit into max_tokens=16, got 11 steps after 6 tokens",
    ),
    "a decoding of before": (lambda: twice(mode.step), r"`decoding` was given to an earlier"),
    "a generation of before": (lambda: twice(mode.sample), r"`decoding` was given to an earlier"),
    "no model": (
        lambda: mode.prefill(dense(KEY), texts(), max_tokens=TOKENS),
        r"`model` must be a `Transformer`, got Residual",
    ),
    "no decoding": (
        lambda: mode.step(mode.causal(top_k()), texts(), texts()[:, 0]),
        r"`decoding` must be a `Decoding`",
    ),
    "no sampler": (
        lambda: generate(sampler=lambda logits, key: 0),
        r"`sampler` must be a `Sampler`, got function",
    ),
    "numbers for ids": (
        lambda: prefill(tokens=jnp.ones((2, 3))),
        r"`tokens` must be integers, \[batch, tokens\], got .*float32",
    ),
    "lengths that are no integers": (
        lambda: prefill(lengths=jnp.ones(BATCH)),
        r"`lengths` must hold one integer per member, \(5,\), got shape \(5,\) and dtype float32",
    ),
    "integers for flags": (
        lambda: mode.step(mode.causal(top_k()), prefill(), texts()[:, 0], jnp.ones(BATCH, int)),
        r"`active` must hold one flag per member, \(5,\), got .*int32",
    ),
    "no update": (
        lambda: prefill(extending(lambda x: x)),
        r"`Extending\.extend` must return \(update, left\)",
    ),
    "another width": (
        lambda: prefill(extending(lambda x: (x[..., :2], ()))),
        r"`Extending\.extend` must return an update of the shape of `x`, .*got \(5, 6, 2\)",
    ),
    "too few left": (
        lambda: prefill(extending(lambda x: (x, x[:, :1]))),
        r"`Extending\.extend` must leave arrays .*of its 6 new tokens alone, .*got shape \(5, 1,",
    ),
    "another batch": (
        lambda: mode.step(mode.causal(top_k()), prefill(), texts()[:2, 0]),
        r"`tokens` must hold one integer per member, \(5,\), got shape \(2,\)",
    ),
}


@pytest.fixture
def as_users_see_it() -> Iterator[None]:
    """Without the suite's type hook, which would refuse some of these first."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.usefixtures("as_users_see_it")
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_decoded_says_why(name: str) -> None:
    call, words = REFUSED[name]
    with pytest.raises(ValueError, match=words):
        call()


def test_a_full_member_is_an_error() -> None:
    model = mode.causal(top_k())
    decoding = mode.prefill(model, texts()[:, :PROMPT], LENGTHS, max_tokens=PROMPT)
    with pytest.raises(eqx.EquinoxRuntimeError, match="a member is full: it has max_tokens=6"):
        jax.block_until_ready(mode.step(model, decoding, texts()[:, 0]))
