"""What a program needs on each device of a TPU, by the compiler itself, against the ideal.

Every kind of layer over a dense one, forward and training step, on v5e:4x4 with four-way data and
four-way expert parallelism; parameters whole but for the experts, so that what moves is what the
layers move. FLOPs are compared with an equal part of `count_flops`; bytes are those of the
exchanges' results, on one device; of a training step, gradients are reduced as well.

    JAX_PLATFORMS=cpu python benchmarks/targets.py
"""

import sys
import time
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

import mode


TARGET, AXES = "tpu:v5e:4x4", {"data": 4, "expert": 4}
DIM, VOCAB, TOKENS, BATCH, HEADS = 512, 1024, 512, 32, 8
WHOLE = (mode.ShardingRule("experts", ("expert",)), mode.ShardingRule(None))
LIMIT = 1.03


def block(key: jax.Array) -> mode.TransformerBlock:
    return mode.TransformerBlock(DIM, HEADS, key=key)


def expert(key: jax.Array) -> mode.SwiGLUFeedForward:
    return mode.SwiGLUFeedForward(DIM, key=key)


KINDS: dict[str, Callable[[jax.Array], Any]] = {
    "dense": lambda key: mode.Residual(block(key)),
    "MoD": lambda key: mode.MixtureOfDepths(block(key), DIM, 0.125, key=key),
    "MoE": lambda key: mode.integrated_mode_layer(expert, DIM, HEADS, 8, 0, key=key),
    "staged": lambda key: mode.staged_mode_layer(expert, DIM, HEADS, 8, capacity=0.125, key=key),
    "integrated": lambda key: mode.integrated_mode_layer(expert, DIM, HEADS, 8, 4, key=key),
}


def forward(model: mode.Transformer, tokens: jax.Array) -> jax.Array:
    return model(tokens[:, :-1])[0]


def gradient(model: mode.Transformer, tokens: jax.Array) -> Any:
    parameters, rest = eqx.partition(model, mode.is_trainable(model))

    def loss(parameters: Any) -> jax.Array:
        logits = forward(eqx.combine(parameters, rest), tokens)
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    return jax.grad(loss)(parameters)


def measure(name: str, title: str, function: Callable[..., Any]) -> bool:
    # Dense layers of equal structure would share a loop, whose body XLA's count takes once.
    layers = [KINDS["dense"]] if name == "dense" else [KINDS["dense"], KINDS[name]]
    model = eqx.filter_eval_shape(
        lambda: mode.Transformer(VOCAB, DIM, layers, key=jax.random.key(0))
    )
    tokens = jax.ShapeDtypeStruct((BATCH, TOKENS + 1), jnp.int32)
    compiled = mode.aot.compile_for(
        TARGET, function, model, tokens, axes=AXES, rules=[WHOLE, mode.BATCH_RULES]
    )
    ideal = mode.count_flops(function, model, tokens).total / compiled.devices
    assert compiled.flops is not None
    ratio = compiled.flops / ideal
    kinds = sorted({one.kind for one in compiled.collectives})
    moved = ", ".join(
        f"{compiled.count(kind)} {kind} "
        f"({sum(one.bytes for one in compiled.collectives if one.kind == kind) / 1e6:.1f} MB)"
        for kind in kinds
    )
    print(
        f"| {name} | {title} | {compiled.flops / 1e9:.1f} G | {ratio:.3f} "
        f"| {compiled.temporary_bytes / 1e6:.0f} MB | {moved or 'nothing'} |",
        flush=True,
    )
    return ratio <= LIMIT


if __name__ == "__main__":
    began = time.perf_counter()
    print(f"jax {jax.__version__}, {TARGET}, {AXES}")
    print("| layer | program | FLOPs a device | / ideal | temporary | moved, on one device |")
    print("|---" * 6 + "|")
    met = [
        measure(name, title, function)
        for title, function in (("forward", forward), ("gradient", gradient))
        for name in KINDS
    ]
    print(f"{time.perf_counter() - began:.0f} s in all")
    sys.exit(0 if all(met) else 1)
