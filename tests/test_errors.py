"""Every bad input is refused in words that name the argument and what was got."""

import functools
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jaxtyping
import pytest

import mode

from .layers import (
    DIM,
    TOKENS,
    VOCAB,
    depth,
    expert,
    experts,
    predicted,
    transformer_block,
)


KEY = jax.random.key(0)


@pytest.fixture(autouse=True)
def as_users_see_it() -> Iterator[None]:
    """Without the suite's type hook, which would refuse some of these first."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def x(*shape: int, dtype: Any = jnp.float32) -> jax.Array:
    return jnp.ones(shape or (2, TOKENS, DIM), dtype)


def info(*shape: int) -> mode.TokenInfo:
    return mode.TokenInfo.plain(shape)


@functools.cache
def layers() -> dict[str, Any]:
    return {
        "dense": mode.Residual(transformer_block(KEY)),
        "mod": depth(KEY, transformer_block),
        "moe": experts(KEY),
        "block": experts(KEY).block,
        "model": mode.mod_decoder(VOCAB, DIM, 2, 2, key=KEY),
    }


def traced(call: Callable[[], Any]) -> None:
    """Errors are found where the program is traced; nothing need run."""
    layers()
    eqx.filter_eval_shape(call)


def mod(capacity: float = 0.25, **options: Any) -> mode.MixtureOfDepths:
    return mode.MixtureOfDepths(transformer_block(KEY), DIM, capacity, key=KEY, **options)


def attention(dim: int, num_heads: int, num_kv_heads: int | None = None) -> mode.TransformerBlock:
    return mode.TransformerBlock(dim, num_heads, num_kv_heads=num_kv_heads, key=KEY)


def decoder(**options: Any) -> mode.Transformer:
    return mode.mod_decoder(VOCAB, DIM, **{"depth": 4, "num_heads": 2, "key": KEY, **options})


def dense(key: jax.Array) -> mode.Residual:
    return mode.Residual(transformer_block(key))


def replay(layer: Any, recorded: jax.Array, played: jax.Array) -> Any:
    _, (routing,) = layer(recorded)
    select = mode.Replay(routing)
    return mode.map_routers(lambda r: eqx.tree_at(lambda r: r.select, r, select), layer)(played)


def by_predictor(layer: Any) -> Any:
    return mode.causal(layer, by=mode.ByPredictor())(x())


def routings(layer: Any, *shape: int) -> Any:
    return layer(x(*shape))[1]


def ungradable() -> Any:
    """Sound when it was built; the selector was swapped since."""
    layer = experts(KEY, gate=mode.SelectedSoftmax(), select=mode.TokenChoice(2))
    return eqx.tree_at(lambda m: m.block.router.select, layer, mode.TokenChoice(1))(x())


NUMBERS: list[tuple[str, Callable[[Any], Any], list[Any], str]] = [
    ("capacity", mod, [0, 0.0, -0.5, 1.5, math.nan, math.inf], "must be above 0 and at most 1"),
    ("capacity", lambda v: decoder(capacity=v), [0.0, 2.0], "must be above 0 and at most 1"),
    ("capacity", lambda v: decoder(capacity=(0.5, v)), [-1.0], "must be above 0 and at most 1"),
    (
        "capacity",
        lambda v: mode.staged_mode(expert, DIM, 2, 2, capacity=v, key=KEY),
        [0.0, 1.01],
        "must be above 0 and at most 1",
    ),
    (
        "num_experts",
        lambda v: mode.MixtureOfExperts(expert, DIM, v, key=KEY),
        [0, -1],
        "must be at least 1",
    ),
    ("num_noop", lambda v: experts(KEY, num_noop=v), [-1], "must be at least 0"),
    ("num_shared", lambda v: experts(KEY, num_shared=v), [-2], "must be at least 0"),
    (
        "capacity_factor",
        lambda v: experts(KEY, capacity_factor=v),
        [0, 0.0, -1.0, math.nan, math.inf],
        "must be a finite number above 0",
    ),
    ("k` of `TokenChoice", mode.TokenChoice, [0, -1], "must be at least 1"),
    (
        "limit` of `Threshold",
        lambda v: mode.Threshold(limit=v),
        [0.0, -0.5, 1.5, math.nan],
        r"must be in \(0, 1\] or None",
    ),
    (
        "limit` of `Threshold",
        lambda v: mode.causal(layers()["model"], limit=v),
        [0.0, 2.0],
        r"must be in \(0, 1\] or None",
    ),
    ("num_tokens", lambda v: mode.token_capacity(v, 0.5), [0, -3], "must be at least 1"),
    (
        "fraction",
        lambda v: mode.token_capacity(8, v),
        [0.0, -0.1, math.nan, math.inf],
        "must be a finite number above 0",
    ),
    (
        "multiple_of",
        lambda v: mode.token_capacity(8, 0.5, multiple_of=v),
        [0, -8],
        "must be at least 1",
    ),
    ("num_heads", lambda v: attention(DIM, v), [0, -1], "must be at least 1"),
    ("num_kv_heads", lambda v: attention(DIM, 2, v), [0, -1], "must be at least 1"),
    ("depth", lambda v: mode.every_other(dense, dense, v), [0, -4], "must be at least 1"),
    ("every", lambda v: mode.every_other(dense, dense, 4, every=v), [0, -1], "must be at least 1"),
    ("offset", lambda v: mode.every_other(dense, dense, 4, offset=v), [-1], "must be at least 0"),
    ("depth", lambda v: decoder(depth=v), [0], "must be at least 1"),
    ("every", lambda v: decoder(every=v), [0], "must be at least 1"),
    ("offset", lambda v: decoder(offset=v), [-2], "must be at least 0"),
    ("vocab", lambda v: mode.Transformer(v, DIM, [dense], key=KEY), [0], "must be at least 1"),
    ("dim", lambda v: mode.Transformer(VOCAB, v, [dense], key=KEY), [0], "must be at least 1"),
    (
        "quantile_rate",
        lambda v: mode.update_state(layers()["mod"], routings(layers()["mod"]), quantile_rate=v),
        [-0.1, 1.5, math.nan],
        "must be between 0 and 1",
    ),
    (
        "bias_rate",
        lambda v: mode.update_state(layers()["mod"], routings(layers()["mod"]), bias_rate=v),
        [-0.1, 2.0],
        "must be between 0 and 1",
    ),
]


@pytest.mark.parametrize(
    ("name", "call", "value", "rule"),
    [(name, call, value, rule) for name, call, values, rule in NUMBERS for value in values],
)
def test_a_number_out_of_its_range(
    name: str, call: Callable[[Any], Any], value: Any, rule: str
) -> None:
    with pytest.raises(ValueError, match=rf"^`{name}`.*{rule}.*got {re.escape(str(value))}\b"):
        traced(lambda: call(value))


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "more choices than there are": (
        lambda: experts(KEY, num_noop=1, select=mode.TokenChoice(6))(x()),
        r"`k` of `TokenChoice` must be at most the number of choices .*5, got 6",
    ),
    "an expert without a slot": (
        lambda: experts(KEY, capacity_factor=0.1)(x()),
        r"`capacity_factor` must .* got 32 \* 0\.1 / 4 = 0\.8\. .*at least 0\.125",
    ),
    "an expert without a slot of those that stay": (
        lambda: mode.staged_mode(expert, DIM, 2, 8, capacity=0.125, key=KEY)(x()),
        r"`capacity_factor` must .* got 4 \* 1 / 8 = 0\.5\.",
    ),
    "heads that do not divide": (
        lambda: attention(18, 4),
        r"`dim` must be `num_heads` times an even number.*dim=18 and num_heads=4.* 24\.",
    ),
    "an odd size of a head": (
        lambda: attention(12, 4),
        r"`dim` must be `num_heads` times an even number.*dim=12 and num_heads=4.* 16\.",
    ),
    "shared heads that do not divide": (
        lambda: attention(24, 4, 3),
        r"`num_heads` must be divisible by `num_kv_heads`, got 4 and 3",
    ),
    "more shared heads than heads": (
        lambda: attention(16, 2, 4),
        r"`num_heads` must be divisible by `num_kv_heads`, got 2 and 4",
    ),
    "random routing without a key": (
        lambda: depth(KEY, select=mode.RandomChoice())(x()),
        r"`key` is needed by `RandomChoice`, got None",
    ),
    "random routing in a model without a key": (
        lambda: mode.map_routers(
            lambda r: eqx.tree_at(lambda r: r.select, r, mode.RandomChoice()), layers()["model"]
        )(jnp.zeros((2, 8), int)),
        r"`key` is needed by `RandomChoice`, got None",
    ),
    "a gate without a gradient": (
        lambda: experts(KEY, gate=mode.SelectedSoftmax(), select=mode.TokenChoice(1)),
        r"`gate=SelectedSoftmax\(\)` with `select=TokenChoice\(1\)` .* no gradient",
    ),
    "a gate without a gradient after surgery": (
        ungradable,
        r"`gate=SelectedSoftmax\(\)` with `select=TokenChoice\(1\)` .* no gradient",
    ),
    "a softmax over one choice": (
        lambda: mod(gate=mode.Softmax()),
        r"`gate` of `MixtureOfDepths` must not be a softmax, got Softmax\(\)",
    ),
    "a softmax over one selected": (
        lambda: mod(gate=mode.SelectedSoftmax()),
        r"`gate` of `MixtureOfDepths` must not be a softmax, got SelectedSoftmax\(\)",
    ),
    "a record of another length": (
        lambda: replay(layers()["mod"], x(2, 16, DIM), x(2, 32, DIM)),
        r"`routing` of `Replay` .*\(2, 1, 32\) and 1 choices, got \(2, 1, 16\)",
    ),
    "a record of other groups": (
        lambda: replay(layers()["mod"], x(3, 16, DIM), x(2, 16, DIM)),
        r"`routing` of `Replay` .*\(2, 1, 16\) and 1 choices, got \(3, 1, 16\)",
    ),
    "a record of other experts": (
        lambda: replay_into(experts(KEY), layers()["mod"]),
        r"`routing` of `Replay` .*\(2, 1, 32\) and 1 choices, got \(2, 4, 32\) and 4 choices",
    ),
    "a record of other choices": (
        lambda: replay_into(experts(KEY, num_noop=1), experts(KEY)),
        r"`routing` of `Replay` .* 4 choices, got \(2, 4, 32\) and 5 choices",
    ),
    "a rule without its predictor": (
        lambda: by_predictor(layers()["mod"]),
        r"`by=ByPredictor\(\)` needs a router with a predictor, got a router without",
    ),
    "a predictor's loss without a predictor": (
        lambda: mode.predictor_bce(routings(layers()["mod"])[0]),
        r"`routing` must come from a router with a predictor, got one without",
    ),
    "a predictor for another number of experts": (
        lambda: experts(KEY, predictor=mode.Predictor(DIM, key=KEY))(x()),
        r"`predictor` must return one logit per expert, \(2, 32, 4\), got \(2, 32, 1\)",
    ),
    "too few routings": (
        lambda: mode.update_state(layers()["mod"], ()),
        r"`routings` must hold one routing per router of `model`, 1, got 0",
    ),
    "routings of another model": (
        lambda: mode.update_state(layers()["mod"], routings(layers()["moe"])),
        r"`routings` must be in the order of the routers .*\(\(\), 1, 1\), got \(\(\), 4, 4\)",
    ),
    "routings of a model without a scan": (
        lambda: mode.update_state(decoder(), routings(layers()["mod"], 3, TOKENS, DIM)),
        r"`routings` must be in the order of the routers .*\(\(2,\), 1, 1\), got \(\(3,\), 1, 1\)",
    ),
    "a schedule of another length": (
        lambda: decoder(capacity=(0.5, 0.25, 0.125)),
        r"`capacity` must have one number per routed layer, 2, got 3",
    ),
    "no layers": (
        lambda: mode.Transformer(VOCAB, DIM, [], key=KEY),
        r"`layers` must be at least 1, got 0",
    ),
    "token ids that are not integers": (
        lambda: layers()["model"](jnp.zeros((2, 8))),
        r"`tokens` must be integers .*shape \(2, 8\) and dtype float32",
    ),
    "a single token id": (
        lambda: layers()["model"](jnp.zeros((), int)),
        r"`tokens` must be integers with the axes .*shape \(\)",
    ),
    "positions that are not integers": (
        lambda: mode.TokenInfo(jnp.zeros((2, 8)), jnp.ones((2, 8), int)),
        r"`positions` must be of an integer dtype, got float32",
    ),
    "segments that are not integers": (
        lambda: mode.TokenInfo(jnp.zeros((2, 8), int), jnp.ones((2, 8), bool)),
        r"`segment_ids` must be of an integer dtype, got bool",
    ),
    "positions and segments of two shapes": (
        lambda: mode.TokenInfo(jnp.zeros((2, 8), int), jnp.ones((8,), int)),
        r"`positions` and `segment_ids` must have the same shape, got \(2, 8\) and \(8,\)",
    ),
    "an opinion on other tokens": (
        lambda: mode.agreement(routings(layers()["mod"])[0], jnp.zeros((2, 8, 1), bool)),
        r"`predicted` must have the axes .*\(2, 32, 1\), got \(2, 8, 1\)",
    ),
    "an assertion on nothing": (
        lambda: mode.testing.assert_causal(layers()["mod"]),
        r"exactly one of `dim` .*got dim=None and vocab=None",
    ),
    "an assertion on two things": (
        lambda: mode.testing.assert_causal(layers()["mod"], dim=DIM, vocab=VOCAB),
        r"exactly one of `dim` .*got dim=16 and vocab=32",
    ),
}


def replay_into(recorder: Any, player: Any) -> Any:
    select = mode.Replay(routings(recorder)[0])
    return mode.map_routers(lambda r: eqx.tree_at(lambda r: r.select, r, select), player)(x())


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_work_is_refused(name: str) -> None:
    call, words = REFUSED[name]
    with pytest.raises(ValueError, match=words):
        traced(call)


@pytest.mark.parametrize("name", ["dense", "mod", "moe", "block"])
@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (x(DIM), r"`x` must have the axes \[\*groups, tokens, dim\], got shape \(16,\)"),
        (x(2, 0, DIM), r"`x` must hold at least one token, got shape \(2, 0, 16\)"),
        (x(2, 8, 12), r"`x` must have 16 features .*`dim=16`, got shape \(2, 8, 12\)"),
        (x(2, 8, DIM, dtype=jnp.int32), r"`x` must be of a floating dtype, got int32"),
        (x(2, 8, DIM, dtype=bool), r"`x` must be of a floating dtype, got bool"),
    ],
    ids=["rank", "empty", "dim", "integers", "booleans"],
)
def test_hidden_states_that_no_layer_takes(name: str, bad: jax.Array, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        eqx.filter_eval_shape(layers()[name], bad)


@pytest.mark.parametrize("name", ["dense", "mod", "moe", "block", "model"])
@pytest.mark.parametrize("shape", [(8,), (2, 9), (3, 8)])
def test_info_of_other_tokens(name: str, shape: tuple[int, ...]) -> None:
    tokens = jnp.zeros((2, 8), int) if name == "model" else x(2, 8, DIM)
    words = rf"`info` must have the shape .*\(2, 8\), got {re.escape(str(shape))}"
    with pytest.raises(ValueError, match=words):
        eqx.filter_eval_shape(layers()[name], tokens, info(*shape))


def test_predicted_layers_are_accepted() -> None:
    """The other side of two refusals above."""
    layer = predicted(KEY)
    (routing,) = eqx.filter_eval_shape(layer, x())[1]
    assert eqx.filter_eval_shape(mode.predictor_bce, routing).shape == ()
    traced(lambda: by_predictor(layer))
