"""Compiling a training step takes as long for 48 layers as for 4: layers repeat under one scan.

python benchmarks/compile_time.py
"""

import statistics
import sys
import time

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import timing

import mode


LIMIT = 1.3
DEPTHS = (4, 48)
ROUNDS = 5


def seconds_to_compile(depth: int) -> float:
    """Trace, lower and compile one training step, optimizer and router state included."""
    model = eqx.filter_eval_shape(
        lambda: mode.mod_decoder(256, 128, depth, num_heads=4, key=jax.random.key(0))
    )
    optimizer = optax.adamw(1e-3)

    def step(model: mode.Transformer, tokens: jax.Array) -> mode.Transformer:
        parameters, rest = eqx.partition(model, mode.trainable(model))
        state = optimizer.init(parameters)

        def loss(parameters: mode.Transformer) -> tuple[jax.Array, tuple[mode.Routing, ...]]:
            logits, routings = eqx.combine(parameters, rest)(tokens[:, :-1])
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
            return losses.mean(), routings

        gradients, routings = jax.grad(loss, has_aux=True)(parameters)
        updates, _ = optimizer.update(gradients, state, parameters)
        model = eqx.combine(eqx.apply_updates(parameters, updates), rest)
        return mode.update_state(model, routings)

    tokens = jax.ShapeDtypeStruct((4, 257), jnp.int32)
    jax.clear_caches()
    start = time.perf_counter()
    arrays, static = eqx.partition(model, lambda x: isinstance(x, jax.ShapeDtypeStruct))
    jax.jit(
        lambda arrays, tokens: eqx.filter(step(eqx.combine(arrays, static), tokens), eqx.is_array)
    ).lower(arrays, tokens).compile()
    return time.perf_counter() - start


if __name__ == "__main__":
    timing.header()
    seconds = {depth: [] for depth in DEPTHS}
    for _ in range(ROUNDS):
        for depth in DEPTHS:
            seconds[depth].append(seconds_to_compile(depth))
    medians = {f"{depth} layers": statistics.median(seconds[depth]) for depth in DEPTHS}
    held = timing.report(
        "trace, lower and compile one training step",
        medians,
        base="4 layers",
        limits={"48 layers": LIMIT},
    )
    sys.exit(0 if held else 1)
