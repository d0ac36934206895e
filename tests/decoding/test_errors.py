"""Errors of decoding: each names the argument, the rule, the value and the fix."""

import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest

import mode
from tests.decoding.cases import DIM, VOCAB, draw_texts


KEY = jax.random.key(0)
BATCH, PROMPT, TOKENS = 5, 6, 16
LENGTHS = jnp.array([3, 6, 1, 5, 2])


@functools.cache
def top_k(depth: int = 2, **options: Any) -> mode.Transformer:
    return mode.mod_transformer(VOCAB, DIM, depth, 2, key=KEY, **options)


@functools.cache
def causal() -> mode.Transformer:
    return mode.make_causal(top_k())


def texts(tokens: int = PROMPT) -> jax.Array:
    return draw_texts(0, BATCH, tokens)


def prefill(model: Any = None, tokens: Any = None, **options: Any) -> mode.DecodeState:
    tokens = texts() if tokens is None else tokens
    state, _ = mode.prefill(
        causal() if model is None else model, tokens, **{"max_tokens": TOKENS, **options}
    )
    return state


def generate(tokens: Any = None, **options: Any) -> Any:
    tokens = texts() if tokens is None else tokens
    return mode.generate(causal(), tokens, **{"steps": 2, **options})


def step_of(model: mode.Transformer) -> Any:
    """A step of this model from the state of another."""
    return mode.decode_step(model, prefill(), texts()[:, 0])


def twice(go_on: Callable[[mode.DecodeState], Any]) -> Any:
    """As if the first call had left its argument alone."""
    state = prefill()
    go_on(state)
    return go_on(state)


class Extending(eqx.Module):
    """A block whose `extend` returns what a user might, by mistake."""

    result: Callable[[Any], Any] = eqx.field(static=True)

    def extend(self, x: Any, info: Any, cache: mode.Cache) -> Any:
        return self.result(x)


class Changing(eqx.Module):
    """A block that leaves another tree of entries for later tokens than for the first ones."""

    def extend(self, x: Any, info: Any, cache: mode.Cache) -> Any:
        return x, (), x if cache.is_empty else (x,)


def extending(result: Callable[[Any], Any]) -> mode.Transformer:
    return of_block(Extending(result))


def of_block(block: Any) -> mode.Transformer:
    return mode.Transformer(VOCAB, DIM, [lambda key: mode.Residual(block)], key=KEY)


def with_selector(select: mode.AbstractSelector) -> mode.Transformer:
    return mode.map_routers(lambda r: eqx.tree_at(lambda r: r.select, r, select), top_k())


