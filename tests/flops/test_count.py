"""The count of floating-point operations against the compiler's own, forward and training."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from jaxtyping import Array, PyTree

import mode


KEY = jax.random.key(9)


def block(dim: int, **options: Any) -> mode.TransformerBlock:
    return mode.TransformerBlock(dim, 4, key=KEY, **options)


def gelu(dim: int) -> Callable[[Array], mode.GELUFeedForward]:
    return lambda key: mode.GELUFeedForward(dim, key=key)


def swiglu(dim: int) -> Callable[[Array], mode.SwiGLUFeedForward]:
    return lambda key: mode.SwiGLUFeedForward(dim, key=key)


def experts(dim: int, **options: Any) -> mode.Residual:
    return mode.Residual(mode.MixtureOfExperts(gelu(dim), dim, 4, key=KEY, **options))


# Sizes: groups, tokens, dim.
LAYERS: dict[str, tuple[Callable[[], Any], tuple[int, int, int]]] = {
    "dense": (lambda: mode.Residual(block(128)), (2, 128, 128)),
    "dense, narrow": (lambda: mode.Residual(block(64)), (1, 256, 64)),
    "feed-forward": (
        lambda: mode.Residual(mode.PositionWise(mode.GELUFeedForward(256, key=KEY))),
        (1, 512, 256),
    ),
    "dense, grouped queries": (lambda: mode.Residual(block(128, num_kv_heads=1)), (2, 64, 128)),
    "depth": (lambda: mode.MixtureOfDepths(block(128), 128, 0.25, key=KEY), (2, 256, 128)),
    "depth, predictor": (
        lambda: mode.MixtureOfDepths(
            block(64),
            64,
            0.5,
            predictor=mode.Predictor(64, key=KEY),
            gate=mode.SigmoidGate(),
            key=KEY,
        ),
        (4, 128, 64),
    ),
    "depth, causal": (
        lambda: mode.make_causal(
            mode.MixtureOfDepths(block(64), 64, 0.5, key=KEY), max_capacity=0.25
        ),
        (2, 128, 64),
    ),
    "queries": (lambda: mode.MixtureOfQueries(block(128), 128, 0.25, key=KEY), (2, 256, 128)),
    "recursion": (lambda: mode.Recursion(block(64), 64, (1, 0.5), key=KEY), (2, 128, 64)),
    "recursion, shared keys": (
        lambda: mode.Recursion(block(64), 64, (0.5, 0.25), share_keys=True, key=KEY),
        (2, 256, 64),
    ),
    "token choice recursion": (
        lambda: mode.TokenChoiceRecursion(block(64), 64, 2, key=KEY),
        (2, 128, 64),
    ),
    "expert choice": (lambda: experts(128, capacity_factor=2.0), (2, 128, 128)),
    "token choice": (lambda: experts(64, select=mode.TokenChoice(2), num_noop=2), (2, 256, 64)),
    "free experts": (
        lambda: experts(64, select=mode.TokenChoice(2), num_copy=1, num_constant=2),
        (2, 256, 64),
    ),
    "shared expert": (
        lambda: mode.Residual(mode.MixtureOfExperts(swiglu(64), 64, 4, num_shared=1, key=KEY)),
        (2, 128, 64),
    ),
    "staged": (
        lambda: mode.staged_mode_layer(gelu(64), 64, 4, 4, capacity=0.5, key=KEY),
        (2, 256, 64),
    ),
    "integrated": (
        lambda: mode.integrated_mode_layer(gelu(64), 64, 4, 6, 2, key=KEY),
        (2, 128, 64),
    ),
    "reduced": (lambda: mode.reduced_capacity_moe(gelu(64), 64, 4, 6, 2, key=KEY), (2, 128, 64)),
}


def compiled(function: Callable[..., Any], *args: Any) -> float:
    costs = jax.jit(function).lower(*args).compile().cost_analysis()
    assert costs is not None
    return costs["flops"]


def forward(model: Any) -> tuple[Callable[[PyTree, Any], Array], PyTree]:
    arrays, rest = eqx.partition(model, eqx.is_array)
    return lambda arrays, x: eqx.combine(arrays, rest)(x)[0], arrays


def training(model: Any) -> tuple[Callable[[PyTree, Any], PyTree], PyTree]:
    parameters, rest = eqx.partition(model, mode.is_trainable(model))

    def loss(parameters: PyTree, x: Any) -> Array:
        return jnp.sum(jnp.square(eqx.combine(parameters, rest)(x)[0]))

    return jax.value_and_grad(loss), parameters


def transformer(depth: int, **options: Any) -> mode.Transformer:
    return mode.mod_transformer(64, 64, depth, 4, capacity=0.25, key=KEY, **options)


@pytest.mark.parametrize("of", [forward, training], ids=["forward", "training"])
@pytest.mark.parametrize("name", LAYERS)
def test_layers_cost_what_the_compiler_says(name: str, of: Callable[..., Any]) -> None:
    make, shape = LAYERS[name]
    function, arrays = of(make())
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    counted = mode.count_flops(function, arrays, x)
    assert counted.total == pytest.approx(compiled(function, arrays, x), rel=0.03)
    assert counted.total == counted.matmul + counted.other == sum(counted.parts.values())


@pytest.mark.parametrize("of", [forward, training], ids=["forward", "training"])
def test_a_model_of_one_period(of: Callable[..., Any]) -> None:
    """The compiler counts the body of a scan once, which is right for one repeat."""
    function, arrays = of(transformer(2))
    ids = jax.ShapeDtypeStruct((2, 128), jnp.int32)
    counted = mode.count_flops(function, arrays, ids).total
    assert counted == pytest.approx(compiled(function, arrays, ids), rel=0.03)


@pytest.mark.parametrize("of", [forward, training], ids=["forward", "training"])
@pytest.mark.parametrize("remat", [False, True])
def test_a_scan_counts_as_often_as_it_runs(of: Callable[..., Any], remat: bool) -> None:
    ids = jax.ShapeDtypeStruct((2, 32), jnp.int32)

    def count(depth: int) -> int:
        function, arrays = of(transformer(depth, remat=remat))
        return mode.count_flops(function, arrays, ids).total

    # Not from one period on: the gradient of a scan that runs once is another program.
    period = count(6) - count(4)
    assert count(12) == count(4) + 4 * period
    assert 2 * period < count(4) < 3 * period


def test_recomputation_counts() -> None:
    ids = jax.ShapeDtypeStruct((2, 32), jnp.int32)
    plain, remat = (
        mode.count_flops(*training(transformer(4, remat=remat)), ids).matmul
        for remat in (False, True)
    )
    once = mode.count_flops(*forward(transformer(4)), ids).matmul
    assert plain < remat <= plain + once


def test_what_is_known_by_hand() -> None:
    """Matrix products to the last operation: 2 m n k."""
    groups, tokens, dim, hidden = 2, 16, 8, 24
    x = jax.ShapeDtypeStruct((groups, tokens, dim), jnp.float32)
    rows = groups * tokens

    def matmul(layer: Any) -> int:
        return mode.count_flops(layer, x).matmul

    feedforward = mode.PositionWise(mode.GELUFeedForward(dim, hidden, key=KEY))
    assert matmul(mode.Residual(feedforward)) == 2 * rows * dim * hidden * 2
    routed = mode.MixtureOfDepths(feedforward, dim, 0.25, key=KEY)
    assert matmul(lambda x: routed(x)[0]) == rows * dim * hidden + 2 * rows * dim
    plain = jax.jit(lambda a, b: a @ b)
    flops = mode.count_flops(plain, jnp.ones((3, 5)), jnp.ones((5, 7)))
    assert (flops.matmul, flops.other, flops.parts) == (2 * 3 * 5 * 7, 0, {"": 210})
    assert mode.count_flops(lambda a: a + 2 * a, jnp.ones(10)).other == 20
    assert mode.count_flops(lambda a: a.sum(), jnp.ones(10)).other == 10
    assert mode.count_flops(lambda a: jnp.arange(9) + 3, jnp.ones(10)).total == 0
    assert mode.count_flops(lambda a: jnp.sort(a)[::-1].reshape(2, 5), jnp.ones(10)).total == 0


def test_control_flow() -> None:
    """A loop as often as it runs, a branch as its most expensive side, dead code not at all."""
    square = jnp.ones((4, 4))

    def loop(a: Array) -> Array:
        return jax.lax.fori_loop(0, 5, lambda _, b: b @ a, a)

    def branch(a: Array) -> Array:
        return jax.lax.cond(a[0, 0] > 0, lambda b: b @ b @ b, lambda b: b @ b, a)

    def nested(a: Array) -> Array:
        return jax.lax.scan(lambda b, _: (loop(b), None), a, None, length=3)[0]

    def dead(a: Array) -> Array:
        _ = a @ a
        return a

    product = 2 * 4**3
    assert mode.count_flops(loop, square).matmul == 5 * product
    assert mode.count_flops(branch, square).matmul == 2 * product
    assert mode.count_flops(nested, square).matmul == 15 * product
    assert mode.count_flops(dead, square).total == 0


@pytest.mark.parametrize(("window", "pairs"), [(None, 6), (100, 5)])
def test_attention_in_blocks(window: int | None, pairs: int) -> None:
    """The blocks on and below the diagonal that a window reaches, in full: the lengths of all loops
    are known."""
    blocks, size, heads, dim = 3, 512, 2, 16
    q = jax.ShapeDtypeStruct((2, blocks * size, heads, dim), jnp.float32)
    info = eqx.filter_eval_shape(mode.TokenInfo.plain, (2, blocks * size))
    product = 2 * 2 * heads * size * size * dim * pairs
    attend = mode.CausalAttention(window=window)

    def loss(q: Array, k: Array, v: Array, info: mode.TokenInfo) -> Array:
        return attend(q, k, v, info).sum()

    assert mode.count_flops(loss, q, q, q, info).matmul == 2 * product
    gradient = jax.grad(loss, argnums=(0, 1, 2))
    assert mode.count_flops(gradient, q, q, q, info).matmul == 7 * product

    def tangent(q: Array, k: Array, v: Array, info: mode.TokenInfo) -> tuple[Array, Array]:
        return jax.jvp(lambda q, k, v: loss(q, k, v, info), (q, k, v), (q, k, v))

    # Of the result, and the same again with four for its derivative.
    assert mode.count_flops(tangent, q, q, q, info).matmul == 8 * product


def test_a_loop_whose_length_is_data_counts_once() -> None:
    def loop(a: Array, length: Array) -> Array:
        return jax.lax.fori_loop(0, length, lambda _, b: b @ a, a)

    assert mode.count_flops(loop, jnp.ones((4, 4)), jnp.array(7)).matmul == 2 * 4**3


def test_convolutions() -> None:
    conv = eqx.nn.Conv1d(3, 6, 5, use_bias=False, key=KEY)
    x = jnp.ones((3, 20))
    assert mode.count_flops(conv, x).matmul == 2 * 6 * 16 * 3 * 5
    assert mode.count_flops(conv, x).total == compiled(lambda x: conv(x), x)


def test_parts_name_the_layers() -> None:
    layer = mode.staged_mode_layer(gelu(32), 32, 4, 2, capacity=0.5, key=KEY)
    counted = mode.count_flops(layer, jax.ShapeDtypeStruct((2, 64, 32), jnp.float32))
    assert {"mode.Attention", "mode.Router", "mode.GELUFeedForward", "mode.combine"} <= set(
        counted.parts
    )
    function, parameters = training(layer)
    backward = mode.count_flops(function, parameters, jnp.ones((2, 64, 32)))
    ratio = backward.parts["mode.GELUFeedForward"] / counted.parts["mode.GELUFeedForward"]
    assert 2.5 < ratio < 3.5


def test_a_users_own_block_is_counted() -> None:
    """And nothing is run: shapes stand for arrays, other arguments are passed on."""

    def own(x: Array, info: mode.TokenInfo, *, key: Array | None = None) -> Any:
        return x @ jnp.ones((64, 64)), ()

    x = jax.ShapeDtypeStruct((8, 1024, 64), jnp.float32)
    dense = mode.count_flops(mode.Residual(own), x).matmul
    assert dense == 2 * 8 * 1024 * 64 * 64
    routed = mode.MixtureOfDepths(own, 64, 0.125, select=mode.RandomChoice(), key=KEY)
    of_hidden = mode.count_flops(lambda x, key: routed(x, key=key)[0], x, key=KEY)
    assert of_hidden.matmul == dense // 8 + 2 * 8 * 1024 * 64
