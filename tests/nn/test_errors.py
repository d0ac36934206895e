"""Errors of blocks and layers: each names the argument, the rule, the value and the fix."""

from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from jaxtyping import Array

import mode
from tests.layers import DIM, TOKENS, depth, expert, experts, transformer_block


pytestmark = pytest.mark.usefixtures("without_type_checks")

KEY = jax.random.key(0)
RESIDUAL_TWICE = r"must return the update alone, got a layer, `\w+`, which adds the residual itself"


def x(*shape: int, dtype: Any = jnp.float32) -> Array:
    return jnp.ones(shape or (2, TOKENS, DIM), dtype)


def mlp(key: Array, dim: int = DIM) -> eqx.nn.MLP:
    return eqx.nn.MLP(dim, dim, 8, 1, key=key)


def block() -> mode.TransformerBlock:
    return transformer_block(KEY)


def mod(block: Any = None, capacity: Any = 0.25, **options: Any) -> mode.MixtureOfDepths:
    block = transformer_block(KEY) if block is None else block
    return mode.MixtureOfDepths(block, DIM, capacity, key=KEY, **options)


def moe(make_expert: Any, num_experts: Any = 4, **options: Any) -> mode.MixtureOfExperts:
    return mode.MixtureOfExperts(make_expert, DIM, num_experts, key=KEY, **options)


def heads(dim: int, num_heads: Any, num_kv_heads: Any = None) -> mode.TransformerBlock:
    return mode.TransformerBlock(dim, num_heads, num_kv_heads=num_kv_heads, key=KEY)


def only_x(x: Any) -> Any:
    return x


def bare(x: Any, info: Any, *, key: Any = None) -> Any:
    return x


def listed(x: Any, info: Any, *, key: Any = None) -> Any:
    return x, []


def shorter(x: Any, info: Any, *, key: Any = None) -> Any:
    return x[..., :-1], ()


class Extending(eqx.Module):
    """A block with `extend`, which returns what `__call__` would."""

    def extend(self, x: Any, info: Any, cache: mode.Cache) -> Any:
        return x, ()


class Returning(mode.AbstractSelector):
    """A selector of a user's own that returns what it likes."""

    what: Callable[[mode.RoutingInputs], Any]
    is_causal: ClassVar[bool] = True
    max_capacity: ClassVar[mode.Capacity | None] = None  # pyright: ignore

    def __call__(self, inputs: mode.RoutingInputs, *, key: Any = None) -> Any:
        return self.what(inputs)


