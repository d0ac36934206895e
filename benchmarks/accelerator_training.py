"""The training step of `mode-lab train` on one accelerator: time, achieved FLOP/s, peak memory.

Dense against MoD against MoDE at about 100 million and 1 billion parameters in bfloat16,
the presets of `mode-lab plan`, beside the ceiling: one large matrix product, measured in the same
process. `accelerator.py` runs it for each model; it prints one line of JSON.
"""

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from mode.lab.arms import arms_named
from mode.lab.budget import flops_per_step, parameter_count
from mode.lab.presets import PRESETS
from mode.lab.step import Recipe, begin, make_step


MODELS = [f"{kind}-{size}" for size in ("100m", "1b") for kind in ("dense", "mod", "mode")]
TINY = {"dim": 32, "depth": 4, "heads": 2, "length": 64, "batch": 2, "vocab": 257}
STEPS, WARM, REPEATS = 20, 3, 20


def ceiling(rows: int) -> float:
    """FLOP/s of the product of two square matrices in bfloat16, the median of several."""
    x = jax.random.normal(jax.random.key(0), (rows, rows), jnp.bfloat16)
    product = jax.jit(lambda x: x @ x)
    return 2 * rows**3 / median_seconds(lambda: product(x), REPEATS)


def median_seconds(call: Callable[[], object], repeats: int) -> float:
    times = []
    for turn in range(WARM + repeats):
        began = time.perf_counter()
        jax.block_until_ready(call())
        if turn >= WARM:
            times.append(time.perf_counter() - began)
    return statistics.median(times)


def peak_gigabytes() -> float | None:
    """The most memory that this process had on the device, in GiB, where the device says it."""
    peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    return None if peak is None else peak / 2**30


def measure(name: str, tiny: bool) -> None:
    """The row of one model."""
    preset = PRESETS[name]
    size = dataclasses.replace(preset.size, **TINY, kv_heads=None) if tiny else preset.size
    (arm,) = arms_named([preset.arm])
    state = begin(arm, size, Recipe(), seed=0)
    tokens = jax.random.randint(jax.random.key(1), (size.batch, size.length + 1), 0, size.vocab)
    sample = {"tokens": tokens, "segment_ids": jnp.ones_like(tokens)}
    step = make_step(arm, Recipe())
    rate = jnp.asarray(1e-3)
    best = ceiling(512 if tiny else 8192)

    def once() -> jax.Array:
        nonlocal state
        state, health = step((sample, rate), state)
        return health.loss

    seconds = median_seconds(once, STEPS)
    flops = flops_per_step(arm, size, Recipe(ramp=0.0))
    row = {
        "model": name,
        "parameters M": parameter_count(state.model) / 1e6,
        "ms a step": 1e3 * seconds,
        "TFLOP": flops / 1e12,
        "of product": flops / seconds / best,
        "peak GiB": peak_gigabytes(),
    }
    print(json.dumps(row))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", choices=MODELS, required=True)
    parser.add_argument("--tiny", action="store_true", help="a small model, to see that it runs")
    options = parser.parse_args()
    measure(options.one, options.tiny)
