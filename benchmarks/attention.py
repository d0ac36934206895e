"""The dense block against PyTorch's, and the routed block against the PyPI package
`mixture-of-depth`'s routing around an equal PyTorch block.

The PyTorch block is the one a good engineer would write: fused causal attention, RMSNorm and GELU
from `torch.nn.functional`, rotary tables computed once beforehand.

    pip install -e ".[bench]"
    python benchmarks/attention.py
"""

import functools
import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import timing
import torch
import torch.nn.functional as F

import mode


HEADS = 4
CAPACITY = 0.125
SHAPES = ((4, 1024, 256), (2, 4096, 256))
DENSE_LIMIT = 1.15
ROUTED_LEAST = 1.8


class TorchBlock(torch.nn.Module):
    """Pre-norm attention with rotary embeddings and a GELU feed-forward, its residuals inside."""

    def __init__(self, dim: int, tokens: int):
        super().__init__()
        self.hidden_size = dim  # read by mixture-of-depth
        linear = functools.partial(torch.nn.Linear, bias=False)
        self.query, self.key, self.value, self.out = (linear(dim, dim) for _ in range(4))
        self.up, self.down = linear(dim, 4 * dim), linear(4 * dim, dim)
        self.norms = torch.nn.ParameterList(torch.ones(dim) for _ in range(2))
        half = dim // HEADS // 2
        angle = torch.arange(tokens)[:, None] * 10_000.0 ** (-torch.arange(half) / half)
        self.cos, self.sin = angle.cos(), angle.sin()

    def rotate(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, -1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)

    def forward(
        self, x: torch.Tensor, position_ids: torch.Tensor | None = None, **_: Any
    ) -> tuple[torch.Tensor]:
        shape = x.shape
        cos, sin = self.cos, self.sin
        if position_ids is not None:
            cos, sin = cos[position_ids[0]], sin[position_ids[0]]
        normed = F.rms_norm(x, shape[-1:], self.norms[0], 1e-6)
        q, k, v = (
            project(normed).view(*shape[:2], HEADS, -1).transpose(1, 2)
            for project in (self.query, self.key, self.value)
        )
        q, k = self.rotate(q, cos, sin), self.rotate(k, cos, sin)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(shape))
        normed = F.rms_norm(x, shape[-1:], self.norms[1], 1e-6)
        return (x + self.down(F.gelu(self.up(normed), approximate="tanh")),)


