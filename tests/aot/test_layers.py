"""What the real compilers of TPU and GPU make of every layer: that they accept it, what moves."""

import os
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import pytest
from jaxtyping import Array, PRNGKeyArray

import mode
from mode.aot import compile_for

from .compilers import GPU, TPU


pytestmark = pytest.mark.optimized


DIM, VOCAB, TOKENS, HEADS = 256, 512, 512, 4
KEY = jax.random.key(0)
TARGETS = [pytest.param("tpu:v5e:2x2", marks=TPU), pytest.param("cuda:h100", marks=GPU)]


def block(key: PRNGKeyArray) -> mode.TransformerBlock:
    return mode.TransformerBlock(DIM, HEADS, key=key)


def expert(key: PRNGKeyArray) -> mode.SwiGLUFeedForward:
    return mode.SwiGLUFeedForward(DIM, key=key)


KINDS: dict[str, Callable[[PRNGKeyArray], Any]] = {
    "dense": lambda key: mode.Residual(block(key)),
    "mod": lambda key: mode.MixtureOfDepths(block(key), DIM, 0.25, key=key),
    "queries": lambda key: mode.MixtureOfQueries(block(key), DIM, 0.25, key=key),
    "moe": lambda key: mode.integrated_mode_layer(expert, DIM, HEADS, 8, 0, key=key),
    "staged": lambda key: mode.staged_mode_layer(expert, DIM, HEADS, 8, capacity=0.5, key=key),
    "integrated": lambda key: mode.integrated_mode_layer(expert, DIM, HEADS, 4, 4, key=key),
}
WHOLE = (mode.ShardingRule("experts", ("expert",)), mode.ShardingRule(None))


def model_of(kind: str) -> mode.Transformer:
    """Shapes alone: a dense layer and one of the kind, which no loop repeats."""
    period = [KINDS["dense"], KINDS[kind]] if kind != "dense" else [KINDS["dense"]]
    return eqx.filter_eval_shape(lambda: mode.Transformer(VOCAB, DIM, period, key=KEY))


def tokens_of(batch: int, extra: int = 0) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((batch, TOKENS + extra), jnp.int32)


def forward(model: mode.Transformer, tokens: Array) -> Array:
    return model(tokens)[0]


OPTIMIZER = optax.adamw(1e-3)


def train(model: mode.Transformer, state: Any, tokens: Array) -> Any:
    parameters, rest = eqx.partition(model, mode.is_trainable(model))

    def loss(parameters: Any) -> Any:
        logits, routings = eqx.combine(parameters, rest)(tokens[:, :-1])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
        return losses.mean(), routings

    gradient, routings = jax.grad(loss, has_aux=True)(parameters)
    with jax.numpy_dtype_promotion("standard"):
        updates, state = OPTIMIZER.update(gradient, state, parameters)
    return mode.update_router_state(eqx.apply_updates(model, updates), routings), state


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_layer_compiles(kind: str, target: str) -> None:
    """Forward, training step and decode step, with sharded parameters and experts."""
    axes = {"data": 2, "expert": 2} if target.startswith("tpu") else {"data": 1}
    model, tokens = model_of(kind), tokens_of(4)
    parameters = compile_for(target, forward, model, tokens, axes=axes).argument_bytes
    state = eqx.filter_eval_shape(OPTIMIZER.init, eqx.filter(model, mode.is_trainable(model)))
    trained = compile_for(target, train, model, state, tokens_of(4, 1), axes=axes, donate=(0, 1))
    assert trained.argument_bytes > 2.5 * parameters  # Adam's two moments beside them
    sampler = mode.make_causal(eqx.filter_eval_shape(lambda m: m, model), max_capacity=0.5)
    sampler = eqx.filter_eval_shape(mode.unstack_layers, sampler)
    decode_state, _ = eqx.filter_eval_shape(mode.prefill, sampler, tokens, max_tokens=2 * TOKENS)
    new = jax.ShapeDtypeStruct((4,), jnp.int32)
    arguments = (target, mode.decode_step, sampler, decode_state, new)
    if target.startswith("cuda") and os.environ.get("EQX_ON_ERROR") != "off":
        with pytest.raises(ValueError, match=r"must not call back to Python.*EQX_ON_ERROR=off"):
            compile_for(*arguments, axes=axes)
    else:
        assert compile_for(*arguments, axes=axes).argument_bytes > 0


@TPU
@pytest.mark.parametrize("kind", ["dense", "mod"])
def test_data_parallel_adds_no_collective(kind: str) -> None:
    compiled = compile_for(
        "tpu:v5e:4x4", forward, model_of(kind), tokens_of(16), rules=[WHOLE, mode.BATCH_RULES]
    )
    assert compiled.collectives == ()


@TPU
@pytest.mark.parametrize("kind", ["moe", "staged", "integrated"])
def test_experts_are_two_exchanges(kind: str) -> None:
    """There and back; no weights of experts and no activations are gathered."""
    compiled = compile_for(
        "tpu:v5e:4x4",
        forward,
        model_of(kind),
        tokens_of(16),
        axes={"data": 4, "expert": 4},
        rules=[WHOLE, mode.BATCH_RULES],
    )
    assert [one.kind for one in compiled.collectives] == ["all-to-all"] * 2
    assert compiled.count("all-to-all") == 2


@TPU
def test_router_state_moves_counts_and_no_scores() -> None:
    """Of 8 experts, however many tokens there are: a sort would gather the scores of all."""
    compiled = compile_for(
        "tpu:v5e:4x4",
        lambda model, tokens: mode.update_router_state(model, model(tokens)[1]),
        model_of("moe"),
        tokens_of(16),
        axes={"data": 4, "expert": 4},
        rules=[WHOLE, mode.BATCH_RULES],
    )
    moved = [one for one in compiled.collectives if one.kind != "all-to-all"]
    assert moved
    assert all(one.kind == "all-reduce" and one.bytes < 1024 for one in moved)


@TPU
@pytest.mark.parametrize("kind", KINDS)
def test_flops_are_divided(kind: str) -> None:
    """Within 3 % of an equal part of `count_flops`, by the compiler's own count."""
    model, tokens = model_of(kind), tokens_of(16)
    compiled = compile_for(
        "tpu:v5e:4x4",
        forward,
        model,
        tokens,
        axes={"data": 4, "expert": 4},
        rules=[WHOLE, mode.BATCH_RULES],
    )
    ideal = mode.count_flops(forward, model, tokens).total / 16
    assert compiled.flops is not None
    assert abs(compiled.flops / ideal - 1) < 0.03
