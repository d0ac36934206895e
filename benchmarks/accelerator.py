"""The training step of `mode-lab train` on one accelerator: time, achieved FLOP/s, peak memory.

Dense against MoD against MoDE at about 100 million and 1 billion parameters in bfloat16,
the presets of `mode-lab plan`, beside the ceiling: one large matrix product, measured in the same
process. Each model has a process of its own, as the peak of memory is that of a process.

    pip install ".[lab]" "jax[cuda13]" && python benchmarks/accelerator.py
    python benchmarks/accelerator.py --tiny     # to see that it runs, on any machine
"""

import argparse
import dataclasses
import statistics
import subprocess
import sys
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


def measure(name: str, tiny: bool) -> None:
    """One row of the table."""
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
    stats = jax.devices()[0].memory_stats() or {}
    peak = stats.get("peak_bytes_in_use")
    print(
        f"| {name} | {parameter_count(state.model) / 1e6:,.1f} M | {1e3 * seconds:.1f} "
        f"| {flops / 1e12:.3g} T "
        f"| {flops / seconds / 1e12:.3g} T | {best / 1e12:.3g} T | {flops / seconds / best:.2f} "
        f"| {'-' if peak is None else f'{peak / 2**30:.1f} GiB'} |",
        flush=True,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--tiny", action="store_true", help="small models, to see that it runs")
    parser.add_argument("--one", choices=MODELS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        measure(options.one, options.tiny)
        sys.exit()
    about = (
        "import jax; print(f'{jax.devices()[0].device_kind}, jax {jax.__version__}', flush=True)"
    )
    subprocess.run([sys.executable, "-c", about], check=True)
    print("| model | parameters | ms / step | FLOPs | FLOP/s | product | of it | peak memory |")
    print("|---" * 8 + "|", flush=True)
    tiny = ["--tiny"] if options.tiny else []
    for name in options.models:
        subprocess.run([sys.executable, __file__, "--one", name, *tiny], check=False)
