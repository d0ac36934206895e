"""Blocks and layers of a user's own: what they write decides whether they train and decode."""

import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array, Float, PRNGKeyArray

import mode
from tests.decoding.cases import DIM, LENGTHS, PROMPT, TOKENS, VOCAB, dense, draw_texts
from tests.helpers import assert_close, run


def running_mean(
    new: Float[Array, "batch new dim"], info: mode.TokenInfo, cache: mode.Cache
) -> tuple[Float[Array, "batch new dim"], Float[Array, "batch new dim"]]:
    """The mean of all tokens so far, and what later tokens need of the new ones."""
    real = jnp.where(info.valid[..., None], new, 0)
    total, count = jnp.cumsum(real, axis=-2), jnp.cumsum(info.valid, axis=-1)
    if cache.info is not None:
        earlier = cache.info.valid
        total += jnp.sum(jnp.where(earlier[..., None], cache.entries, 0), -2, keepdims=True)
        count += jnp.sum(earlier, axis=-1, keepdims=True)
    return total / jnp.maximum(count, 1).astype(new.dtype)[..., None], real


class Abstract(mode.AbstractBlock):
    """A block with `extend` alone, of the library's base class."""

    linear: mode.Linear

    def extend(
        self,
        x: Float[Array, "*groups tokens dim"],
        info: mode.TokenInfo,
        cache: mode.Cache,
        *,
        key: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, "*groups tokens dim"], tuple[mode.Routing, ...], Any]:
        update, entries = running_mean(self.linear(x), info, cache)
        return update, (), entries


class Plain(eqx.Module):
    """A block with `extend` alone, which is an Equinox module and nothing else."""

    linear: mode.Linear

    def extend(self, x: Any, info: Any, cache: Any, *, key: Any = None) -> Any:
        update, entries = running_mean(self.linear(x), info, cache)
        return update, (), entries


class WithoutKey(eqx.Module):
    """A block whose `extend` takes no key."""

    linear: mode.Linear

    def extend(self, x: Any, info: Any, cache: Any) -> Any:
        update, entries = running_mean(self.linear(x), info, cache)
        return update, (), entries


class Tree(eqx.Module):
    """A block that leaves a tree of arrays, with further axes."""

    linear: mode.Linear

    def extend(self, x: Any, info: Any, cache: Any) -> Any:
        if not cache.is_empty:
            entries = cache.entries["sum"][0][:, 0, :, :]
            cache = mode.Cache(entries, cache.info, cache.length, cache.max_tokens)
        update, entries = running_mean(self.linear(x), info, cache)
        return update, (), {"sum": (entries[..., None, :, :],), "none": None}


class TrainingOnly(eqx.Module):
    """A block with `__call__` alone."""

    linear: mode.Linear

    def __call__(self, x: Any, info: Any, *, key: Any = None) -> Any:
        return running_mean(self.linear(x), info, mode.Cache.empty())[0], ()


class OwnLayer(mode.AbstractLayer):
    """A layer of a user's own: half of a block's update, and a router that records alone."""

    block: mode.TransformerBlock
    router: mode.Router

    def extend(
        self,
        x: Float[Array, "*groups tokens dim"],
        info: mode.TokenInfo,
        cache: Any,
        *,
        key: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, "*groups tokens dim"], tuple[mode.Routing, ...], Any]:
        routing = self.router(x, info)
        update, _, entries = self.block.extend(x, info, cache, key=key)
        new = mode.Cache.of_tokens(entries, info, cache.max_tokens)
        return x + 0.5 * update, (routing,), new


class OwnTrainingLayer(eqx.Module):
    """A layer with `__call__` alone."""

    linear: mode.Linear

    def __call__(self, x: Any, info: Any = None, *, key: Any = None) -> Any:
        return x + self.linear(x), ()


def linear(key: PRNGKeyArray) -> mode.Linear:
    return mode.Linear(DIM, DIM, key=key)


def model_of(make: Callable[[PRNGKeyArray], Any]) -> mode.Transformer:
    """The block in a dense and in a routed layer."""

    def routed(key: PRNGKeyArray) -> mode.MixtureOfDepths:
        return mode.MixtureOfDepths(make(key), DIM, 0.5, router_std=0.8, key=key)

    period = [lambda key: mode.Residual(make(key)), routed]
    model = mode.Transformer(VOCAB, DIM, period, key=jax.random.key(2))
    return mode.make_causal(model, threshold=mode.LogitThreshold())


