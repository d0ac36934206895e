"""Models that cannot be called as the contract says, and inputs that would check nothing."""

from collections.abc import Callable, Iterator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jaxtyping
import pytest
from jaxtyping import Array

import mode
from mode import testing
from tests.helpers import padded_info
from tests.layers import DIM, TOKENS, VOCAB, depth

from .models import ASSERTIONS, GOOD, HIDDEN, IDS, KEY


@pytest.fixture(autouse=True)
def _without_the_type_hook() -> Iterator[None]:
    """Users have none: the library's own errors are meant here."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


class OwnModel(eqx.Module):
    """A model of a user's own, whose call is not that of this library."""

    layer: Any

    def __call__(self, x: Array) -> Array:
        return self.layer(x)[0]


def own(result: Callable[[Array, Any], Any]) -> Callable[..., Any]:
    """A model with the right arguments and another result."""
    layer = depth(KEY)

    def call(x: Array, info: Any = None, *, key: Any = None) -> Any:
        return result(*layer(x, info, key=key))

    return call


CALLS: dict[str, tuple[Any, str]] = {
    "without info and key": (
        OwnModel(depth(KEY)),
        r"`model` must be called as `model\(x, info, key=key\)`, got OwnModel, which cannot",
    ),
    "a class": (OwnModel, r"got the class `OwnModel`, which cannot be called so"),
    "no function": (3, r"got int, which cannot be called so"),
}
RESULTS: dict[str, tuple[Any, str]] = {
    "the output alone": (own(lambda out, _: out), r"must return \(output, routings\), .*got \w+Tr"),
    "one routing": (own(lambda out, routings: (out, routings[0])), r"with a tuple .*got Routing"),
    "a list of routings": (
        own(lambda out, routings: (out, list(routings))),
        r"with a tuple of `Routing`, one for each router, got list \(Routing\) from function",
    ),
    "three values": (own(lambda out, routings: (out, routings, 1)), r"got tuple \("),
}


@pytest.mark.parametrize("assertion", ASSERTIONS)
@pytest.mark.parametrize("name", CALLS)
def test_a_model_with_another_call_is_refused(name: str, assertion: str) -> None:
    model, words = CALLS[name]
    with pytest.raises(ValueError, match=words):
        ASSERTIONS[assertion](model, HIDDEN)


@pytest.mark.parametrize("assertion", ["static_shapes", "residual_identity", "causal"])
@pytest.mark.parametrize("name", RESULTS)
def test_a_model_with_another_result_is_refused(name: str, assertion: str) -> None:
    model, words = RESULTS[name]
    with pytest.raises(ValueError, match=words):
        ASSERTIONS[assertion](model, HIDDEN)


INPUTS: dict[str, tuple[Any, Any, str]] = {
    "no array": ([1, 2], None, r"`x` must be an array of hidden states, .* got list"),
    "flags": (HIDDEN > 0, None, r"got the dtype bool"),
    "one number": (jnp.float32(1), None, r"`x` must have the axes .* got shape \(\)"),
    "no tokens": (HIDDEN[:, :0], None, r"at least one token, got shape \(2, 0, 16\)"),
    "info of other tokens": (
        HIDDEN,
        padded_info(3, 4, tokens=8),
        r"`info` must have the shape .* \(2, 32\), got \(2, 8\)",
    ),
    "info of another kind": (HIDDEN, HIDDEN[..., 0] > 0, r"`info` must be a `TokenInfo` or None"),
}


@pytest.mark.parametrize("assertion", ASSERTIONS)
@pytest.mark.parametrize("name", INPUTS)
def test_inputs_that_are_none_are_refused(name: str, assertion: str) -> None:
    x, info, words = INPUTS[name]
    with pytest.raises(ValueError, match=words):
        ASSERTIONS[assertion](GOOD["mod"](), x, info)


@pytest.mark.parametrize("assertion", [name for name in ASSERTIONS if name != "static_shapes"])
def test_shapes_are_refused_where_the_model_runs(assertion: str) -> None:
    shape = jax.ShapeDtypeStruct((2, TOKENS, DIM), jnp.float32)
    with pytest.raises(ValueError, match="must be arrays for an assertion that runs the model"):
        ASSERTIONS[assertion](GOOD["mod"](), shape)


NOTHING: dict[str, tuple[Callable[[], None], str]] = {
    "equal token ids": (
        lambda: testing.assert_causal(ids_model(), 0 * IDS),
        r"`x` must have at least two different token ids, .* got only 0",
    ),
    "equal token ids of a batch": (
        lambda: testing.assert_batch_independent(ids_model(), 0 * IDS + 3),
        r"at least two different token ids, .* got only 3",
    ),
    "one token": (
        lambda: testing.assert_causal(GOOD["causal"](), HIDDEN[:, :1]),
        r"`x` must have at least two tokens in time, got 1",
    ),
    "padding alone": (
        lambda: testing.assert_causal(GOOD["causal"](), HIDDEN, padded_info(0, 0, tokens=TOKENS)),
        r"`info` must have tokens that are not padding",
    ),
    "no batch": (
        lambda: testing.assert_batch_independent(GOOD["mod"](), HIDDEN[0]),
        r"`x` must have a first axis of at least 2 sequences, .* got shape \(32, 16\)",
    ),
    "a batch of one": (
        lambda: testing.assert_batch_independent(GOOD["mod"](), HIDDEN[:1]),
        r"at least 2 sequences, .* got shape \(1, 32, 16\)",
    ),
    "token ids for a layer": (
        lambda: testing.assert_residual_identity(ids_model(), IDS),
        r"`x` must be hidden states, .* got the dtype int32",
    ),
}


def ids_model() -> mode.Transformer:
    return mode.make_causal(mode.mod_transformer(VOCAB, DIM, 2, 2, key=KEY))


@pytest.mark.parametrize("name", NOTHING)
def test_inputs_that_check_nothing_are_refused(name: str) -> None:
    call, words = NOTHING[name]
    with pytest.raises(ValueError, match=words):
        call()
