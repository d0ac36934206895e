"""What the compilers of H100 and TPU make of attention: kernels, dtypes of products, memory."""

import re
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from jaxtyping import Array

import mode
from mode.aot import Compiled, compile_for

from .compilers import CUDNN, TPU
from .test_layers import DIM, KINDS, VOCAB


pytestmark = pytest.mark.optimized


H100, V5E = "cuda:h100", "tpu:v5e:1x1"
TARGETS = [pytest.param(V5E, marks=TPU), pytest.param(H100, marks=CUDNN)]
CALLS = {H100: "__cudnn$fmha", V5E: "tpu_custom_call"}
BFLOAT16 = jnp.bfloat16


def gradient_of(
    kind: str, target: str, info: Any = None, dtype: Any = BFLOAT16, tokens: int = 512
) -> Compiled:
    """Compiles a gradient of a dense layer and one of a kind."""
    period = [KINDS["dense"], KINDS[kind]] if kind != "dense" else [KINDS["dense"]]
    model = eqx.filter_eval_shape(
        lambda: mode.Transformer(VOCAB, DIM, period, dtype=dtype, key=jax.random.key(0))
    )

    def gradient(model: mode.Transformer, tokens: Array) -> Any:
        parameters, rest = eqx.partition(model, mode.is_trainable(model))
        batch = None if info is None else info(tokens.shape)

        def loss(parameters: Any) -> Array:
            logits = eqx.combine(parameters, rest)(tokens, batch)[0]
            return jnp.mean(jax.nn.logsumexp(logits, axis=-1))

        return jax.grad(loss)(parameters)

    return compile_for(target, gradient, model, jax.ShapeDtypeStruct((2, tokens), jnp.int32))


def padded(shape: tuple[int, ...]) -> mode.TokenInfo:
    plain = mode.TokenInfo.plain(shape)
    real = (plain.positions < shape[-1] - 7).astype(jnp.int32)
    return mode.TokenInfo(plain.positions, real, layout="prefix")


