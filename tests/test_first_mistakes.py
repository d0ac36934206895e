"""What somebody new to the library gets wrong, and the error that says so.

Found by readers who had only the README: a forgotten `[1]`, arguments in the wrong order, lists for
arrays, modules of one vector where sequences are wanted. Other errors are tested in each part.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest

import mode


KEY = jax.random.key(0)


def small(**options: Any) -> mode.Transformer:
    """A model of two layers."""
    return mode.mod_transformer(32, 16, depth=2, num_heads=2, key=KEY, **options)


def tokens() -> jax.Array:
    """A batch of two sequences."""
    return jnp.ones((2, 16), jnp.int32)


def state() -> mode.DecodeState:
    """A state of two sequences of 16 tokens, with room for four more."""
    return mode.prefill(mode.make_causal(small()), tokens(), max_tokens=20)[0]


def wrong(value: object) -> Any:
    """A value whose type a checker would refuse."""
    return value


def mlp(size: int) -> eqx.nn.MLP:
    """A module of one vector."""
    return eqx.nn.MLP(size, size, size, 1, key=KEY)


MISTAKES: dict[str, tuple[Callable[[], Any], str]] = {
    "the whole result for its routings": (
        lambda: mode.update_router_state(small(), wrong(small()(tokens()))),
        r"got .*Array.* in it\. It is the second",
    ),
    "a single routing": (
        lambda: mode.update_router_state(small(), wrong(small()(tokens())[1][0])),
        r"got a single Routing\. Pass `\(routing,\)`",
    ),
    "all routings for one": (
        lambda: mode.routing_metrics(wrong(small()(tokens())[1])),
        r"`routing` must be one `Routing`, got tuple\. .* `routings\[0\]`",
    ),
    "the same in a loss": (
        lambda: mode.router_z_loss(wrong(small()(tokens())[1])),
        "must be one `Routing`",
    ),
    "the same in a replay": (
        lambda: mode.Replay(wrong(small()(tokens())[1])),
        "must be one `Routing`",
    ),
    "a list of ids": (lambda: small()(wrong([[1, 2, 3]])), "`tokens` must be an array, got list"),
    "a list of hidden states": (
        lambda: mode.Residual(mode.PositionWise(jnp.tanh))(wrong([[1.0], [2.0]])),
        "`x` must be an array, got list",
    ),
    "a list of batches": (
        lambda: mode.calibrate_thresholds(small(), [tokens(), tokens()]),
        r"`batches` must each be an array .* got list\. Of a list of batches, pass `\*batches`",
    ),
    "text before the model": (
        lambda: mode.calibrate_thresholds(tokens(), small()),
        "`model` must be called with a batch",
    ),
    "a function for a list of functions": (
        lambda: mode.Transformer(32, 16, period=wrong(lambda key: small()), key=KEY),
        "`period` must be a list of functions",
    ),
    "no function": (lambda: mode.Transformer(32, 16, period=[], key=KEY), "at least one, .* got"),
    "a capacity of a layer of depths above 1": (
        lambda: mode.with_capacity(small(), 1.5)(tokens()),
        r"`capacity` must be above 0 and at most 1, got .*3",
    ),
    "a flag for a capacity": (
        lambda: mode.with_capacity(small(), True),
        "`capacity` must be a finite",
    ),
    "a module of one vector": (lambda: mode.Delta(mlp(8)), "by `PositionWise`"),
    "a function of one vector": (
        lambda: mode.Delta(lambda x: mlp(8)(x))(jnp.ones((2, 4, 8))),
        r"does not map \(4, 8\).* made a block by `PositionWise`",
    ),
    "integer logits": (
        lambda: mode.Sampler()(jnp.array([0, 1, 2]), KEY),
        "`logits` must be of a floating dtype, got int32",
    ),
    "a wavelength below 0": (
        lambda: mode.Attention(16, 2, rope_theta=-1.0, key=KEY),
        r"`rope_theta` must be a finite number above 0, or None, got -1\.0",
    ),
    "ids outside of the vocabulary, appended": (
        lambda: mode.decode_tokens(mode.make_causal(small()), state(), jnp.full((2, 2), 40)),
        "`tokens` must be ids from 0 to 31",
    ),
    "more tokens than the cache takes": (
        lambda: mode.decode_tokens(mode.make_causal(small()), state(), jnp.ones((2, 6), int)),
        "`tokens` must fit into the cache of max_tokens=20, got up to 22",
    ),
    "more tokens kept than there are": (
        lambda: mode.rewind(state(), jnp.array([19, 16]), jnp.zeros((2, 32))),
        r"`lengths` must be from 0 to \[16, 16\], got \[19, 16\]",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
@pytest.mark.usefixtures("without_type_checks")
def test_a_mistake_is_named(name: str) -> None:
    """A `ValueError` with the argument, the rule, what was got and the fix."""
    mistake, words = MISTAKES[name]
    with pytest.raises(ValueError, match=words):
        mistake()
