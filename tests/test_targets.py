"""What the real compilers of TPU and GPU make of every layer: that they take it, and what moves.

The first part needs the extras `aot-tpu` and `aot-gpu`, which CI installs; it is skipped where they
are not there. The second needs neither.
"""

import importlib.util
import os
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import pytest

import mode
from mode import _hlo
from mode.testing import Exceeded, compiles_for, memory_of


OPTIMISED = True

# The tests run here; the devices they compile for are not.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
DIM, VOCAB, TOKENS, HEADS = 256, 512, 512, 4
KEY = jax.random.key(0)
TPU = pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="needs the extra aot-tpu")
GPU = pytest.mark.skipif(
    not importlib.util.find_spec("jax_plugins"), reason="needs the extra aot-gpu"
)
TARGETS = [pytest.param("tpu:v5e:2x2", marks=TPU), pytest.param("cuda:h100", marks=GPU)]


def block(key: jax.Array) -> mode.TransformerBlock:
    return mode.TransformerBlock(DIM, HEADS, key=key)


def expert(key: jax.Array) -> mode.SwiGLU:
    return mode.SwiGLU(DIM, key=key)


KINDS: dict[str, Callable[[jax.Array], Any]] = {
    "dense": lambda key: mode.Residual(block(key)),
    "mod": lambda key: mode.MixtureOfDepths(block(key), DIM, 0.25, key=key),
    "moe": lambda key: mode.integrated_mode(expert, DIM, HEADS, 8, 0, key=key),
    "staged": lambda key: mode.staged_mode(expert, DIM, HEADS, 8, capacity=0.5, key=key),
    "integrated": lambda key: mode.integrated_mode(expert, DIM, HEADS, 4, 4, key=key),
}
WHOLE = (mode.Rule(r"\.experts\b", ("expert",)), mode.Rule(""))


def model_of(kind: str) -> Any:
    """Shapes alone: one dense layer and one of the kind, which no loop repeats."""
    layers = [KINDS["dense"], KINDS[kind]] if kind != "dense" else [KINDS["dense"]]
    return eqx.filter_eval_shape(lambda: mode.Transformer(VOCAB, DIM, layers, key=KEY))


def tokens_of(batch: int, extra: int = 0) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((batch, TOKENS + extra), jnp.int32)


def forward(model: mode.Transformer, tokens: jax.Array) -> jax.Array:
    return model(tokens)[0]


OPTIMIZER = optax.adamw(1e-3)


def train(model: mode.Transformer, state: Any, tokens: jax.Array) -> Any:
    parameters, rest = eqx.partition(model, mode.trainable(model))

    def loss(parameters: Any) -> Any:
        logits, routings = eqx.combine(parameters, rest)(tokens[:, :-1])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
        return losses.mean(), routings

    gradient, routings = jax.grad(loss, has_aux=True)(parameters)
    with jax.numpy_dtype_promotion("standard"):
        updates, state = OPTIMIZER.update(gradient, state, parameters)
    return mode.update_state(eqx.apply_updates(model, updates), routings), state


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_layer_compiles(kind: str, target: str) -> None:
    """Forward, training step and decoding step, sharded parameters and divided experts."""
    axes = {"data": 2, "expert": 2} if target.startswith("tpu") else {"data": 1}
    model, tokens = model_of(kind), tokens_of(4)
    parameters = compiles_for(target, forward, model, tokens, axes=axes).argument_bytes
    state = eqx.filter_eval_shape(OPTIMIZER.init, eqx.filter(model, mode.trainable(model)))
    trained = compiles_for(target, train, model, state, tokens_of(4, 1), axes=axes, donate=(0, 1))
    assert trained.argument_bytes > 2.5 * parameters  # Adam's two moments beside them
    sampler = mode.unrolled(mode.causal(eqx.filter_eval_shape(lambda m: m, model), limit=0.5))
    decoding = eqx.filter_eval_shape(mode.prefill, sampler, tokens, max_tokens=2 * TOKENS)
    new = jax.ShapeDtypeStruct((4,), jnp.int32)
    arguments = (target, mode.step, sampler, decoding, new)
    if target.startswith("cuda") and os.environ.get("EQX_ON_ERROR") != "off":
        with pytest.raises(ValueError, match=r"must not call back to Python.*EQX_ON_ERROR=off"):
            compiles_for(*arguments, axes=axes)
    else:
        assert compiles_for(*arguments, axes=axes).argument_bytes > 0


