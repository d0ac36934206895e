"""What users put together: their own modules fit in, and what cannot fit says why."""

from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

import mode

from .layers import DIM, TOKENS, VOCAB, Blend, depth, expert, experts, transformer_block


KEY = jax.random.key(0)
RESIDUAL_TWICE = r"must return the update alone, got a layer, `\w+`, which adds the residual itself"


@pytest.fixture(autouse=True)
def as_users_see_it() -> Iterator[None]:
    """Without the suite's type hook, which would refuse some of these first."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def x() -> jax.Array:
    return jnp.ones((2, TOKENS, DIM))


def mlp(key: jax.Array, dim: int = DIM) -> eqx.nn.MLP:
    return eqx.nn.MLP(dim, dim, 8, 1, key=key)


def block() -> mode.TransformerBlock:
    return transformer_block(KEY)


def mod(block: Any, **options: Any) -> mode.MixtureOfDepths:
    return mode.MixtureOfDepths(block, DIM, 0.25, key=KEY, **options)


def moe(make_expert: Any, **options: Any) -> mode.MixtureOfExperts:
    return mode.MixtureOfExperts(make_expert, DIM, 4, key=KEY, **options)


def only_x(x: Any) -> Any:
    return x


def bare(x: Any, info: Any, *, key: Any = None) -> Any:
    return x


def listed(x: Any, info: Any, *, key: Any = None) -> Any:
    return x, []


def shorter(x: Any, info: Any, *, key: Any = None) -> Any:
    return x[..., :-1], ()


class Returning(mode.AbstractSelector):
    """A selector of a user's own that returns what it likes."""

    what: Callable[[mode.Request], Any]
    looks_ahead: ClassVar[bool] = False

    def share(self, fraction: Any) -> Any:
        return fraction

    def __call__(self, request: mode.Request, *, key: Any = None) -> Any:
        return self.what(request)


class Forgetful(mode.AbstractGate):
    """A gate of a user's own that returns a weight for every choice."""

    def scores(self, logits: Any) -> Any:
        return logits

    def __call__(self, logits: Any, selected: Any) -> Any:
        return logits


