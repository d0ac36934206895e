"""Decoding: a model with every other layer routed at capacity 0.125 against the dense one.

Same depth, width and, for routed layers, caches of `LIMIT` of the tokens. Routing is what a
calibrated running quantile makes of hidden states: demand is uneven, as it is in use. A step
computes attention over all slots of a cache, filled or not, so that its time does not depend on how
far the text has come: prompts are short here.

    python benchmarks/decode.py
"""

import argparse
import sys
import time

import equinox as eqx
import jax
import numpy as np
import timing

import mode


VOCAB, DIM, DEPTH, HEADS, KV_HEADS, CAPACITY, LIMIT = 256, 512, 8, 8, 2, 0.125, 0.1875
PROMPT = 16
FASTER, MEMORY, WORST = 1.75, 0.6, 1.15


def decoder(*, routed: bool) -> mode.Transformer:
    key = jax.random.key(0)
    offset = 1 if routed else DEPTH
    model = mode.mod_decoder(
        VOCAB, DIM, DEPTH, HEADS, num_kv_heads=KV_HEADS, capacity=CAPACITY, offset=offset, key=key
    )
    tokens = jax.random.randint(key, (8, 256), 0, VOCAB)
    model = mode.update_state(model, eqx.filter_jit(model)(tokens)[1])
    return mode.unrolled(mode.causal(model, limit=LIMIT))


def all_want(model: mode.Transformer) -> mode.Transformer:
    """Every member wants every block at every step."""
    return mode.map_routers(
        lambda r: eqx.tree_at(lambda r: r.state.threshold, r, r.state.threshold - 1e9), model
    )


class Run:
    """A model that decodes a batch; each call is one step."""

    def __init__(self, model: mode.Transformer, batch: int, cache: int):
        self.model = model
        self.tokens = jax.random.randint(jax.random.key(1), (batch, 64), 0, VOCAB)
        prompt = jax.random.randint(jax.random.key(2), (batch, PROMPT), 0, VOCAB)
        self.decoding = mode.prefill(model, prompt, max_tokens=cache)
        self.place = 0

    def __call__(self) -> None:
        self.decoding = mode.step(self.model, self.decoding, self.tokens[:, self.place % 64])
        self.place += 1
        jax.block_until_ready(self.decoding.logits)

    @property
    def memory(self) -> int:
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self.decoding.caches))


def measure(
    dense: mode.Transformer, routed: mode.Transformer, batch: int, cache: int, rounds: int
) -> bool:
    runs = {"dense": Run(dense, batch, cache), "routed": Run(routed, batch, cache)}
    medians = timing.take_turns(runs, rounds)
    shares = [float(e.share.mean()) for e in mode.entered(routed, runs["routed"].decoding)]
    ratio = medians["dense"] / medians["routed"]
    memory = runs["routed"].memory / runs["dense"].memory
    print(
        f"  batch {batch:4d}, cache {cache}: {medians['dense'] * 1e3:8.2f} ms dense, "
        f"{medians['routed'] * 1e3:8.2f} ms routed, {ratio:5.2f} times the tokens per second, "
        f"{memory:.3f} of the cache, {np.mean(shares):.3f} of the tokens computed",
        flush=True,
    )
    return ratio >= FASTER and memory <= MEMORY


def worst(
    dense: mode.Transformer, routed: mode.Transformer, batch: int, cache: int, rounds: int
) -> bool:
    runs = {
        "dense": Run(dense, batch, cache),
        "all members want every block": Run(all_want(routed), batch, cache),
    }
    medians = timing.take_turns(runs, rounds)
    return timing.report(
        f"batch {batch}, cache {cache}, worst case", medians, "dense", {list(runs)[1]: WORST}
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--caches", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    timing.header()
    began = time.perf_counter()
    models = decoder(routed=False), decoder(routed=True)
    held = [
        measure(*models, batch, cache, options.rounds)
        for cache in options.caches
        for batch in options.batches
    ]
    held += [worst(*models, batch, 1024, options.rounds) for batch in options.batches[:3]]
    print(f"{time.perf_counter() - began:.0f} s in all")
    sys.exit(0 if all(held) else 1)