@TPU
@pytest.mark.parametrize("kind", ["dense", "mod"])
def test_data_parallel_adds_no_collective(kind: str) -> None:
    found = compiles_for(
        "tpu:v5e:4x4", forward, model_of(kind), tokens_of(16), rules=[WHOLE, mode.BATCH]
    )
    assert found.collectives == ()


@TPU
@pytest.mark.parametrize("kind", ["moe", "staged", "integrated"])
def test_experts_are_two_exchanges(kind: str) -> None:
    """There and back; no weights of experts and no activations are gathered."""
    axes = {"data": 4, "expert": 4}
    found = compiles_for(
        "tpu:v5e:4x4", forward, model_of(kind), tokens_of(16), axes=axes, rules=[WHOLE, mode.BATCH]
    )
    assert [one.kind for one in found.collectives] == ["all-to-all"] * 2


@TPU
def test_router_state_moves_counts_and_no_scores() -> None:
    """Of 8 experts, however many tokens there are: a sort would gather the scores of all."""
    found = compiles_for(
        "tpu:v5e:4x4",
        lambda model, tokens: mode.update_state(model, model(tokens)[1]),
        model_of("moe"),
        tokens_of(16),
        axes={"data": 4, "expert": 4},
        rules=[WHOLE, mode.BATCH],
    )
    moved = [one for one in found.collectives if one.kind != "all-to-all"]
    assert moved
    assert all(one.kind == "all-reduce" and one.bytes < 1024 for one in moved)


@TPU
@pytest.mark.parametrize("kind", KINDS)
def test_flops_are_divided(kind: str) -> None:
    """Within 3 % of an equal part of `count_flops`, by the compiler's own count."""
    axes = {"data": 4, "expert": 4}
    model, tokens = model_of(kind), tokens_of(16)
    found = compiles_for(
        "tpu:v5e:4x4", forward, model, tokens, axes=axes, rules=[WHOLE, mode.BATCH]
    )
    ideal = mode.count_flops(forward, model, tokens).total / 16
    assert found.flops is not None
    assert abs(found.flops / ideal - 1) < 0.03


TEXT = """
  %a = f32[8,4]{1,0} all-gather(%x), metadata={op_name="jit(f)/mode.Router/top_k"}
  %b = (bf16[2,4]{1,0}, bf16[2,4]{1,0}) all-to-all(%y, %z), channel_id=1
  %c = (f32[2]{0}, f32[8]{0}) all-gather-start(%w), channel_id=2
  %d = f32[8]{0} all-gather-done(%c)
  %e = f32[2]{0} add(%u, %v), metadata={op_name="an all-reduce( in a name"}
"""


def test_collectives_are_read_off_the_program() -> None:
    found = _hlo.collectives(TEXT)
    assert [(one.kind, one.bytes) for one in found] == [
        ("all-gather", 128),
        ("all-to-all", 32),
        ("all-gather", 32),
    ]
    assert found[0].name == "jit(f)/mode.Router/top_k"


