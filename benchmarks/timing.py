"""Honest timing for all benchmarks: variants take turns in one process, medians, ratios.

Machines are shared and drift. Variants that take turns see the same drift, so that the ratio of two
medians means something where neither time does.
"""

import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax


PAUSE = 0.01  # seconds


class Program:
    """A compiled program and its arguments: a call that waits for its result."""

    def __init__(self, program: Any, arrays: Any):
        self.program = program
        self.arrays = arrays

    @property
    def flops(self) -> float:
        """XLA's own count."""
        return self.program.cost_analysis()["flops"]

    def __call__(self) -> Any:
        return jax.block_until_ready(self.program(self.arrays))


def compiled(function: Callable[..., Any], *args: Any) -> Program:
    """`function(*args)`, compiled; only the arrays among `args` are arguments of the program."""
    arrays, static = eqx.partition(args, eqx.is_array)

    def run(arrays: Any) -> Any:
        return eqx.filter(function(*eqx.combine(arrays, static)), eqx.is_array)

    return Program(jax.jit(run).lower(arrays).compile(), arrays)


def with_gradient(function: Callable[..., Any]) -> Callable[..., Any]:
    """Forward and backward: the sum of the first result, its gradient by the first two arguments.

    Those are the module and its input, as in training, where the input comes from a layer below.
    """

    def loss(differentiated: Any, *rest: Any) -> jax.Array:
        out = function(*differentiated, *rest)
        return (out[0] if isinstance(out, tuple) else out).sum()

    def run(module: Any, x: jax.Array, *rest: Any) -> Any:
        return eqx.filter_value_and_grad(loss)((module, x), *rest)

    return run


def take_turns(variants: dict[str, Callable[[], Any]], rounds: int = 15) -> dict[str, float]:
    """Median seconds of each variant, run in turns after one warm-up round each.

    Before each turn a pause: thread pools spin for a while when their work is done, and a library
    would pay for its predecessor's.
    """
    for run in variants.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, run in variants.items():
            time.sleep(PAUSE)
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def report(title: str, medians: dict[str, float], base: str, limits: dict[str, float]) -> bool:
    """Print each variant as a ratio to `base`, with its limit; true if all hold."""
    print(f"\n{title}")
    met = True
    for name, median in medians.items():
        ratio = median / medians[base]
        line = f"  {name:<42} {median * 1e3:9.2f} ms  {ratio:6.2f} x"
        if name in limits:
            within = ratio <= limits[name]
            met &= within
            line += f"  (limit {limits[name]:.2f}: {'met' if within else 'MISSED'})"
        print(line)
    return met


def header() -> None:
    """Print what the numbers were measured on."""
    device = jax.devices()[0]
    print(
        f"Python {platform.python_version()}, jax {jax.__version__}, equinox {eqx.__version__}, "
        f"{device.platform} ({device.device_kind}), {platform.machine()}"
    )
