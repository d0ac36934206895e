"""Compiling a training step takes as long for 48 layers as for 4: layers repeat under one scan.

Of the paper's model, and of one whose feed-forwards have a `lambda` for their activation, a new
function object in every layer. And the paper's model takes little longer than a dense one.

    python benchmarks/compile_time.py
"""

import statistics
import sys
import time
from collections.abc import Callable
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import timing

import mode


LIMIT = 1.1
DEPTHS = (4, 48)
ROUNDS = 5
DIM, HEADS = 128, 4


def paper_model(depth: int) -> mode.Transformer:
    return mode.mod_transformer(256, DIM, depth, HEADS, key=jax.random.key(0))


def dense_model(depth: int) -> mode.Transformer:
    return mode.mod_transformer(256, DIM, depth, HEADS, offset=depth, key=jax.random.key(0))


def lambda_model(depth: int) -> mode.Transformer:
    def block(key: jax.Array) -> mode.TransformerBlock:
        mlp = eqx.nn.MLP(DIM, DIM, 4 * DIM, 1, lambda x: jax.nn.silu(x) + x, key=key)
        return mode.TransformerBlock(DIM, HEADS, feedforward=mode.PositionWise(mlp), key=key)

    period = [
        lambda key: mode.Residual(block(key)),
        lambda key: mode.MixtureOfDepths(block(key), DIM, key=key),
    ]
    return mode.Transformer(256, DIM, period, depth // 2, key=jax.random.key(0))


MODELS = {"mod_transformer": paper_model, "lambda activations": lambda_model}


def seconds_to_compile(make: Callable[[], mode.Transformer]) -> float:
    """Traces, lowers and compiles one training step, optimizer and router state included."""
    model = eqx.filter_eval_shape(make)
    optimizer = optax.adamw(1e-3)

    def step(model: mode.Transformer, tokens: jax.Array) -> mode.Transformer:
        parameters, rest = eqx.partition(model, mode.is_trainable(model))
        state = optimizer.init(parameters)

        def loss(parameters: mode.Transformer) -> tuple[jax.Array, tuple[mode.Routing, ...]]:
            logits, routings = eqx.combine(parameters, rest)(tokens[:, :-1])
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
            return losses.mean(), routings

        gradients, routings = jax.grad(loss, has_aux=True)(parameters)
        updates, _ = optimizer.update(gradients, state, parameters)
        model = eqx.combine(eqx.apply_updates(parameters, updates), rest)
        return mode.update_router_state(model, routings)

    tokens = jax.ShapeDtypeStruct((4, 257), jnp.int32)
    jax.clear_caches()
    start = time.perf_counter()
    arrays, static = eqx.partition(model, lambda x: isinstance(x, jax.ShapeDtypeStruct))
    jax.jit(
        lambda arrays, tokens: eqx.filter(step(eqx.combine(arrays, static), tokens), eqx.is_array)
    ).lower(arrays, tokens).compile()
    return time.perf_counter() - start


def measure(title: str, makes: dict[str, Callable[[], mode.Transformer]]) -> bool:
    """Says whether the second model takes little longer than the first."""
    base, other = makes
    seconds: dict[str, list[float]] = {name: [] for name in makes}
    for _ in range(ROUNDS):
        for name, make in makes.items():
            seconds[name].append(seconds_to_compile(make))
    medians = {name: statistics.median(some) for name, some in seconds.items()}
    title = f"{title}: trace, lower and compile one training step"
    return timing.report(title, medians, base=base, limits={other: LIMIT})


if __name__ == "__main__":
    timing.header()
    many = DEPTHS[-1]
    met = [
        measure(name, {f"{depth} layers": partial(make, depth) for depth in DEPTHS})
        for name, make in MODELS.items()
    ]
    routed = {"dense": partial(dense_model, many), "every other routed": partial(paper_model, many)}
    met.append(measure(f"{many} layers", routed))
    sys.exit(0 if all(met) else 1)
