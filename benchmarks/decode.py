"""Decoding: a model with every other layer routed at capacity 0.125 against the dense one.

Same depth, width and, for routed layers, caches of `LIMIT` of the tokens. Routing is what a running
quantile makes of hidden states, its rate set to the trained share: demand is uneven, over time and
members, as it is in use. A step computes attention over all slots of a cache, filled or not, so
that its time does not depend on how far the text has come: prompts are short here. In the worst
case every member wants every block at every step. Where the caches of both models would not fit
into `--gigabytes`, several query heads share a key-value head; the table says how many there are.

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


VOCAB, DIM, DEPTH, HEADS, CAPACITY, LIMIT = 256, 512, 8, 8, 0.125, 0.1875
PROMPT, STEPS = 16, 8
WORST_UP_TO = 32  # members
FASTER, MEMORY, WORST, DRIFT = 1.75, 0.6, 1.15, 1.1


def decoder(kv_heads: int, *, routed: bool) -> mode.Transformer:
    return mode.mod_decoder(
        VOCAB,
        DIM,
        DEPTH,
        HEADS,
        num_kv_heads=kv_heads,
        capacity=CAPACITY,
        offset=1 if routed else DEPTH,
        key=jax.random.key(0),
    )


def calibrated(model: mode.Transformer, text: jax.Array) -> mode.Transformer:
    """The causal model whose running quantiles are those of this text: the share of its tokens that
    enter a block is the trained one, spread over time and members as it comes."""
    model = mode.update_state(model, eqx.filter_jit(model)(text)[1])
    return mode.unrolled(mode.causal(model, limit=LIMIT))


def all_want(model: mode.Transformer) -> mode.Transformer:
    """Every member wants every block at every step."""
    return mode.map_routers(
        lambda r: eqx.tree_at(lambda r: r.state.threshold, r, r.state.threshold - 1e9), model
    )


@eqx.filter_jit(donate="all-except-first")
def read_on(kept: tuple[mode.Transformer, jax.Array], decoding: mode.Decoding) -> mode.Decoding:
    model, tokens = kept
    return jax.lax.scan(
        lambda decoding, token: (mode.step(model, decoding, token), None), decoding, tokens.T
    )[0]


class Run:
    """A model that decodes a batch of texts; each call is `STEPS` steps of it."""

    def __init__(self, model: mode.Transformer, text: jax.Array, cache: int):
        self.model = model
        self.text = text
        self.decoding = mode.prefill(model, text[:, :PROMPT], max_tokens=cache)
        self.place = PROMPT

    def __call__(self) -> None:
        tokens = self.text[:, self.place : self.place + STEPS]
        self.place += STEPS
        self.decoding = jax.block_until_ready(read_on((self.model, tokens), self.decoding))

    @property
    def memory(self) -> int:
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self.decoding.caches))


def fitting_kv_heads(kv_heads: int, batch: int, cache: int, gigabytes: float) -> int:
    """The most key-value heads, halving, whose caches fit: the dense model's and the others'."""
    tokens = batch * cache * DEPTH * (2.2 if batch <= WORST_UP_TO else 1.6)
    while kv_heads > 1 and tokens * 2 * kv_heads * (DIM // HEADS) * 4 > gigabytes * 1e9:
        kv_heads //= 2
    return kv_heads


def drift(batch: int, cache: int) -> bool:
    """Whether a step takes as long at the end of a text as at its start."""
    turns = (cache - PROMPT) // STEPS
    text = jax.random.randint(jax.random.key(1), (batch, cache), 0, VOCAB)
    run = Run(calibrated(decoder(HEADS, routed=True), text[:, :256]), text, cache)
    seconds = []
    for _ in range(turns):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    third = turns // 3
    ratio = np.median(seconds[-third:]) / np.median(seconds[1:third])
    print(f"the last third of {turns * STEPS} steps / the first: {ratio:.2f} (limit {DRIFT})")
    return bool(ratio <= DRIFT)


def measure(kv_heads: int, batch: int, cache: int, rounds: int) -> bool:
    length = PROMPT + STEPS * (rounds + 1)
    text = jax.random.randint(jax.random.key(1), (batch, length), 0, VOCAB)
    dense, routed = (decoder(kv_heads, routed=routed) for routed in (False, True))
    dense, routed = calibrated(dense, text), calibrated(routed, text)
    runs = {"dense": Run(dense, text, cache), "routed": Run(routed, text, cache)}
    if batch <= WORST_UP_TO:
        runs["worst"] = Run(all_want(routed), text, cache)
    medians = timing.take_turns(runs, rounds)
    share = np.mean([found.share.mean() for found in mode.entered(routed, runs["routed"].decoding)])
    faster = medians["dense"] / medians["routed"]
    memory = runs["routed"].memory / runs["dense"].memory
    worst = medians["worst"] / medians["dense"] if "worst" in runs else 0
    print(
        f"| {kv_heads} | {cache} | {batch} | {medians['dense'] * 1e3 / STEPS:.2f} ms "
        f"| {medians['routed'] * 1e3 / STEPS:.2f} ms | **{faster:.2f}** | {memory:.3f} "
        f"| {share:.3f} | {f'{worst:.2f}' if worst else '-'} |",
        flush=True,
    )
    return faster >= FASTER and memory <= MEMORY and worst <= WORST


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--caches", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--kv-heads", type=int, default=HEADS)
    parser.add_argument("--gigabytes", type=float, default=10.0)
    options = parser.parse_args()
    timing.header()
    began = time.perf_counter()
    print(
        "| kv heads | cache | batch | dense step | routed step | faster | memory | share | worst |"
    )
    print("|---" * 9 + "|")
    held = [
        measure(
            fitting_kv_heads(options.kv_heads, batch, cache, options.gigabytes),
            batch,
            cache,
            options.rounds,
        )
        for cache in options.caches
        for batch in options.batches
    ]
    held.append(drift(batch=8, cache=1024))
    print(f"{time.perf_counter() - began:.0f} s in all")
    sys.exit(0 if all(held) else 1)