def packed(shape: tuple[int, ...]) -> mode.TokenInfo:
    return mode.TokenInfo.packed(jnp.broadcast_to(1 + jnp.arange(shape[-1]) // 200, shape))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_layer_runs_the_kernel_of_its_platform(kind: str, target: str) -> None:
    compiled = gradient_of(kind, target)
    assert compiled.kernels == ({H100: "cudnn", V5E: "splash"}[target],)
    # Forward and backward of each layer's attention.
    calls = len(re.findall(rf'custom_call_target="{re.escape(CALLS[target])}', compiled.text))
    layers = 1 if kind == "dense" else 2
    assert calls == layers * {H100: 2, V5E: 3}[target]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("info", [padded, packed])
def test_padded_and_packed_rows_have_it_too(info: Any, target: str) -> None:
    compiled = gradient_of("mod", target, info)
    assert CALLS[target] in compiled.text
    assert len(compiled.kernels) == 1
    assert "(" not in compiled.kernels[0]  # no reason why there is none


def wide_products(text: str) -> set[str]:
    """The scopes of matrix products that take float32 factors."""
    shapes = dict(re.findall(r"%?([\w.\-]+) = (\w+)\[", text))
    scopes = set()
    for line in text.splitlines():
        match = re.search(r"= \S+ (?:dot|convolution)\(([^)]*)\)", line)
        match = match or re.search(
            r'= \S+ custom-call\(([^)]*)\), custom_call_target="__cublas', line
        )
        if match:
            names = [part.split()[-1].lstrip("%") for part in match[1].split(",")]
            if any(shapes.get(name) == "f32" for name in names):
                name = re.search(r'op_name="([^"]*)"', line)
                scopes.add(name[1] if name else line.strip())
    return scopes


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kind", KINDS)
def test_products_take_bfloat16(kind: str, target: str) -> None:
    """But for those of routers, and what follows from the loss, which is of float32."""
    found = wide_products(gradient_of(kind, target).text)
    assert {scope for scope in found if "Router" not in scope} == set()


@CUDNN
def test_wide_products_are_found_where_there_are_some() -> None:
    assert any(
        "Attention" in scope
        for scope in wide_products(gradient_of("mod", H100, dtype=jnp.float32).text)
    )


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("tokens", [8192, 32768])
def test_memory_of_a_block_grows_with_the_length(tokens: int, target: str) -> None:
    """Forward and backward of attention need a few copies of their arrays, and no scores."""
    shapes = [jax.ShapeDtypeStruct((1, tokens, heads, 128), BFLOAT16) for heads in (8, 2, 2)]

    def gradient(q: Array, k: Array, v: Array) -> Any:
        info = mode.TokenInfo.plain((1, tokens))
        attend = mode.CausalAttention()
        loss = lambda q, k, v: jnp.sum(attend(q, k, v, info).astype(jnp.float32) ** 2)  # noqa: E731
        return jax.grad(loss, argnums=(0, 1, 2))(q, k, v)

    compiled = compile_for(target, gradient, *shapes)
    copy = 2 * tokens * 8 * 128
    assert compiled.temporary_bytes < {H100: 4, V5E: 9}[target] * copy


@CUDNN
@pytest.mark.parametrize(
    ("layout", "window", "mask"),
    [
        ("plain", None, "CAUSAL"),
        ("plain", 64, "CAUSAL"),
        ("prefix", None, "PADDING_CAUSAL"),
        ("any", None, "NO_MASK"),
        ("prefix", 64, "NO_MASK"),
    ],
)
def test_cudnn_gets_the_mask_of_the_layout(layout: Any, window: int | None, mask: str) -> None:
    shape = jax.ShapeDtypeStruct((2, 256, 4, 64), BFLOAT16)

    def run(q: Array) -> Array:
        plain = mode.TokenInfo.plain((2, 256))
        info = mode.TokenInfo(plain.positions, plain.segment_ids, layout=layout)
        return mode.CausalAttention(window=window)(q, q, q, info)

    text = compile_for(H100, run, shape).text
    assert f'"mask_type": "{mask}"' in text
    scale = re.search(r'"fmha_scale": ([\d.]+)', text)
    assert scale is not None
    assert float(scale[1]) == 64**-0.5
    inside = re.search(r'"sliding_window_length": (\d+)', text)
    assert inside is not None
    assert int(inside[1]) == (window if layout == "plain" and window else 0)


@TPU
def test_a_mesh_runs_the_kernel_on_each_device() -> None:
    shapes = [jax.ShapeDtypeStruct((8, 512, heads, 64), BFLOAT16) for heads in (4, 2, 2)]

    def run(q: Array, k: Array, v: Array) -> Array:
        return mode.CausalAttention()(q, k, v, mode.TokenInfo.plain((8, 512)))

    rules = [mode.BATCH_RULES] * 3
    compiled = compile_for("tpu:v5e:2x2", run, *shapes, rules=rules)
    assert (compiled.kernels, compiled.collectives) == (("splash",), ())
    # Of a user's own axes this library knows nothing.
    compiled = compile_for("tpu:v5e:2x2", run, *shapes, axes={"data": 2, "model": 2}, rules=rules)
    assert len(compiled.kernels) == 1
    assert "several devices" in compiled.kernels[0]


@CUDNN
def test_what_a_kernel_cannot_do_falls_back_and_is_named() -> None:
    shape = jax.ShapeDtypeStruct((2, 256, 4, 64), BFLOAT16)
    info = mode.TokenInfo.plain((2, 256))
    soft = mode.CausalAttention(soft_cap=30.0)
    compiled = compile_for(H100, lambda q: soft(q, q, q, info), shape)
    assert compiled.kernels == ("blockwise (cuDNN has no soft cap and no ALiBi)",)
    forced = mode.CausalAttention(implementation="splash")
    with pytest.raises(ValueError, match="must run on cuda, got 'splash'"):
        compile_for(H100, lambda q: forced(q, q, q, info), shape)


@CUDNN
def test_derivatives_that_kernels_lack_compile() -> None:
    shape = jax.ShapeDtypeStruct((1, 128, 2, 64), BFLOAT16)
    info = mode.TokenInfo.plain((1, 128))

    def loss(q: Array) -> Array:
        return jnp.sum(mode.CausalAttention()(q, q, q, info).astype(jnp.float32) ** 2)

    def forward(q: Array) -> Array:
        return jax.jvp(loss, (q,), (q,))[1]

    def second(q: Array) -> Array:
        return jax.grad(lambda q: jnp.sum(jax.grad(loss)(q).astype(jnp.float32)))(q)

    for function in (forward, second):
        assert compile_for(H100, function, shape).text


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kind", ["dense", "mod"])
def test_a_decode_step_writes_its_caches_in_place(
    kind: str, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The donated caches are the result's, and no array of their shape is copied.

    What a routed layer needs besides is the caches of the sequences that it selected.
    """
    monkeypatch.setenv("EQX_ON_ERROR", "off")
    dim = 512  # heads of 128 features, the lanes of a TPU
    layers: dict[str, Any] = {
        "dense": lambda key: mode.Residual(mode.TransformerBlock(dim, 4, key=key)),
        "mod": lambda key: mode.MixtureOfDepths(
            mode.TransformerBlock(dim, 4, key=key), dim, 0.25, key=key
        ),
    }
    model = eqx.filter_eval_shape(
        lambda: mode.unstack_layers(
            mode.make_causal(
                mode.Transformer(
                    VOCAB,
                    dim,
                    [layers["dense"], layers[kind]],
                    dtype=BFLOAT16,
                    key=jax.random.key(0),
                ),
                max_capacity=0.5,
            )
        )
    )
    tokens = jax.ShapeDtypeStruct((8, 16), jnp.int32)
    state, _ = eqx.filter_eval_shape(mode.prefill, model, tokens, max_tokens=1024)

    def step(caches: Any, model: Any, state: Any, new: Array) -> Any:
        state = eqx.tree_at(lambda s: s.caches, state, caches)
        return mode.decode_step(model, state, new)[0].caches

    new = jax.ShapeDtypeStruct((8,), jnp.int32)
    compiled = compile_for(target, step, state.caches, model, state, new, donate=(0,))
    leaves = [leaf for leaf in jax.tree.leaves(state.caches) if leaf.dtype == BFLOAT16]
    assert compiled.alias_bytes >= sum(2 * leaf.size for leaf in leaves)
    routed = sum(2 * leaf.size for leaf in leaves if leaf.shape[-2] < 1024)
    assert compiled.temporary_bytes < compiled.alias_bytes / 8 + 1.1 * routed
    shapes = {"bf16[" + ",".join(map(str, leaf.shape)) + "]" for leaf in leaves}
    copies = re.findall(r"= (bf16\[[\d,]*\])\S* copy\(", compiled.text)
    assert not shapes & set(copies)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kind", ["dense", "mod"])
def test_a_long_prompt_in_pieces_needs_little_more_than_its_caches(
    kind: str, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt of 32,768 tokens, 256 at a time, whose scores would take more than the caches."""
    monkeypatch.setenv("EQX_ON_ERROR", "off")
    dim, length, piece = 512, 32_768, 256

    def block(key: Array) -> mode.TransformerBlock:
        return mode.TransformerBlock(dim, 4, num_kv_heads=2, key=key)

    layers: dict[str, Any] = {
        "dense": lambda key: mode.Residual(block(key)),
        "mod": lambda key: mode.MixtureOfDepths(block(key), dim, 0.25, key=key),
    }
    period = [layers["dense"], layers[kind]]
    model = eqx.filter_eval_shape(
        lambda key: mode.unstack_layers(
            mode.make_causal(
                mode.Transformer(VOCAB, dim, period, repeats=4, dtype=BFLOAT16, key=key),
                max_capacity=0.5,
            )
        ),
        jax.random.key(0),
    )
    tokens = jax.ShapeDtypeStruct((1, piece), jnp.int32)
    state, _ = eqx.filter_eval_shape(mode.prefill, model, tokens, max_tokens=length)

    def read(caches: Any, model: Any, state: Any, tokens: Array) -> Any:
        state = eqx.tree_at(lambda s: s.caches, state, caches)
        _, state, _ = mode.decode_tokens(model, state, tokens)
        return state.caches

    compiled = compile_for(target, read, state.caches, model, state, tokens, donate=(0,))
    caches = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state.caches))
    assert compiled.alias_bytes > 0.99 * caches
    assert compiled.temporary_bytes < 0.2 * caches
