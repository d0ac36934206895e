"""bfloat16 beside PyTorch's: our block loses no more precision than the same block there.

Needs PyTorch, which the extra `bench` installs.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mode


pytestmark = pytest.mark.optimized


torch: Any = pytest.importorskip("torch")
F: Any = torch.nn.functional if torch else None

HEADS = 4


def as_bfloat16(seed: int, dim: int) -> mode.TransformerBlock:
    """A block whose parameters bfloat16 holds exactly."""
    block = mode.TransformerBlock(dim, HEADS, key=jax.random.key(seed))
    arrays, rest = eqx.partition(block, eqx.is_array)
    return eqx.combine(
        jax.tree.map(lambda p: p.astype(jnp.bfloat16).astype(jnp.float32), arrays), rest
    )


def torch_block(block: mode.TransformerBlock, x: Any) -> Any:
    """The same block as a PyTorch user writes it, in bfloat16."""
    t = lambda p: torch.tensor(np.asarray(p, np.float32)).bfloat16()  # noqa: E731
    feedforward: Any = block.feedforward
    attention, mlp = block.attention, feedforward.function
    batch, tokens, dim = x.shape
    size = dim // HEADS
    angle = torch.arange(tokens)[:, None] * 10_000.0 ** (-torch.arange(size // 2) / (size // 2))

    def norm(x: Any, module: Any) -> Any:
        return F.rms_norm(x, (dim,), t(module.weight), module.eps)

    def turn(heads: Any) -> Any:
        first, second = heads.float().chunk(2, -1)
        cos, sin = angle.cos()[:, None], angle.sin()[:, None]
        turned = [first * cos - second * sin, second * cos + first * sin]
        return torch.cat(turned, -1).to(heads.dtype)

    projected = norm(x, block.attention_norm) @ t(attention.qkv.weight)
    q, k, v = (part.reshape(batch, tokens, HEADS, size) for part in projected.chunk(3, -1))
    heads = (part.transpose(1, 2) for part in (turn(q), turn(k), v))
    mixed = F.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2)
    attended = mixed.reshape(x.shape) @ t(attention.out.weight)
    normed = norm(x + attended, block.feedforward_norm)
    inner = F.silu(normed @ t(mlp.gate.weight)) * (normed @ t(mlp.up.weight))
    return attended + inner @ t(mlp.down.weight)


def error(got: Any, exact: np.ndarray) -> float:
    return float(np.sqrt(np.mean((np.asarray(got, np.float64) - exact) ** 2) / np.mean(exact**2)))


def test_a_block_is_as_exact_as_in_pytorch() -> None:
    """Output and gradient, against float64: the mean error over draws is at most 1.02 times."""
    ours: list[float] = []
    theirs: list[float] = []
    for seed, (batch, tokens, dim) in enumerate([(2, 512, 256), (1, 200, 128), (2, 96, 256)] * 2):
        block = as_bfloat16(seed, dim)
        x = jax.random.normal(jax.random.key(9 + seed), (batch, tokens, dim)).astype(jnp.bfloat16)
        weight = jax.random.normal(jax.random.key(99), x.shape).astype(jnp.bfloat16)

        @eqx.filter_jit
        def both(block: Any, x: Any, weight: Any) -> Any:
            out, pull_back = jax.vjp(lambda x: block(x)[0], x)
            return out, pull_back(weight)[0]

        got = both(block, x, weight)
        with jax.enable_x64(True):
            wide = lambda p: jnp.asarray(np.asarray(p, np.float64))  # noqa: E731
            arrays, rest = eqx.partition(block, eqx.is_array)
            exact_block = eqx.combine(jax.tree.map(wide, arrays), rest)
            exact = [np.asarray(one) for one in both(exact_block, wide(x), wide(weight))]

        theirs_x = torch.tensor(np.asarray(x, np.float32)).bfloat16().requires_grad_()
        out = torch_block(block, theirs_x)
        out.backward(torch.tensor(np.asarray(weight, np.float32)).bfloat16())
        peer = [part.detach().float().numpy() for part in (out, theirs_x.grad)]
        ours += [error(one, other) for one, other in zip(got, exact, strict=True)]
        theirs += [error(one, other) for one, other in zip(peer, exact, strict=True)]
    assert 0.001 < np.mean(theirs) < 0.02
    assert np.mean(ours) <= 1.02 * np.mean(theirs), (ours, theirs)
