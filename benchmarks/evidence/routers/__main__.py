"""What makes a router learn: one factor at a time, on tasks with known answers and on text.

Every variant differs from the default in what its name says. A finished run is a line of a file and
is not repeated. Losses on text are those of every tenth document of the training text, which these
runs do not train on: no held-out text is read. Recovery is that of `mode.lab.recovery`.

    python benchmarks/evidence/routers --bench recall
    python benchmarks/evidence/routers --bench text --depth 6 --variants default random dense ...
    python benchmarks/evidence/routers --table
"""

import dataclasses
import json
import time
from pathlib import Path
from typing import Literal

import jax
import pandas as pd
import tyro
from runs import task_run, text_run
from variants import VARIANTS

from mode.lab.intervals import Interval
from mode.lab.recovery import recoveries
from mode.lab.tables import to_markdown
from mode.lab.tasks.sequences import task_named


# Kept with the study, so that the tables of ROUTERS.md can be made again.
_RESULTS = Path(__file__).with_name("results.jsonl")


@dataclasses.dataclass(frozen=True)
class Options:
    """What makes a router learn."""

    bench: Literal["recall", "s3", "s5", "copy", "arithmetic", "text"] = "recall"
    variants: tuple[str, ...] = ()
    """By default all; of text, no class of a token is known to an oracle."""
    seeds: int = 5
    first_seed: int = 0
    steps: int | None = None
    """By default those of the task; 1500 on text."""
    rate: float = 1e-2
    """Learning rate on text."""
    depth: int = 2
    """Layers on text; every other one is routed."""
    out: Path = _RESULTS
    table: bool = False
    """Print tables of what is there, and train nothing."""


def main(options: Options) -> None:
    """Trains what is missing, or prints tables."""
    options.out.parent.mkdir(parents=True, exist_ok=True)
    lines = options.out.read_text().splitlines() if options.out.exists() else []
    rows = [json.loads(line) for line in lines]
    if options.table:
        print("\n\n".join(tables(pd.DataFrame(rows))))
        return
    all_of_bench = [name for name in VARIANTS if options.bench != "text" or name != "oracle"]
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        for name in options.variants or all_of_bench:
            run = {"bench": options.bench, "variant": name, "seed": seed, "steps": options.steps}
            if options.bench == "text":
                run |= {
                    "rate": options.rate,
                    "depth": options.depth,
                    "steps": options.steps or 1500,
                }
            if any(run.items() <= row.items() for row in rows):
                continue
            start = time.perf_counter()
            if options.bench == "text":
                how = {key: run[key] for key in ("depth", "steps", "rate")}
                got = text_run(VARIANTS[name], seed, **how)
            else:
                got = task_run(options.bench, VARIANTS[name], seed, options.steps)
            row = run | got | {"seconds": round(time.perf_counter() - start, 1)}
            with options.out.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(json.dumps(row), flush=True)
            jax.clear_caches()


def tables(frame: pd.DataFrame) -> list[str]:
    """Makes a table for each bench: means and intervals over seeds, and recoveries on text."""
    texts, names = [], ["depth", "steps", "rate", "bits", "use", "accuracy"]
    frame = frame.reindex(columns=list(dict.fromkeys([*frame.columns, *names])))
    for keys, part in frame.groupby(["bench", "depth", "steps", "rate"], dropna=False):
        named = zip(("", "layers", "steps", "rate"), keys, strict=True)
        name = ", ".join(
            f"{label} {key:g}" if label else str(key) for label, key in named if key == key
        )
        wide = part.pivot_table(index="seed", columns="variant", values="bits", dropna=False)
        rows = []
        for variant in [name for name in VARIANTS if name in set(part["variant"])]:
            own = part[part["variant"] == variant]
            row = {"variant": variant, "seeds": len(own)}
            if keys[0] == "text":
                row["bits per byte"] = Interval.of(own["bits"]).text(".4f")
                if {"dense", "left-out"} <= set(wide):
                    gains = recoveries(wide)[variant].dropna()
                    row["recovery, %"] = Interval.of(100 * gains).text("+.0f")
                row["use, bits per byte"] = Interval.of(own["use"]).text(".4f")
            else:
                row["accuracy"] = Interval.of(own["accuracy"]).text(".3f")
                row["each"] = " ".join(f"{a:.2f}" for a in own.sort_values("seed")["accuracy"])
                classes = task_named(str(keys[0])).classes
                for kind in classes if own[list(classes)].notna().all(axis=None) else ():
                    row[kind] = f"{own[kind].mean():.2f}"
            rows.append(row)
        texts.append(f"## {name}\n\n{to_markdown(pd.DataFrame(rows))}")
    return texts


if __name__ == "__main__":
    main(tyro.cli(Options))
