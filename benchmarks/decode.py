"""Decoding: a model with every other layer routed at capacity 0.125 against the dense one.

Both have the same depth and width; caches of routed layers hold `MAX_CAPACITY` of the tokens.
Tokens are routed by running quantiles of the router's scores, which select the trained fraction of
them: unevenly over time and sequences, as in use. A step computes attention over all slots of a
cache, filled or not, so that its time does not depend on the length of the text: prompts are short
here. In the worst case every sequence is routed to every block in every step. Where the caches of
both models would not fit into `--gigabytes`, query heads share key-value heads; the table says how
many there are.

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


VOCAB, DIM, DEPTH, HEADS, CAPACITY, MAX_CAPACITY = 256, 512, 8, 8, 0.125, 0.1875
PROMPT, STEPS = 16, 8
WORST_UP_TO = 32  # sequences
FASTER, MEMORY, WORST, DRIFT = 1.75, 0.6, 1.15, 1.1


def decoder(kv_heads: int, *, routed: bool) -> mode.Transformer:
    return mode.mod_transformer(
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
    """The causal model whose running quantiles are those of this text, so that a routed layer
    selects the trained fraction of its tokens."""
    model = mode.update_router_state(model, eqx.filter_jit(model)(text)[1])
    return mode.unstack_layers(mode.make_causal(model, max_capacity=MAX_CAPACITY))


def select_all(model: mode.Transformer) -> mode.Transformer:
    """The model in which every token is routed to every block."""
    return mode.map_routers(
        lambda r: eqx.tree_at(lambda r: r.state.threshold, r, r.state.threshold - 1e9), model
    )


@eqx.filter_jit(donate="all-except-first")
def read_steps(
    kept: tuple[mode.Transformer, jax.Array], state: mode.DecodeState
) -> tuple[mode.DecodeState, jax.Array]:
    """Decode steps on given tokens, and which sequences each router selected, `[steps, routers,
    batch]`."""
    model, tokens = kept

    def one(state: mode.DecodeState, token: jax.Array) -> tuple[mode.DecodeState, jax.Array]:
        state, routings = mode.decode_step(model, state, token)
        selected = [routing.filled[0, :, 0, 0] for routing in routings]
        nobody = jax.numpy.zeros((0, token.shape[0]), bool)
        return state, jax.numpy.stack(selected) if selected else nobody

    return jax.lax.scan(one, state, tokens.T)


class Run:
    """A model that decodes a batch of texts; each call is `STEPS` steps of it."""

    def __init__(self, model: mode.Transformer, text: jax.Array, cache: int):
        self.model = model
        self.text = text
        self.state, _ = mode.prefill(model, text[:, :PROMPT], max_tokens=cache)
        self.position = PROMPT
        self.selected: list[jax.Array] = []

    def __call__(self) -> None:
        tokens = self.text[:, self.position : self.position + STEPS]
        self.position += STEPS
        result = jax.block_until_ready(read_steps((self.model, tokens), self.state))
        self.state, selected = result
        self.selected.append(selected)

    @property
    def memory(self) -> int:
        """Bytes of the caches."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self.state.caches))

    def step_bytes(self) -> float:
        """Bytes that a step must read, the mean over the steps: the matrix of the logits, weights
        of the layers that some sequence is routed to, and the caches of those that are."""
        filled = np.concatenate(self.selected)  # [steps, routers, batch]
        total, router = float(self.model.embedding.nbytes), 0
        for stack, caches in zip(self.model.stacks, self.state.caches, strict=True):
            for layer, cache in zip(stack.layers, caches, strict=True):
                weights, entries = (
                    sum(leaf.nbytes for leaf in jax.tree.leaves(tree) if eqx.is_array(leaf))
                    for tree in (layer, cache)
                )
                if mode.routers(layer):
                    rows, router = filled[:, router], router + 1
                    weights *= np.mean(np.any(rows, axis=-1))
                    entries *= np.mean(rows)
                total += weights + entries
        return float(total)

    @property
    def realised_capacity(self) -> float:
        """The fraction of the tokens that a routed layer selected."""
        return float(np.mean(self.selected)) if np.size(self.selected) else 0.0


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
        runs["worst"] = Run(select_all(routed), text, cache)
    medians = timing.take_turns(runs, rounds)
    capacity = runs["routed"].realised_capacity
    faster = medians["dense"] / medians["routed"]
    allowed = runs["dense"].step_bytes() / runs["routed"].step_bytes()
    memory = runs["routed"].memory / runs["dense"].memory
    worst = medians["worst"] / medians["dense"] if "worst" in runs else 0
    print(
        f"| {kv_heads} | {cache} | {batch} | {medians['dense'] * 1e3 / STEPS:.2f} ms "
        f"| {medians['routed'] * 1e3 / STEPS:.2f} ms | **{faster:.2f}** | {allowed:.2f} "
        f"| {memory:.3f} | {capacity:.3f} | {f'{worst:.2f}' if worst else '-'} |",
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
    columns = ("kv heads", "cache", "batch", "dense", "routed", "faster", "bytes allow")
    columns += ("memory", "capacity", "worst")
    print("| " + " | ".join(columns) + " |")
    print("|---" * len(columns) + "|")
    met = [
        measure(
            fitting_kv_heads(options.kv_heads, batch, cache, options.gigabytes),
            batch,
            cache,
            options.rounds,
        )
        for cache in options.caches
        for batch in options.batches
    ]
    met.append(drift(batch=8, cache=1024))
    print(f"{time.perf_counter() - began:.0f} s in all")
    sys.exit(0 if all(met) else 1)