def changing() -> Any:
    model = of_block(Changing())
    return mode.decode_step(model, prefill(model), texts()[:, 0])


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "top-k": (
        lambda: prefill(top_k()),
        r"`model` must decide token by token.*`ExpertChoice`.*`mode\.make_causal\(model\)`",
    ),
    "random": (
        lambda: prefill(with_selector(mode.RandomChoice())),
        r"`model` must decide token by token.*`RandomChoice`, which assigns whole sequences",
    ),
    "no model": (
        lambda: mode.prefill(top_k().stacks[0], texts(), max_tokens=TOKENS),  # pyright: ignore
        r"`model` must be a `Transformer`, got LayerStack",
    ),
    "a long prompt": (
        lambda: prefill(max_tokens=4),
        r"`tokens` must fit into .* max_tokens=4, got prompts of 6",
    ),
    "an empty prompt": (
        lambda: prefill(tokens=texts()[:, :0]),
        r"`tokens` must hold at least one token of one sequence, got shape \(5, 0\)",
    ),
    "one sequence without a batch": (
        lambda: prefill(tokens=texts()[0]),
        r"`tokens` must be integers, \[batch, tokens\], got shape \(6,\).*`tokens\[None\]`",
    ),
    "numbers for ids": (
        lambda: prefill(tokens=jnp.ones((2, 3))),
        r"`tokens` must be integers, \[batch, tokens\], got .*float32",
    ),
    "a prompt of length 0": (
        lambda: prefill(lengths=LENGTHS.at[0].set(0)),
        r"`lengths` must be from 1 to the 6 tokens .*got \[0, 6",
    ),
    "lengths of others": (
        lambda: prefill(lengths=LENGTHS[:2]),
        r"`lengths` must hold one integer per sequence, \(5,\), got shape \(2,\)",
    ),
    "lengths that are no integers": (
        lambda: prefill(lengths=jnp.ones(BATCH)),
        r"`lengths` must hold one integer per sequence, \(5,\), got .*dtype float32",
    ),
    "an unknown id": (
        lambda: prefill(tokens=texts().at[0, 1].set(VOCAB)),
        rf"`tokens` must be ids from 0 to {VOCAB - 1}, .*to {VOCAB}\.",
    ),
    "a negative id": (
        lambda: prefill(tokens=texts().at[0, 1].set(-1)),
        rf"`tokens` must be ids from 0 to {VOCAB - 1}, .*from -1",
    ),
    "pieces of no tokens": (lambda: prefill(chunk=0), r"`chunk` must be at least 1, got 0"),
    "no room at all": (lambda: prefill(max_tokens=0), r"`max_tokens` must be at least 1, got 0"),
    "another batch": (
        lambda: mode.decode_step(causal(), prefill(), texts()[:2, 0]),
        r"`tokens` must hold one integer per sequence, \(5,\), got shape \(2,\)",
    ),
    "another batch of several tokens": (
        lambda: mode.decode_tokens(causal(), prefill(), texts()[:2]),
        r"`tokens` must have one row per sequence, 5, got shape \(2, 6\)",
    ),
    "integers for flags": (
        lambda: mode.decode_step(causal(), prefill(), texts()[:, 0], jnp.ones(BATCH, int)),
        r"`active` must hold one flag per sequence, \(5,\), got .*int32",
    ),
    "logits of others": (
        lambda: mode.rewind(prefill(), LENGTHS, jnp.zeros((2, VOCAB))),
        rf"`logits` must be those of one token per sequence, \(5, {VOCAB}\), got \(2, {VOCAB}\)",
    ),
    "no steps": (lambda: generate(steps=0), r"`steps` must be at least 1, got 0"),
    "too many steps": (
        lambda: generate(max_tokens=7),
        r"`steps` and `prompts` must fit into max_tokens=7, got 2 steps after 6 tokens",
    ),
    "no room": (
        lambda: mode.continue_generation(causal(), prefill(), steps=11),
        r"`steps` must fit into max_tokens=16, got 11 steps after 6 tokens",
    ),
    "no keys": (
        lambda: generate(sampler=mode.Sampler()),
        r"`keys` must hold one key per sequence, 5 of them.*got NoneType",
    ),
    "one key": (
        lambda: generate(sampler=mode.Sampler(), keys=KEY),
        r"`keys` must hold one key per sequence, 5 of them.*of shape \(\)",
    ),
    "an unknown stop token": (
        lambda: generate(stop_token=VOCAB),
        rf"`stop_token` must be a token id from 0 to {VOCAB - 1}, got {VOCAB}",
    ),
    "no sampler": (
        lambda: generate(sampler=lambda logits, key: 0),
        r"`sampler` must be a `Sampler`, got function",
    ),
    "no state": (
        lambda: mode.decode_step(causal(), texts(), texts()[:, 0]),  # pyright: ignore
        r"`state` must be a `DecodeState`",
    ),
    "a model of another depth": (
        lambda: step_of(mode.make_causal(top_k(4))),
        r"`state` must have been made by `prefill` with the same .*of shape \(2, 8\), got \(1, 8\)",
    ),
    "a model of another width of keys": (
        lambda: step_of(mode.make_causal(top_k(num_kv_heads=1))),
        r"`state` must have been made by `prefill` with the same .*qkv.*\(1, 8, 16\), got \(1, 8,",
    ),
    "the same model, unstacked": (
        lambda: mode.decode_step(
            mode.unstack_layers(mode.make_causal(top_k(4))),
            prefill(mode.make_causal(top_k(4))),
            texts()[:, 0],
        ),
        r"`state` must have been made by .*`unstack_layers`",
    ),
    "another `max_capacity`": (
        lambda: step_of(mode.make_causal(top_k(), max_capacity=0.5)),
        r"`state` must have been made by .*another `max_capacity`",
    ),
    "a state of before": (
        lambda: twice(lambda state: mode.decode_step(causal(), state, texts()[:, 0])),
        r"`state` was given to an earlier",
    ),
    "a state before a generation": (
        lambda: twice(lambda state: mode.continue_generation(causal(), state, steps=1)),
        r"`state` was given to an earlier",
    ),
    "a block that returns its update alone": (
        lambda: prefill(extending(lambda x: x)),
        r"`block` must return \(update, routings, entries\) from `extend`.*from Extending",
    ),
    "an update of another width": (
        lambda: prefill(extending(lambda x: (x[..., :2], (), ()))),
        r"`block` must keep the shape of its input, \(5, 6, 8\), got \(5, 6, 2\)",
    ),
    "entries of too few tokens": (
        lambda: prefill(extending(lambda x: (x, (), x[:, :1]))),
        r"`Extending\.extend` must return entries .*of its 6 new tokens alone.*got shape \(5, 1, 8",
    ),
    "another tree of entries": (
        changing,
        r"`Changing\.extend` must return the same tree of entries for every token",
    ),
}


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_decoded_says_why(name: str) -> None:
    call, words = REFUSED[name]
    with pytest.raises(ValueError, match=words):
        call()


def test_a_full_sequence_is_an_error() -> None:
    """It is known only when the program runs."""
    state = prefill(lengths=LENGTHS, max_tokens=PROMPT)
    with pytest.raises(eqx.EquinoxRuntimeError, match="a sequence is full: it has max_tokens=6"):
        jax.block_until_ready(mode.decode_step(causal(), state, texts()[:, 0]))


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize(
    ("prompts", "rule"),
    [
        ([[1, 2, 3], [4, 5]], "got list that makes none. Pad shorter sequences at the end"),
        ([1, 2, 3], r"got shape \(3,\) and dtype int32. One sequence is a batch of one"),
        ([[1.0, 2.0]], r"must be integers, .* dtype float32\.$"),
    ],
)
def test_prompts_that_are_no_batch_of_ids(prompts: Any, rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        mode.generate(causal(), prompts, steps=2)