def assert_trains(model: mode.Transformer) -> Float[Array, "batch tokens vocab"]:
    """A loss has finite gradients that reach every block; returns the logits."""

    @eqx.filter_jit
    def loss(model: mode.Transformer) -> tuple[Array, tuple[Any, Any]]:
        logits, routings = model(draw_texts())
        return jnp.mean(jnp.sin(logits)), (logits, routings)

    gradient, (logits, routings) = run(eqx.filter_grad(loss, has_aux=True), model)
    assert len(routings) == len(mode.routers(model))
    for layer in gradient.stacks[0].layers:
        for leaf in jax.tree.leaves(eqx.filter(layer, eqx.is_inexact_array)):
            assert np.isfinite(leaf).all()
    assert np.any(jax.tree.leaves(gradient.stacks[0].layers[0])[0])
    return logits


def assert_decodes(model: mode.Transformer, expected: Float[Array, "batch tokens vocab"]) -> None:
    """A ragged prompt, then several tokens at once, and a step."""
    text, rows = draw_texts(), np.arange(len(draw_texts()))
    state, _ = mode.prefill(model, text[:, :PROMPT], LENGTHS, max_tokens=TOKENS)
    at = np.asarray(LENGTHS)[:, None] + np.arange(6)
    logits, state, _ = mode.decode_tokens(model, state, text[rows[:, None], at])
    assert_close(logits, expected[rows[:, None], at], scale=10)
    state, routings = mode.decode_step(model, state, text[rows, np.asarray(state.length)])
    assert_close(state.logits, expected[rows, np.asarray(state.length) - 1], scale=10)
    assert len(routings) == len(mode.routers(model))


@pytest.mark.parametrize("kind", [Abstract, Plain, WithoutKey, Tree])
def test_a_block_with_extend_alone_trains_and_decodes(kind: Callable[[mode.Linear], Any]) -> None:
    model = model_of(lambda key: kind(linear(key)))
    assert_decodes(model, assert_trains(model))


def test_a_block_with_call_alone_trains_and_is_refused_by_prefill_by_name() -> None:
    """And is the same block otherwise."""
    model = model_of(lambda key: TrainingOnly(linear(key)))
    same = model_of(lambda key: Abstract(linear(key)))
    assert_close(assert_trains(model), run(same, draw_texts())[0])
    words = r"`model` must be able to decode, but `TrainingOnly` in it has no method `extend"
    with pytest.raises(ValueError, match=words):
        mode.prefill(model, draw_texts(), max_tokens=TOKENS)


def test_a_layer_of_a_users_own_decodes() -> None:
    """Its routings are returned like any other's."""

    def make(key: PRNGKeyArray) -> OwnLayer:
        router = mode.Router(
            DIM,
            3,
            capacity=1.0,
            select=mode.TokenChoice(1),
            gate=mode.SoftmaxGate(),
            std=0.8,
            key=key,
        )
        block = mode.TransformerBlock(DIM, 2, key=key)
        return OwnLayer(block, router)

    model = mode.Transformer(VOCAB, DIM, [make, dense], key=jax.random.key(2))
    assert_decodes(model, assert_trains(model))


@functools.cache
def training_layer() -> mode.Transformer:
    return mode.Transformer(
        VOCAB, DIM, [dense, lambda key: OwnTrainingLayer(linear(key))], key=jax.random.key(2)
    )


def test_a_layer_with_call_alone_trains_and_is_refused_by_prefill_by_name() -> None:
    assert_trains(training_layer())
    words = r"its layer `OwnTrainingLayer` is no `AbstractLayer` with a method `extend`"
    with pytest.raises(ValueError, match=words):
        mode.prefill(training_layer(), draw_texts(), max_tokens=TOKENS)


def test_a_stack_inside_a_stack_decodes() -> None:
    """A layer that is made of layers keeps a cache for each of them."""

    def stack(key: PRNGKeyArray) -> mode.LayerStack:
        return mode.stack_layers([dense, dense], 2, key=key)

    model = mode.Transformer(VOCAB, DIM, [stack, dense], 2, key=jax.random.key(2))
    assert_decodes(model, assert_trains(model))


def test_a_module_in_delta_is_refused_by_prefill_by_name() -> None:
    """It maps whole sequences, and has no form for new tokens."""
    model = model_of(lambda key: mode.Delta(jnp.sin))
    with pytest.raises(ValueError, match=r"`Delta` in it wraps \w+, which maps whole"):
        mode.prefill(model, draw_texts(), max_tokens=TOKENS)
