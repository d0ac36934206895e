"""The kernels of platforms: their numbers, as far as this machine can run them, their derivatives,
and the choice between them."""

import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array

import mode
from mode.nn._kernels import Kernels, Scoring, blockwise, call
from mode.nn._kernels._cudnn import cudnn
from mode.nn._kernels._splash import splash
from tests.helpers import assert_close, packed_info, rng

from .test_attention import Heads, attend, draw, oracle


LAYOUTS = ("plain", "prefix", "any")


def info_of(layout: str, batch: int, tokens: int) -> mode.TokenInfo:
    """Rows of a layout: whole documents, padding at the end, packed documents."""
    plain = mode.TokenInfo.plain((batch, tokens))
    if layout == "plain":
        return plain
    if layout == "any":
        return packed_info((tokens // 3, tokens // 2), (tokens,), tokens=tokens)
    lengths = jnp.arange(1, batch + 1)[:, None] * tokens // batch
    real = (plain.positions < lengths).astype(jnp.int32)
    # Positions with gaps, as those of selected tokens.
    return mode.TokenInfo(3 * plain.positions + 1, real, layout="prefix")


def others(info: mode.TokenInfo, index: Array | None = None) -> tuple[Array, ...]:
    return (info.positions, info.segment_ids, *([] if index is None else [index]))


def weighted(
    kernels: Kernels, info: mode.TokenInfo, weight: Array, index: Array | None = None
) -> Any:
    """A function of queries, keys and values whose gradient depends on every number."""
    real = jnp.asarray(is_real(info, index))[..., None, None]

    def loss(qkv: list[Heads]) -> Array:
        out = call(kernels, tuple(qkv), others(info, index))
        return jnp.sum(jnp.where(real, weight * jnp.sin(out), 0))

    return loss


def is_real(info: mode.TokenInfo, index: Array | None) -> np.ndarray:
    """Says which queries are those of a token: the others are padding, or of an empty slot."""
    valid = np.asarray(info.valid)
    if index is None:
        return valid
    return np.take_along_axis(np.pad(valid, ((0, 0), (0, 1))), np.asarray(index), axis=1)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("tokens", "options"),
    [(40, {}), (130, {"scale": 0.7}), (300, {"soft_cap": 0.8}), (260, {"window": 50})],
)
def test_splash_attention_equals_the_oracle(
    tokens: int, options: dict[str, Any], layout: str
) -> None:
    """By Pallas's interpreter, with gradients: those of blockwise attention are right elsewhere."""
    scoring, info = Scoring(**options), info_of(layout, 2, tokens)
    qkv = draw(0, 2, tokens, heads=4, kv_heads=2, dim=16, dtype=jnp.bfloat16)
    wide = [part.astype(jnp.float32) for part in qkv]
    kernel = splash(scoring, tuple(qkv), others(info), layout, interpret=True)
    if "window" in options and layout != "plain":
        assert kernel == splash(scoring, tuple(qkv), others(info), layout)
        assert "window" in str(kernel)  # no kernel, but why
        return
    assert not isinstance(kernel, str)
    real = np.asarray(info.valid)
    got = jax.jit(lambda *x: call(Kernels(kernel, {}), x, others(info)))(*wide)
    expected = oracle(wide, info, attend(None, **options))
    assert_close(got[real], expected[real], scale=20)

    weight = jnp.asarray(rng(9).normal(size=got.shape), jnp.float32)
    slow = Kernels(blockwise(scoring, 64), {})
    gradients = [
        jax.jit(jax.grad(weighted(kernels, info, weight)))(wide)
        for kernels in (Kernels(kernel, {}), slow)
    ]
    for one, other in zip(*gradients, strict=True):
        assert_close(one, other, scale=20)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("queries", "tokens", "options"),
    [
        (20, 40, {"soft_cap": 0.8, "scale": 0.7}),
        (300, 1100, {}),
        (520, 600, {"window": 150}),
        (600, 1024, {"window": 1}),  # a block of empty slots, which see no token of their window
    ],
)
def test_splash_attention_of_some_queries_equals_blockwise_attention(
    queries: int, tokens: int, options: dict[str, Any], layout: str
) -> None:
    """As in `MixtureOfQueries`: rows differ in their queries, and some slots are empty."""
    scoring, info = Scoring(**options), info_of(layout, 2, tokens)
    some = np.tile(np.arange(tokens), (2, 1))
    some = np.sort(rng(5).permuted(some, axis=1)[:, :queries], axis=1)
    some[0, -queries // 3 :] = some[1, -queries // 2 :] = tokens
    index = jnp.asarray(some, jnp.int32)
    q, k, v = draw(0, 2, tokens, heads=4, kv_heads=2, dim=16, dtype=jnp.bfloat16)
    qkv = (q[:, :queries], k, v)
    kernel = splash(scoring, qkv, others(info, index), layout, interpret=True)
    if "window" in options and layout != "plain":
        assert "window" in str(kernel)
        return
    assert not isinstance(kernel, str)
    assert np.isfinite(kernel.forward(qkv, others(info, index))[0]).all()  # of empty slots, too
    wide = [part.astype(jnp.float32) for part in qkv]
    real = is_real(info, index)
    weight = jnp.asarray(rng(9).normal(size=wide[0].shape), jnp.float32)
    results = []
    for one in (kernel, blockwise(scoring, 64)):
        kernels = Kernels(one, {})
        out = jax.jit(lambda *x, kernels=kernels: call(kernels, x, others(info, index)))(*wide)
        results.append(
            [out[real], *jax.jit(jax.grad(weighted(kernels, info, weight, index)))(wide)]
        )
    for got, expected in zip(*results, strict=True):
        assert_close(got, expected, scale=20)


def test_splash_attention_is_for_integers_of_32_bits() -> None:
    info, qkv = info_of("plain", 2, 128), draw(0, 2, 128, dtype=jnp.bfloat16)
    with jax.enable_x64(True):
        assert "jax_enable_x64" in str(splash(Scoring(), tuple(qkv), others(info), "plain"))
    assert not isinstance(splash(Scoring(), tuple(qkv), others(info), "plain"), str)


@pytest.mark.parametrize("block_size", [16, 64])
def test_every_derivative(block_size: int) -> None:
    """Forward, reverse and second ones, against automatic differentiation of all scores at once."""
    info = info_of("any", 2, 48)
    qkv = draw(3, 2, 48, heads=4, kv_heads=2)
    tangents = draw(7, 2, 48, heads=4, kv_heads=2)
    weight = jnp.asarray(rng(9).normal(size=qkv[0].shape), jnp.float32)
    loss = weighted(Kernels(blockwise(Scoring(), block_size), {}), info, weight)

    def plain(qkv: list[Heads]) -> Array:
        q, k, v = qkv
        out = jnp.sin(attend(None)(q, k, v, info))
        return jnp.sum(jnp.where(info.valid[..., None, None], weight * out, 0))

    def derivatives(loss: Any) -> dict[str, Any]:
        along = lambda function: jax.jvp(function, (qkv,), (tangents,))[1]  # noqa: E731
        sum_along = lambda x: sum(  # noqa: E731
            jnp.vdot(a, b) for a, b in zip(jax.grad(loss)(x), tangents, strict=True)
        )
        return {
            "reverse": jax.grad(loss)(qkv),
            "forward": along(loss),
            "forward over reverse": along(jax.grad(loss)),
            "reverse over reverse": jax.grad(sum_along)(qkv),
            "reverse over forward": jax.grad(lambda x: jax.jvp(loss, (x,), (tangents,))[1])(qkv),
            "checkpoint": jax.grad(jax.checkpoint(loss))(qkv),
            "linearize": jax.linearize(loss, qkv)[1](tangents),
        }

    got, expected = (jax.jit(derivatives, static_argnums=0)(one) for one in (loss, plain))
    for name in expected:
        for one, other in zip(*map(jax.tree.leaves, (got[name], expected[name])), strict=True):
            np.testing.assert_allclose(one, other, rtol=2e-4, atol=2e-4, err_msg=name)


def test_vmap_over_any_of_the_arrays() -> None:
    info, kernels = info_of("any", 2, 32), Kernels(blockwise(Scoring(), 16), {})
    q, k, v = draw(0, 2, 32)
    some = jnp.stack([q, 2 * q, q - 1], axis=1)

    def grad(q: Heads, k: Heads) -> Any:
        weight = jnp.ones_like(q)
        return jax.grad(lambda q: weighted(kernels, info, weight)([q, k, v]))(q)

    got = jax.vmap(grad, in_axes=(1, None), out_axes=1)(some, k)
    for number in range(3):
        assert_close(got[:, number], grad(some[:, number], k))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_narrow_dtypes_fall_back_here_and_are_counted(layout: str) -> None:
    """Where other platforms have kernels, this one gets the numbers of blockwise attention."""
    info = info_of(layout, 2, 64)
    qkv = draw(1, 2, 64, heads=4, kv_heads=2, dim=16, dtype=jnp.bfloat16)
    attend = mode.CausalAttention()
    got = jax.jit(attend)(*qkv, info)
    assert got.dtype == jnp.bfloat16
    assert np.array_equal(
        got, call(Kernels(blockwise(Scoring(), 512), {}), tuple(qkv), others(info))
    )
    real = np.asarray(info.valid)
    assert_close(got[real], oracle(qkv, info)[real])
    flops = mode.count_flops(attend, *qkv, info).matmul
    assert flops == 2 * 2 * 2 * 4 * 64 * 64 * 16  # two products, of 2 FLOPs, in 2 rows, 4 heads


def test_cudnn_gets_what_it_can_do() -> None:
    q, k, v = draw(0, 2, 64, heads=4, kv_heads=2, dim=16, dtype=jnp.bfloat16)

    def ask(layout: str, *, x: Any = (q, k, v), index: Any = None, **options: Any) -> Any:
        info = info_of(layout, 2, x[1].shape[1])
        return cudnn(Scoring(**options), tuple(x), others(info, index), layout)

    assert ask("plain", window=7).name == ask("prefix").name == ask("any").name == "cudnn"
    assert "bfloat16" in ask("plain", x=draw(0, 2, 64, dim=16))
    assert "multiple of 8" in ask("plain", x=draw(0, 2, 64, dim=4, dtype=jnp.bfloat16))
    assert "soft cap" in ask("plain", soft_cap=1.0)
    assert "ALiBi" in ask("plain", alibi=True)
    assert ask("plain", x=draw(0, 2, 63, dim=16, dtype=jnp.bfloat16)).name == "cudnn"
    assert "even" in ask("any", x=draw(0, 2, 63, dim=16, dtype=jnp.bfloat16))
    shapes = [(64, 4096, 1, 8)] * 3 + [(64, 4096)] * 2
    arrays = [jnp.zeros(shape, jnp.bfloat16 if len(shape) > 2 else jnp.int32) for shape in shapes]
    assert "MiB" in str(cudnn(Scoring(), tuple(arrays[:3]), tuple(arrays[3:]), "any"))


@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("some", [False, True], ids=["all", "some"])
def test_the_mask_for_cudnn_is_what_a_query_sees(window: int | None, some: bool) -> None:
    info = info_of("any", 2, 24)
    index = jnp.array([[0, 3, 9, 10, 20, 24], [1, 2, 3, 12, 23, 24]]) if some else None
    q, k, v = draw(0, 2, 24, dim=8, dtype=jnp.bfloat16)
    q = q[:, :6] if some else q
    rest = others(info, index)
    kernel: Any = cudnn(Scoring(window=window), (q, k, v), rest, "any")
    bias = np.asarray(kernel.forward.__self__._bias(q, rest), np.float32)
    assert bias.shape == (2, 1, q.shape[1], 24)
    positions, segments = (np.asarray(part) for part in others(info))
    for row in range(2):
        for number, query in enumerate(np.arange(24) if index is None else np.asarray(index[row])):
            for key in range(24):
                if query == 24:
                    continue  # an empty slot, whose result is never read
                near = window is None or positions[row, query] - positions[row, key] < window
                seen = key <= query and segments[row, key] == segments[row, query] and near
                assert (bias[row, 0, number, key] == 0) == seen


def test_the_log_says_which_one_runs_and_why(caplog: pytest.LogCaptureFixture) -> None:
    qkv = draw(0, 1, 32, dim=16, dtype=jnp.bfloat16)
    with caplog.at_level(logging.DEBUG, "mode.kernels"):
        jax.jit(mode.CausalAttention())(*qkv, mode.TokenInfo.plain((1, 32)))
    assert "attention on cpu: blockwise (there is none for this platform)" in caplog.text


@pytest.mark.parametrize(
    ("implementation", "options", "dtype", "match"),
    [
        ("cudnn", {}, jnp.float32, "needs bfloat16 or float16, got float32"),
        ("splash", {}, jnp.float32, "needs bfloat16, got float32"),
        ("cudnn", {"soft_cap": 2.0}, jnp.bfloat16, "no soft cap"),
        ("splash", {"alibi": True}, jnp.bfloat16, "no ALiBi"),
        ("cudnn", {}, jnp.bfloat16, "must run on cpu, got 'cudnn'"),
        ("splash", {"window": 4}, jnp.bfloat16, "must run on cpu, got 'splash'"),
    ],
)
def test_a_kernel_that_cannot_run_is_an_error(
    implementation: Any, options: dict[str, Any], dtype: Any, match: str
) -> None:
    qkv = draw(0, 1, 32, dim=16, dtype=dtype)
    attend = mode.CausalAttention(implementation=implementation, **options)
    with pytest.raises(ValueError, match=match):
        jax.jit(attend)(*qkv, mode.TokenInfo.plain((1, 32)))


def test_layouts_follow_the_tokens() -> None:
    """Whole sequences are plain; selected tokens come first, and packed ones may be anywhere."""
    seen: list[str] = []

    def record(q: Heads, k: Heads, v: Heads, info: mode.TokenInfo) -> Heads:
        seen.append(info.layout)
        return mode.CausalAttention()(q, k, v, info)

    def block(key: Any) -> mode.TransformerBlock:
        return mode.TransformerBlock(16, num_heads=2, attend=record, key=key)

    key = jax.random.key(0)
    layers = [mode.Residual(block(key)), mode.MixtureOfDepths(block(key), 16, 0.5, key=key)]
    x = jnp.ones((2, 16, 16))
    for layer in layers:
        for info in (None, info_of("prefix", 2, 16), info_of("any", 2, 16)):
            jax.eval_shape(layer, x, info)
    assert seen == ["plain", "prefix", "any", "prefix", "prefix", "any"]