def replaced(select: mode.AbstractSelector, layer: Any) -> Any:
    """A call of a layer that was sound when it was built."""
    return mode.map_routers(lambda r: eqx.tree_at(lambda r: r.select, r, select), layer)(x())


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "a dense layer as a block": (lambda: mod(mode.Residual(block())), RESIDUAL_TWICE),
    "a routed layer as a block": (lambda: mod(mod()), RESIDUAL_TWICE),
    "a layer in a residual": (lambda: mode.Residual(mod()), RESIDUAL_TWICE),
    "a stack as a block": (
        lambda: mod(mode.stack_layers([lambda key: mod()], 2, key=KEY)),
        RESIDUAL_TWICE,
    ),
    "a layer as a feed-forward": (
        lambda: mode.TransformerBlock(DIM, 2, feedforward=experts(KEY), key=KEY),
        f"^`feedforward` {RESIDUAL_TWICE}",
    ),
    "heads twice": (
        lambda: mode.TransformerBlock(DIM, 2, attention=mode.Attention(DIM, 2, key=KEY), key=KEY),
        "exactly one of `num_heads` and `attention`, got both",
    ),
    "no heads": (
        lambda: mode.TransformerBlock(DIM, key=KEY),
        "exactly one of `num_heads` and `attention`, got neither",
    ),
    "an attention of another size": (
        lambda: mode.TransformerBlock(DIM, attention=mode.Attention(2 * DIM, 2, key=KEY), key=KEY),
        rf"`attention` must be an `Attention` of dim={DIM} features",
    ),
    "an odd size of a head by name": (
        lambda: mode.Attention(DIM, 2, head_dim=7, key=KEY),
        "`head_dim` must be even.*head_dim=7",
    ),
    "a layer in a delta": (
        lambda: mode.Delta(mode.Residual(block())),  # pyright: ignore[reportArgumentType]
        r"`module` of `Delta` must map .*, got a layer, `Residual`",
    ),
    "a block in a delta": (
        lambda: mode.Delta(listed),
        r"`module` of `Delta` must be called with one argument.*got function",
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
    "a block that cannot be called": (
        lambda: mode.Residual(3),  # pyright: ignore[reportArgumentType]
        r"`block` must be a block.*got int",
    ),
    "a block without routings": (
        lambda: mode.Residual(bare)(x()),
        r"`block` must return \(update, routings\).*got \w+ from function",
    ),
    "routings in a list": (
        lambda: mod(listed)(x()),
        r"`block` must return \(update, routings\).*got a tuple of 2 from function",
    ),
    "an `extend` without entries": (
        lambda: mod(Extending())(x()),
        r"`block` must return \(update, routings, entries\) from `extend`.*got a tuple of 2 from E",
    ),
    "a block that changes the shape": (
        lambda: mod(shorter)(x()),
        r"`block` must keep the shape of its input, \(2, 8, 16\), got \(2, 8, 15\)",
    ),
    "a module that changes the shape": (
        lambda: mode.Residual(mode.Delta(lambda rows: rows[:-1]))(x()),
        r"`module` must keep the shape of its input, \(32, 16\), got \(31, 16\)",
    ),
    "a function that changes the size": (
        lambda: mode.Residual(mode.PositionWise(lambda row: row[:-1]))(x()),
        r"`function` must keep the shape of its input, \(16,\), got \(15,\)",
    ),
    "an attention function that is none": (
        lambda: mode.TransformerBlock(DIM, 2, attend="causal", key=KEY),  # pyright: ignore
        r"`attend` must be an attention function, such as `CausalAttention\(\)`, got str",
    ),
    "the class of an attention function": (
        lambda: mode.TransformerBlock(DIM, 2, attend=mode.CausalAttention, key=KEY),  # pyright: ignore
        r"`attend` must be an attention function.*got the class `CausalAttention`",
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
        r"`make_expert` must keep the shape of its input, \(16,\), got \(17,\)",
    ),
    "experts of another size": (
        lambda: moe(lambda key: mlp(key, DIM + 1)),
        r"`make_expert` must build experts of vectors of `dim=16` features, but its expert, MLP,",
    ),
    "token choice of a single choice": (
        lambda: mod(select=mode.TokenChoice(1)),
        r"`select` of `MixtureOfDepths` must not be `TokenChoice`, got TokenChoice\(k=1\)",
    ),
    "token choice of a single choice after surgery": (
        lambda: replaced(mode.TokenChoice(1), mod()),
        r"`select` of `MixtureOfDepths` must not be `TokenChoice`",
    ),
    "a softmax over one choice": (
        lambda: mod(gate=mode.SoftmaxGate()),
        r"`gate` of `MixtureOfDepths` must not be a softmax, got SoftmaxGate\(\)",
    ),
    "a softmax over one selected expert": (
        lambda: mod(gate=mode.SelectedSoftmaxGate()),
        r"`gate` of `MixtureOfDepths` must not be a softmax, got SelectedSoftmaxGate\(\)",
    ),
    "a gate without a gradient after surgery": (
        lambda: replaced(
            mode.TokenChoice(1),
            experts(KEY, gate=mode.SelectedSoftmaxGate(), select=mode.TokenChoice(2)),
        ),
        r"`gate=SelectedSoftmaxGate\(\)` with `select=TokenChoice\(1\)` .* no gradient",
    ),
    "a selector that returns an array": (
        lambda: mod(select=Returning(lambda inputs: inputs.scores))(x()),
        r"`select`, Returning, must return an `Assignment\(index, load\)`, got",
    ),
    "a predictor that is none": (
        lambda: mod(predictor=True),
        r"`predictor` must map hidden states .* or be None, got True",
    ),
    "an expert without a slot": (
        lambda: experts(KEY, capacity_factor=0.1)(x()),
        r"`capacity_factor` must .* got 32 \* 0\.1 / 4 = 0\.8\. .*at least 0\.125",
    ),
    "an expert without a slot for selected tokens": (
        lambda: mode.staged_mode_layer(expert, DIM, 2, 8, capacity=0.125, key=KEY)(x()),
        r"`capacity_factor` must .* got 4 \* 1 / 8 = 0\.5\.",
    ),
    "heads that do not divide": (
        lambda: heads(18, 4),
        r"`dim` must be `num_heads` times an even number.*dim=18 and num_heads=4.* 24\.",
    ),
    "an odd size of a head": (
        lambda: heads(12, 4),
        r"`dim` must be `num_heads` times an even number.*dim=12 and num_heads=4.* 16\.",
    ),
    "shared heads that do not divide": (
        lambda: heads(24, 4, 3),
        r"`num_heads` must be divisible by `num_kv_heads`, got 4 and 3",
    ),
    "more shared heads than heads": (
        lambda: heads(16, 2, 4),
        r"`num_heads` must be divisible by `num_kv_heads`, got 2 and 4",
    ),
    "random routing without a key": (
        lambda: depth(KEY, select=mode.RandomChoice())(x()),
        r"`key` is needed by `RandomChoice`, got None",
    ),
    "segment ids in place of info": (
        lambda: mode.Residual(block())(x(), jnp.ones((2, TOKENS), int)),  # pyright: ignore
        r"`info` must be a `TokenInfo`, got .*`TokenInfo\.packed`",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_says_why(name: str) -> None:
    """Where the layer is built or the program is traced; nothing need run."""
    call, words = REFUSED[name]
    with pytest.raises(ValueError, match=words):
        eqx.filter_eval_shape(call)