LOOP = """
%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %a = f32[8]{0} all-gather(%x), channel_id=1
  %b = f32[8]{0} fusion(%a), kind=kCustom, calls=%all-reduce-scatter.1
  %w = (s32[], f32[8]) while(%q), condition=%inner_condition, body=%inner
}
%inner (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %a = f32[8]{0} all-to-all(%x), channel_id=4
}
%piece (p: f32[8]) -> f32[8] {
  %a.1 = f32[8]{0} all-gather(%x), channel_id=1
}
%all-reduce-scatter.1 (p: f32[8]) -> f32[4] {
  %r = f32[8]{0} all-reduce(%p), channel_id=2, to_apply=%add
}
%condition (p: (s32[], f32[8])) -> pred[] {
  %n = s32[]{:T(128)} constant(20)
  %i = s32[] get-tuple-element(%p), index=0
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}
%inner_condition (p: (s32[], f32[8])) -> pred[] {
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[] get-tuple-element(%p), index=2
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}
ENTRY %main (p: f32[8]) -> f32[8] {
  %w = (s32[], f32[8]) while(%t), condition=%condition, body=%body
  %g = f32[8]{0} fusion(%x), kind=kCustom, calls=%piece
  ROOT %e = f32[8]{0} all-reduce(%w), channel_id=3, to_apply=%add
}
"""


def test_loops_multiply_collectives_and_pieces_are_one() -> None:
    """A loop up to a constant multiplies; of another's number of turns nothing is known."""
    assert [(one.kind, one.times) for one in _hlo.collectives(LOOP)] == [
        ("all-gather", 20),
        ("all-to-all", None),
        ("reduce-scatter", 20),
        ("all-reduce", 1),
    ]


@pytest.mark.parametrize(
    ("text", "needed"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 18.50G of 15.75G hbm",
            18.5,
        ),
        (
            "RESOURCE_EXHAUSTED: total memory required (18.50G) exceeds available HBM (15.75G).",
            18.5,
        ),
        ("INVALID_ARGUMENT: Used 18.50G of 15.75G hbm", None),
        ("RESOURCE_EXHAUSTED: something else", None),
    ],
)
def test_too_little_memory_is_read_off_the_error(text: str, needed: float | None) -> None:
    found = Exceeded.read(RuntimeError(text))
    expected = None if needed is None else Exceeded(int(needed * 2**30), int(15.75 * 2**30))
    assert found == expected


@TPU
@pytest.mark.parametrize(
    ("target", "gib"), [("tpu:v5e:1x1", 15.75), ("tpu:v5e:4x4", 15.75), ("tpu:v6e:2x2", 31.25)]
)
def test_the_compiler_says_how_much_memory_there_is(target: str, gib: float) -> None:
    # Compilers of different versions keep some megabytes more or less for themselves.
    assert memory_of(target) == pytest.approx(gib * 2**30, abs=2**26)


@TPU
@pytest.mark.parametrize("target", ["tpu:v5e:3x3", "tpu:v9:2x2", "tpu:v5e:32x32"])
def test_a_topology_that_is_not_there_is_refused(target: str) -> None:
    with pytest.raises(ValueError, match=rf"`target` must .* got '{target}'"):
        mode.testing.mesh_for(target)


@pytest.fixture
def nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)


@pytest.mark.usefixtures("nothing_installed")
@pytest.mark.parametrize(
    ("target", "extra"), [("tpu:v5e:2x2", "aot-tpu"), ("cuda:h100", "aot-gpu")]
)
def test_a_missing_compiler_names_its_extra(target: str, extra: str) -> None:
    with pytest.raises(ImportError, match=rf"needs .*, which the extra `{extra}` installs"):
        compiles_for(target, forward, model_of("dense"), tokens_of(4))


@pytest.mark.parametrize("target", ["tpu", "tpu:v5e", "cuda:a100", "metal:m4"])
def test_an_unknown_target_is_refused(target: str) -> None:
    with pytest.raises(ValueError, match=rf"`target` must be .* got '{target}'"):
        compiles_for(target, forward, model_of("dense"), tokens_of(4))


@TPU
def test_axes_take_all_devices() -> None:
    with pytest.raises(ValueError, match=r"`axes` must take all 4 devices .* takes 2"):
        mode.testing.mesh_for("tpu:v5e:2x2", {"data": 2})
