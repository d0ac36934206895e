"""Decoding: a recursion of three rounds against a loop of three, with the same weights.

Three quarters, a half and a quarter of the tokens take part in the rounds of the recursion, by
running quantiles: half the depth of the loop, on average. A cache of a round holds its capacity of
the tokens; with shared keys there is one, as long as one of the loop's three. The last columns are
what bytes allow: those that a step of the loop reads, weights in every round and caches, over
those of the recursion, whose rounds all need the weights at these batches.

    python benchmarks/recursion.py
"""

import argparse
import sys

import decode
import equinox as eqx
import jax
import timing

import mode


ROUNDS, CAPACITIES = 3, (0.75, 0.5, 0.25)
FASTER = 1.5


def model(kind: str) -> mode.Transformer:
    """One layer, of three rounds."""

    def block(key: jax.Array) -> mode.TransformerBlock:
        return mode.TransformerBlock(decode.DIM, decode.HEADS, key=key)

    def middle(key: jax.Array) -> mode.Loop | mode.Recursion:
        if kind == "loop":
            return mode.Loop(block(key), ROUNDS)
        share_keys = kind == "shared"
        return mode.Recursion(block(key), decode.DIM, CAPACITIES, share_keys=share_keys, key=key)

    return mode.Transformer(decode.VOCAB, decode.DIM, [middle], key=jax.random.key(0))


def causal(model: mode.Transformer, text: jax.Array) -> mode.Transformer:
    """The causal model, calibrated on this text, with slots for the trained capacities."""
    model = mode.make_causal(model, max_capacity=None)
    if mode.routers(model):
        model = mode.calibrate_thresholds(model, text)
    return mode.unstack_layers(model)


def bytes_read(model: mode.Transformer, state: mode.DecodeState) -> int:
    """Bytes of a step: the weights, in every round, and caches."""
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(eqx.filter(model.stacks, eqx.is_array)))
    return ROUNDS * weights + sum(leaf.nbytes for leaf in jax.tree.leaves(state.caches))


def measure(batch: int, cache: int, rounds: int) -> bool:
    """Prints a row; whether recursion is as fast as wanted."""
    length = decode.PROMPT + decode.STEPS * (rounds + 1)
    text = jax.random.randint(jax.random.key(1), (batch, length), 0, decode.VOCAB)
    models = {kind: causal(model(kind), text) for kind in ("loop", "recursion", "shared")}
    runs = {kind: decode.Run(one, text, cache) for kind, one in models.items()}
    read = {kind: bytes_read(models[kind], run.state) for kind, run in runs.items()}
    medians = timing.take_turns(runs, rounds)
    selected = sum(counts.sum() for counts in runs["recursion"].selected)
    depth = float(selected) / (batch * decode.STEPS * (rounds + 1))
    faster = {kind: medians["loop"] / medians[kind] for kind in runs}
    allowed = {kind: read["loop"] / read[kind] for kind in runs}
    print(
        f"| {cache} | {batch} | {medians['loop'] * 1e3 / decode.STEPS:.2f} ms | {depth:.2f} "
        f"| **{faster['recursion']:.2f}** | {faster['shared']:.2f} | {allowed['recursion']:.2f} "
        f"| {allowed['shared']:.2f} |",
        flush=True,
    )
    return faster["recursion"] >= FASTER


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 32, 64])
    parser.add_argument("--caches", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    timing.header()
    print("| cache | batch | loop | depth | faster | shared keys | bytes allow | shared |")
    print("|---" * 8 + "|")
    met = [
        measure(batch, cache, options.rounds)
        for cache in options.caches
        for batch in options.batches
    ]
    sys.exit(0 if all(met) else 1)
