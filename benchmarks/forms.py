"""Decoding: every arm of the ablation beside the dense one, in one run.

Layers, widths and capacities are the same for all; caches of routed layers hold the trained
capacity. Running quantiles are those of the text that is read. Arms that cannot be sampled from,
such as random selection, are left out.

    python benchmarks/forms.py --out runs/forms/decode.json
"""

import argparse
import json
from pathlib import Path

import decode
import jax
import timing

import mode
from mode.lab.arms import ALL_ARMS, Arm
from mode.lab.files import write_text
from mode.lab.options import Size


SIZE = Size(dim=decode.DIM, depth=decode.DEPTH, heads=decode.HEADS)
CACHE = 1024
# Arms take turns with the dense one in groups, so that their caches and weights fit.
TOGETHER = 3


def sampler(arm: Arm, text: jax.Array) -> mode.Transformer:
    """The causal model of an arm, calibrated on this text, with slots for the trained capacity."""
    model = arm.build(SIZE, key=jax.random.key(0))
    if mode.routers(model):
        model = mode.calibrate_thresholds(model, text)
    return mode.unstack_layers(arm.causal_in_training(model))


def measure(arms: list[Arm], batch: int, rounds: int) -> dict[str, float]:
    """How many times as fast as the dense arm each arm decodes."""
    length = decode.PROMPT + decode.STEPS * (rounds + 1)
    text = jax.random.randint(jax.random.key(1), (batch, length), 0, SIZE.vocab)
    runs = {arm.name: decode.Run(sampler(arm, text), text, CACHE) for arm in (ALL_ARMS[0], *arms)}
    medians = timing.take_turns(runs, rounds)
    return {arm.name: medians["dense"] / medians[arm.name] for arm in arms}


def main(out: Path | None, batches: list[int], rounds: int) -> None:
    """Prints a row for each arm, and writes all rows as JSON."""
    timing.header()
    print("| arm | " + " | ".join(f"batch {batch}" for batch in batches) + " |")
    print("|---" * (1 + len(batches)) + "|")
    arms = [arm for arm in ALL_ARMS[1:] if arm.samples]
    rows: dict[str, dict[str, float]] = {}
    for start in range(0, len(arms), TOGETHER):
        group = arms[start : start + TOGETHER]
        by_batch = {batch: measure(group, batch, rounds) for batch in batches}
        for arm in group:
            rows[arm.name] = {str(batch): by_batch[batch][arm.name] for batch in batches}
            cells = " | ".join(f"{value:.2f}" for value in rows[arm.name].values())
            print(f"| {arm.name} | {cells} |", flush=True)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_text(out, json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    main(options.out, options.batches, options.rounds)