def published_routing() -> type[torch.nn.Module]:
    """`MoD` of the published package, from its file: importing the package itself needs a version
    of transformers that is long gone."""
    files = importlib.metadata.files("mixture-of-depth") or []
    path = next(file.locate() for file in files if str(file) == "MoD/MoD.py")
    spec = importlib.util.spec_from_file_location("published_mod", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.MoD


def torch_call(
    module: torch.nn.Module, shape: tuple[int, ...], *, backward: bool
) -> Callable[[], None]:
    x = torch.randn(shape, requires_grad=True)
    positions = torch.arange(shape[1]).expand(shape[:2])
    extra = dict.fromkeys(("past_key_value", "output_attentions", "use_cache", "cache_position"))

    def call() -> None:
        with torch.set_grad_enabled(backward):
            if isinstance(module, TorchBlock):
                out = module(x)[0]
            else:
                out = module(x, attention_mask=None, position_ids=positions, **extra)[0]
            if backward:
                module.zero_grad()
                x.grad = None
                out.sum().backward()

    return call


def jax_block(dim: int) -> mode.TransformerBlock:
    key = jax.random.key(0)
    feedforward = mode.PositionWise(mode.GELUFeedForward(dim, key=key))
    return mode.TransformerBlock(dim, HEADS, feedforward=feedforward, key=key)


def apply(layer: mode.Residual | mode.MixtureOfDepths, x: jax.Array) -> jax.Array:
    return layer(x)[0]


def products(shape: tuple[int, int, int]) -> None:
    """The block's products with its weights and nothing else: what both have to spend."""
    dim = shape[-1]
    sizes = [(dim, dim)] * 4 + [(dim, 4 * dim), (4 * dim, dim)]
    weights = [jax.random.normal(jax.random.key(0), size) * dim**-0.5 for size in sizes]
    linears = torch.nn.Sequential(*(torch.nn.Linear(*size, bias=False) for size in sizes))
    x = jax.random.normal(jax.random.key(1), shape).reshape(-1, dim)
    rows = torch.randn(x.shape, requires_grad=True)

    def chain(weights: list[jax.Array], x: jax.Array) -> jax.Array:
        return functools.reduce(jax.numpy.matmul, weights, x)

    def torch_chain() -> None:
        linears.zero_grad()
        rows.grad = None
        linears(rows).sum().backward()

    variants = {
        "PyTorch products": torch_chain,
        "XLA products": timing.compiled(timing.with_gradient(chain), weights, x),
    }
    medians = timing.take_turns(variants)
    timing.report(
        f"{list(shape)}, products with the weights alone, forward+backward",
        medians,
        "PyTorch products",
        {},
    )


def dense(shape: tuple[int, int, int]) -> bool:
    x = jax.random.normal(jax.random.key(1), shape)
    layer = mode.Residual(jax_block(shape[-1]))
    block = TorchBlock(shape[-1], shape[1])
    met = True
    for kind, backward in (("forward+backward", True), ("forward", False)):
        call = timing.with_gradient(apply) if backward else apply
        variants = {
            "PyTorch dense block": torch_call(block, shape, backward=backward),
            "mode dense block": timing.compiled(call, layer, x),
        }
        limits = {"mode dense block": DENSE_LIMIT} if backward else {}
        medians = timing.take_turns(variants)
        met &= timing.report(f"{list(shape)}, {kind}", medians, "PyTorch dense block", limits)
    return met


def routed(shape: tuple[int, int, int]) -> bool:
    x = jax.random.normal(jax.random.key(1), shape)
    key = jax.random.key(2)
    layer = mode.MixtureOfDepths(jax_block(shape[-1]), shape[-1], CAPACITY, key=key)
    published = published_routing()(CAPACITY, TorchBlock(shape[-1], shape[1]))
    published.get_submodule(
        "router"
    ).eval()  # in training it recomputes its capacity from a counter of calls
    variants = {
        "mode Mixture-of-Depths block": timing.compiled(timing.with_gradient(apply), layer, x),
        "mixture-of-depth 1.2.0, PyTorch block": torch_call(published, shape, backward=True),
    }
    medians = timing.take_turns(variants)
    timing.report(
        f"{list(shape)}, capacity {CAPACITY}, forward+backward",
        medians,
        "mode Mixture-of-Depths block",
        {},
    )
    ratio = (
        medians["mixture-of-depth 1.2.0, PyTorch block"] / medians["mode Mixture-of-Depths block"]
    )
    print(f"  mode is {ratio:.2f} times faster (at least {ROUTED_LEAST})")
    return ratio >= ROUTED_LEAST


def memory() -> bool:
    """Peak temporary memory of forward and backward must not grow with the square of the length."""
    print("\ntemporary memory, dense block, forward+backward, [2, tokens, 256]")
    sizes = []
    arrays, static = eqx.partition(mode.Residual(jax_block(256)), eqx.is_array)

    def step(arrays: mode.Residual, x: jax.Array) -> Any:
        layer = eqx.combine(arrays, static)
        return eqx.filter(timing.with_gradient(apply)(layer, x), eqx.is_array)

    for tokens in (1024, 2048, 4096):
        x = jax.ShapeDtypeStruct((2, tokens, 256), "float32")
        program = jax.jit(step).lower(arrays, x).compile()
        analysis = program.memory_analysis()
        assert analysis is not None
        sizes.append(analysis.temp_size_in_bytes)
        print(f"  {tokens:5d} tokens {sizes[-1] / 2**20:8.1f} MiB")
    return sizes[2] / sizes[0] < 4.4


if __name__ == "__main__":
    timing.header()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads of {os.cpu_count()}")
    for shape in SHAPES:
        products(shape)
    results = [*map(dense, SHAPES), routed(SHAPES[0]), memory()]
    sys.exit(0 if all(results) else 1)
