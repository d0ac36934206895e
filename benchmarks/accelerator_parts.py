"""Blocks and decoding on one accelerator, in bfloat16: one measure a process, one line each.

`accelerator.py` runs these. A line of a block is its time forward, and forward and backward, the
fraction of a large matrix product's FLOP/s that it reaches, and its temporary memory; one of
decoding, tokens per second of a dense and a routed model beside what the bytes of a step allow.
"""

import argparse
import json
from typing import Any

import decode
import jax
import jax.numpy as jnp
import timing
from accelerator_training import ceiling, peak_gigabytes
from jaxtyping import Array

import mode


CAPACITY, EXPERTS, ROUNDS = 0.125, 8, 10
LAYERS = ("dense", "reference", "selected", "mod", "moe", "mode")
FULL = {"dim": 2048, "heads": 16, "tokens": 32_768, "depth": 16, "vocab": 32_768}
TINY = {"dim": 64, "heads": 4, "tokens": 512, "depth": 4, "vocab": 256}


def make_layer(name: str, dim: int, heads: int) -> Any:
    """The layer of a name: `selected` is the dense one, to be run on the selected number."""
    keys = jax.random.split(jax.random.key(0), 2)

    def expert(key: Array) -> mode.SwiGLUFeedForward:
        return mode.SwiGLUFeedForward(dim, key=key)

    def fused(q: Array, k: Array, v: Array, info: mode.TokenInfo) -> Array:
        del info
        kernel = "cudnn" if jax.default_backend() == "gpu" else "xla"
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=kernel)

    attend = fused if name == "reference" else mode.CausalAttention()
    block = mode.TransformerBlock(dim, heads, attend=attend, key=keys[0])
    if name == "mod":
        return mode.MixtureOfDepths(block, dim, CAPACITY, key=keys[1])
    if name == "moe":
        return mode.integrated_mode_layer(expert, dim, heads, EXPERTS, 0, key=keys[1])
    if name == "mode":
        return mode.staged_mode_layer(expert, dim, heads, EXPERTS, capacity=CAPACITY, key=keys[1])
    return mode.Residual(block)


def measure_layer(name: str, length: int, size: dict[str, int]) -> dict[str, Any]:
    """Times of one layer at one length, and what they are of the device's best."""
    layer = make_layer(name, size["dim"], size["heads"])
    batch = max(1, size["tokens"] // length)
    count = mode.token_capacity(length, CAPACITY) if name == "selected" else length
    x = jax.random.normal(jax.random.key(1), (batch, count, size["dim"]), jnp.bfloat16)
    best = ceiling(8192 if size is FULL else 256)
    row: dict[str, Any] = {"layer": name, "length": length, "batch": batch}

    def apply(layer: Any, x: Array) -> Array:
        return layer(x)[0]

    for kind, call in (("forward", apply), ("both", timing.with_gradient(apply))):
        program = timing.compiled(call, layer, x)
        seconds = timing.take_turns({name: program}, ROUNDS)[name]
        row[f"{kind} ms"] = 1e3 * seconds
        row[f"{kind} of product"] = mode.count_flops(call, layer, x).total / seconds / best
        row[f"{kind} MiB"] = program.program.memory_analysis().temp_size_in_bytes / 2**20
    return row


def measure_decoding(batch: int, cache: int, size: dict[str, int]) -> dict[str, Any]:
    """Tokens per second of both models, in turns."""
    length = decode.PROMPT + decode.STEPS * (ROUNDS + 1)
    text = jax.random.randint(jax.random.key(1), (batch, length), 0, size["vocab"])
    runs: dict[str, decode.Run] = {}
    for name in ("dense", "routed"):
        model = mode.mod_transformer(
            size["vocab"],
            size["dim"],
            size["depth"],
            size["heads"],
            num_kv_heads=size["heads"] // 4,
            capacity=CAPACITY,
            offset=1 if name == "routed" else size["depth"],
            dtype=jnp.bfloat16,
            key=jax.random.key(0),
        )
        model = mode.cast_parameters(decode.calibrated(model, text), jnp.bfloat16)
        runs[name] = decode.Run(model, text, cache)
    medians = timing.take_turns(runs, ROUNDS)
    rates = {name: batch * decode.STEPS / seconds for name, seconds in medians.items()}
    return {
        "batch": batch,
        "cache": cache,
        **{f"{name} tokens/s": rate for name, rate in rates.items()},
        "faster": rates["routed"] / rates["dense"],
        "bytes allow": runs["dense"].step_bytes() / runs["routed"].step_bytes(),
        "capacity": runs["routed"].realised_capacity,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=(*LAYERS, "decoding"))
    parser.add_argument("number", type=int, help="length of a layer's sequences; batch of decoding")
    parser.add_argument("--cache", type=int, default=1024)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    size = TINY if options.tiny else FULL
    if options.what == "decoding":
        result = measure_decoding(options.number, options.cache, size)
    else:
        result = measure_layer(options.what, options.number, size)
    print(json.dumps(result | {"peak GiB": peak_gigabytes()}))
