"""Decoding of a pretrained model, dense and converted, in one run; `transformers` beside them.

A converted model has routers that select at random what a trained one would select by content: as
many tokens, under the causal rule, with thresholds calibrated on the same text. Speed does not
depend on which tokens these are.

    python benchmarks/pretrained.py --model SmolLM2-135M-Instruct.Q4_1.gguf

The table says for each batch: milliseconds of a step; tokens per second over those of the dense
model; the same as bytes moved allow, which counts the weights of every layer that some sequence is
routed to and the caches of those sequences; milliseconds to the first token; bytes of the caches.
"""

import argparse
import time
import warnings
from pathlib import Path
from typing import Any

import decode
import jax
import timing

import mode


class Run(decode.Run):
    """A model that decodes a batch of texts, and the seconds to its first token."""

    def __init__(self, model: mode.Transformer, text: jax.Array, cache: int):
        super().__init__(model, text, cache)  # compiles
        start = time.perf_counter()
        state, _ = mode.prefill(model, text[:, : decode.PROMPT], max_tokens=cache)
        jax.block_until_ready(state.logits)
        self.first_token = time.perf_counter() - start


def peer_run(model: mode.Transformer, folder: Path, text: jax.Array) -> dict[str, Any]:
    """A function for the peer's steps with its own caches, where it is installed."""
    try:
        import torch  # pyright: ignore[reportMissingImports]
        import transformers  # pyright: ignore[reportMissingImports]
    except ImportError:
        return {}
    mode.pretrained.save(model, folder)
    peer = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.tensor(text.tolist())
    with torch.no_grad():
        cache = peer(ids[:, : decode.PROMPT], use_cache=True).past_key_values
    position = [decode.PROMPT]
    warnings.filterwarnings("ignore", category=FutureWarning)  # of the name of an argument

    def run() -> None:
        nonlocal cache
        with torch.no_grad():
            for _ in range(decode.STEPS):
                at = position[0]
                result = peer(ids[:, at : at + 1], past_key_values=cache, use_cache=True)
                cache, position[0] = result.past_key_values, at + 1

    return {"transformers": run}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--layers", type=int, nargs="+", default=list(range(4, 23, 2)))
    parser.add_argument("--capacity", type=float, default=0.5)
    parser.add_argument("--forms", nargs="+", default=["mod", "mod-queries"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--cache", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--peer", type=Path, help="a new folder for a copy that the peer reads")
    options = parser.parse_args()
    timing.header()
    dense = mode.pretrained.load(options.model)
    vocab = dense.embedding.shape[0]
    models = {"dense": mode.unstack_layers(dense)}
    text = jax.random.randint(jax.random.key(1), (1, 512), 0, vocab)
    for form in options.forms:
        settings = {"capacity": options.capacity, "form": form, "key": jax.random.key(0)}
        routed = mode.pretrained.convert(dense, options.layers, **settings)
        routed = mode.calibrate_thresholds(routed, (text, None))
        causal = mode.make_causal(routed, max_capacity=min(1.0, 1.5 * options.capacity))
        models[form] = mode.unstack_layers(causal)
    print("| batch | model | step | faster | bytes allow | first token | caches |")
    print("|---" * 7 + "|")
    for batch in options.batches:
        length = decode.PROMPT + decode.STEPS * (options.rounds + 1)
        text = jax.random.randint(jax.random.key(2), (batch, length), 0, vocab)
        runs: dict[str, Any] = {
            name: Run(model, text, options.cache) for name, model in models.items()
        }
        if options.peer is not None:
            folder = options.peer / str(batch)
            runs |= peer_run(dense, folder, text)
        medians = timing.take_turns(runs, options.rounds)
        allowed = {name: run.step_bytes() for name, run in runs.items() if isinstance(run, Run)}
        for name, run in runs.items():
            cells = [str(batch), name, f"{medians[name] / decode.STEPS * 1e3:.1f} ms"]
            cells.append(f"**{medians['dense'] / medians[name]:.2f}**")
            if isinstance(run, Run):
                cells.append(f"{allowed['dense'] / allowed[name]:.2f}")
                cells += [f"{run.first_token * 1e3:.0f} ms", f"{run.memory / 1e6:.0f} MB"]
            else:
                cells += ["-", "-", "-"]
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
