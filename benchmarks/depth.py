"""What routing costs: a Mixture-of-Depths block against its block on the selected tokens alone.

The block on only the selected number of tokens is the least that any implementation could take. The
dense block on all tokens is what routing saves from.

    python benchmarks/depth.py
"""

import sys

import jax
import timing

import mode


CAPACITY = 0.125
HEADS = 4
LIMITS = {"forward+backward": 1.05, "forward": 1.10}


def measure(shape: tuple[int, int, int]) -> bool:
    _, tokens, dim = shape
    keys = jax.random.split(jax.random.key(0), 3)
    feedforward = mode.PositionWise(mode.GELUFeedForward(dim, key=keys[0]))
    block = mode.TransformerBlock(dim, HEADS, feedforward=feedforward, key=keys[0])
    dense = mode.Residual(block)
    routed = mode.MixtureOfDepths(block, dim, CAPACITY, key=keys[1])
    x = jax.random.normal(keys[2], shape)
    few = x[:, : mode.token_capacity(tokens, CAPACITY)]
    met = True
    for kind in LIMITS:
        call = timing.with_gradient(_apply) if kind == "forward+backward" else _apply
        variants = {
            "block on the selected number of tokens": timing.compiled(call, dense, few),
            "Mixture-of-Depths at 0.125": timing.compiled(call, routed, x),
            "dense block on all tokens": timing.compiled(call, dense, x),
        }
        medians = timing.take_turns(variants)
        met &= timing.report(
            f"{list(shape)}, {kind}",
            medians,
            base="block on the selected number of tokens",
            limits={"Mixture-of-Depths at 0.125": LIMITS[kind]},
        )
    return met


def _apply(layer: mode.Residual | mode.MixtureOfDepths, x: jax.Array) -> jax.Array:
    return layer(x)[0]


if __name__ == "__main__":
    timing.header()
    results = [measure(shape) for shape in ((4, 1024, 256), (8, 2048, 512))]
    sys.exit(0 if all(results) else 1)