def swapped() -> Any:
    layer = depth(KEY, Blend)
    return eqx.tree_at(lambda m: m.router.select, layer, mode.TokenChoice(1))(x())


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "a dense layer as a block": (lambda: mod(mode.Residual(block())), RESIDUAL_TWICE),
    "a routed layer as a block": (lambda: mod(mod(block())), RESIDUAL_TWICE),
    "a layer in a residual": (lambda: mode.Residual(mod(block())), RESIDUAL_TWICE),
    "a residual in a residual": (lambda: mode.Residual(mode.Residual(block())), RESIDUAL_TWICE),
    "a layer as a feed-forward": (
        lambda: mode.TransformerBlock(DIM, 2, feedforward=experts(KEY), key=KEY),
        f"^`feedforward` {RESIDUAL_TWICE}",
    ),
    "a stack as a block": (
        lambda: mod(mode.mod_decoder(VOCAB, DIM, 4, 2, key=KEY).stacks[0]),
        RESIDUAL_TWICE,
    ),
    "a layer in a delta": (
        lambda: mode.Delta(mode.Residual(block())),
        r"`module` of `Delta` must map .*, got a layer, `Residual`",
    ),
    "a block in a delta": (
        lambda: mode.Delta(block()),
        r"`module` of `Delta` must be called with one argument.*got TransformerBlock",
    ),
    "a module without a delta": (
        lambda: mod(mlp(KEY)),
        r"`block` must be a block, called as `block\(x, info, key=key\)`.*got MLP.*`Delta\(",
    ),
    "a function of the tokens alone": (
        lambda: mode.Residual(only_x),
        r"`block` must be a block, .*got function, .*`PositionWise\(function\)`",
    ),
    "the class of a block": (
        lambda: mod(mode.TransformerBlock),
        r"`block` must be a block.*got the class `TransformerBlock`",
    ),
    "no block at all": (lambda: mod(None), r"`block` must be a block.*got NoneType"),
    "a block without routings": (
        lambda: mode.Residual(bare)(x()),
        r"`block` must return \(update, routings\).*got \w+ from function",
    ),
    "routings in a list": (
        lambda: mod(listed)(x()),
        r"`block` must return \(update, routings\).*got tuple from function",
    ),
    "a block that changes the shape": (
        lambda: mod(shorter)(x()),
        r"`block` must keep the shape .*\(2, 8, 16\), got \(2, 8, 15\)",
    ),
    "a module that changes the shape": (
        lambda: mode.Residual(mode.Delta(lambda rows: rows[:-1]))(x()),
        r"`module` must keep the shape of what it is given, \(32, 16\), got \(31, 16\)",
    ),
    "a function that changes the size": (
        lambda: mode.Residual(mode.PositionWise(lambda row: row[:-1]))(x()),
        r"`function` must keep the shape .*\(16,\), got \(15,\)",
    ),
    "an expert in place of its constructor": (
        lambda: moe(mlp(KEY)),
        r"`make_expert` must build one expert from a key, got an expert .* MLP\. Pass a function",
    ),
    "a constructor with another signature": (
        lambda: moe(lambda *, key: mlp(key)),
        r"`make_expert` must build one expert from a key, its only argument, got function",
    ),
    "a constructor that builds nothing": (
        lambda: moe(lambda key: None),
        r"`make_expert` must return a function of one vector, got NoneType",
    ),
    "experts that change the size": (
        lambda: moe(lambda key: eqx.nn.Linear(DIM, DIM + 1, key=key)),
        r"`make_expert` must keep the shape .*\(16,\), got \(17,\)",
    ),
    "experts of another size": (
        lambda: moe(lambda key: mlp(key, DIM + 1)),
        r"`make_expert` must build experts of vectors of `dim=16` features, but its expert, MLP,",
    ),
    "token choice of a single choice": (
        lambda: mod(block(), select=mode.TokenChoice(1)),
        r"`select` of `MixtureOfDepths` must not be `TokenChoice`, got TokenChoice\(k=1\)",
    ),
    "token choice of a single choice, swapped in": (
        swapped,
        r"`select` of `MixtureOfDepths` must not be `TokenChoice`",
    ),
    "the class of a selector": (
        lambda: mod(block(), select=mode.RandomChoice),
        r"`select` must be an instance of `AbstractSelector`.*got the class `RandomChoice`",
    ),
    "the name of a selector": (
        lambda: moe(expert, select="top_k"),
        r"`select` must be an instance of `AbstractSelector`.*got 'top_k'",
    ),
    "the class of a gate": (
        lambda: mod(block(), gate=mode.Sigmoid),
        r"`gate` must be an instance of `AbstractGate`.*got the class `Sigmoid`",
    ),
    "the class of a rule": (
        lambda: mode.causal(mod(block()), by=mode.ByLogit),
        r"`by` must be an instance of `AbstractRule`.*got the class `ByLogit`",
    ),
    "a capacity in quotes": (
        lambda: mode.MixtureOfDepths(block(), DIM, "0.5", key=KEY),
        r"`capacity` must be above 0 and at most 1, got '0\.5'",
    ),
    "a capacity factor in quotes": (
        lambda: moe(expert, capacity_factor="1"),
        r"`capacity_factor` must be a finite number above 0, got '1'",
    ),
    "a limit in quotes": (
        lambda: mode.Threshold(limit="1"),
        r"`limit` of `Threshold` must be in \(0, 1\] or None, got '1'",
    ),
    "a predictor that is none": (
        lambda: mod(block(), predictor=True),
        r"`predictor` must map hidden states .* or be None, got True",
    ),
    "half an expert": (
        lambda: mode.MixtureOfExperts(expert, DIM, 2.5, key=KEY),
        r"`num_experts` must be an integer of at least 1, got 2\.5",
    ),
    "no-ops that cancel the experts": (
        lambda: mode.integrated_mode(expert, DIM, 2, 2, -2, key=KEY),
        r"`num_noop` must be at least 0, got -2",
    ),
    "a schedule in an array": (
        lambda: mode.mod_decoder(VOCAB, DIM, 4, 2, capacity=np.array([0.5, 0.25]), key=KEY),
        r"`capacity` must be above 0 and at most 1, got array\(\[0\.5",
    ),
    "a block called with info of other tokens": (
        lambda: block()(x(), mode.TokenInfo.plain((2, TOKENS - 1))),
        r"`info` must have the shape .*\(2, 32\), got \(2, 31\)",
    ),
    "an empty batch": (
        lambda: mod(block())(x()[:0]),
        r"`x` must hold at least one token, got shape \(0, 32, 16\)",
    ),
    "a block as a layer": (
        lambda: mode.Transformer(VOCAB, DIM, [transformer_block], key=KEY),
        r"`layers` must build layers, .* got a block, `TransformerBlock`.*`Residual\(block\)`",
    ),
    "a bare module as a layer": (
        lambda: mode.Transformer(VOCAB, DIM, [mlp], key=KEY),
        r"`layers` must build layers, called as .*got MLP",
    ),
    "a layer in place of its constructor": (
        lambda: mode.Transformer(VOCAB, DIM, [mode.Residual(block())], key=KEY),
        r"`layers` must be functions, .*builds a layer from a key, got Residual",
    ),
    "segment ids in place of info": (
        lambda: mode.Residual(block())(x(), jnp.ones((2, TOKENS), int)),
        r"`info` must be a `TokenInfo`, got .*`TokenInfo\.packed`",
    ),
    "the class of a predictor": (
        lambda: mod(block(), predictor=mode.Predictor),
        r"`predictor` must map hidden states",
    ),
    "a selector that returns an array": (
        lambda: mod(block(), select=Returning(lambda r: r.scores))(x()),
        r"`select`, Returning, must return a `Selection\(index, load\)`, got",
    ),
    "a selector with an index of another shape": (
        lambda: mod(block(), select=Returning(lambda r: mode.Selection(r.valid[:, :8], r.valid)))(
            x()
        ),
        r"`select`, Returning, must return an index .*= \(2, 1, 8\).*got \(2, 8\) and \(2, 32\)",
    ),
    "a gate that forgets the no-ops": (
        lambda: moe(expert, num_noop=2, gate=Forgetful())(x()),
        r"`gate`, Forgetful, must return one weight .*\(2, 32, 4\), .*got \(2, 32, 6\)",
    ),
    "a routing in place of the tuple": (
        lambda: mode.update_state(mod(block()), mod(block())(x())[1][0]),
        r"`routings` must be the tuple .* got a single Routing\. Pass `\(routing,\)`",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_says_why(name: str) -> None:
    call, words = REFUSED[name]
    with pytest.raises(ValueError, match=words):
        eqx.filter_eval_shape(call)


DROPOUT = eqx.nn.Dropout(0.5)


class Dropping(eqx.Module):
    """An expert whose result a key decides."""

    dropout: eqx.nn.Dropout
    weight: jax.Array

    def __init__(self, key: jax.Array):
        self.dropout = DROPOUT
        self.weight = jnp.ones(DIM)

    def __call__(self, vector: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        return self.dropout(self.weight * vector, key=key)


@pytest.mark.parametrize(
    "make",
    [
        lambda: mode.Residual(mode.Delta(DROPOUT)),
        lambda: mode.Residual(mode.PositionWise(DROPOUT)),
        lambda: mode.Residual(moe(Dropping, num_shared=1, router_std=1.0)),
        lambda: mod(mode.Delta(DROPOUT), select=mode.RandomChoice()),
    ],
    ids=["delta", "position-wise", "experts", "depth"],
)
def test_a_module_with_dropout_gets_keys(make: Callable[[], Any]) -> None:
    """A key is passed to every module that takes one, a different one to every row."""
    layer = make()
    run = jax.jit(lambda x, key: layer(x, key=key)[0] - x)
    first, again, other = (run(x(), jax.random.key(seed)) for seed in (1, 1, 2))
    assert (first == again).all()
    assert (first != other).any()
    assert (first[0] != first[1]).any()
    with pytest.raises((RuntimeError, ValueError), match="key"):
        layer(x())


@pytest.mark.parametrize("number", [np.float32(0.25), np.float64(0.25), Fraction(1, 4)])
def test_numbers_of_any_kind_are_shares(number: Any) -> None:
    """NumPy's too, in the precision they were written in; the count is a Python integer."""
    model = mode.mod_decoder(VOCAB, DIM, 2, 2, capacity=number, key=KEY)
    assert mode.routers(model)[0].fraction == Fraction(1, 4)
    assert mode.token_capacity(np.int64(1000), np.float32(0.7)) == 700
    assert type(mode.token_capacity(np.int64(1000), number)) is int


def test_a_block_of_a_wider_dtype_keeps_the_stream_s() -> None:
    """A block that computes in float32 does not widen a bfloat16 model."""

    def wide(x: Any, info: Any, *, key: Any = None) -> Any:
        return x.astype(jnp.float32) / 2, ()

    for layer in (mode.Residual(wide), mod(wide)):
        for info in (None, mode.TokenInfo.plain((2, TOKENS))):
            hidden, _ = jax.eval_shape(lambda x, layer=layer, info=info: layer(x, info), x16())
            assert hidden.dtype == jnp.bfloat16


def x16() -> jax.Array:
    return x().astype(jnp.bfloat16)


@pytest.mark.parametrize("bad", [VOCAB, VOCAB + 7, -1])
def test_a_token_id_that_does_not_exist_is_seen(bad: int) -> None:
    """Clamping it would train on another token in silence. In the padding any id may stand."""
    model = mode.causal(mode.mod_decoder(VOCAB, DIM, 2, 2, key=KEY))
    run = jax.jit(lambda tokens, info: model(tokens, info)[0])
    tokens = jnp.arange(16).reshape(2, 8) % VOCAB
    whole = mode.TokenInfo.plain((2, 8))
    padded = mode.TokenInfo.packed(jnp.broadcast_to(jnp.arange(8) < 5, (2, 8)).astype(int))
    changed = tokens.at[0, 5].set(bad)
    assert jnp.isnan(run(changed, whole)[0, 5]).all()
    assert (run(changed, whole)[1] == run(tokens, whole)[1]).all()
    assert (run(changed, padded) == run(tokens, padded)).all()
