"""One table of all arms: loss at equal FLOPs, what a router found, speed of decoding.

    mode-lab isoflop --out runs/evidence
    python benchmarks/evidence/more_runs.py --out runs/evidence --study forms --seeds 5
    mode-lab tasks --out runs/forms --seeds 5 --arms dense learned random mod-queries ...
    python benchmarks/forms.py --out runs/forms/decode.json

`tables.py` prints it with the other tables of EVIDENCE.md.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from mode.lab.arms import ALL_ARMS
from mode.lab.evidence.frame import Runs
from mode.lab.intervals import Interval
from mode.lab.tasks.records import TaskResult, read_results


# The arms of a task that are arms of the ablation by another name.
IN_TASKS = {"mod": "learned", "mod-random": "random"}
SEEDS = 5
FORMATS = {"causal": ".4f", "slots": ".3f", "steps": ",.0f"}


def losses(runs: Runs, budget: float) -> pd.DataFrame:
    """Compares the causal losses of all arms at a budget, over the first seeds: a row for each."""
    frame = runs.varying()
    frame = frame[(frame["budget"] == budget) & (frame["seed"] < SEEDS)]
    causal = frame.pivot(index="seed", columns="arm", values="causal")
    means = frame.groupby("arm")[["causal", "slots", "steps"]].mean()
    means["minus dense"] = [
        None if arm == "dense" else Interval.of((causal[arm] - causal["dense"]).dropna()).text()
        for arm in means.index
    ]
    return means.sort_values("causal").reset_index()


def found(results: Sequence[TaskResult], arm: str) -> dict[str, str | None]:
    """The accuracy of an arm on recall, causally, and the classes that got a slot; by seed."""
    own = [result for result in results if result.arm == IN_TASKS.get(arm, arm)]
    own = [result for result in own if result.task == "recall"]
    row: dict[str, str | None] = {
        "recall, by seed": " ".join(f"{result.last.accuracy:.2f}" for result in own) or None
    }
    for name in ("value", "question", "filler"):
        hits = [result.last.hits[name] for result in own if result.last.hits]
        row[name] = f"{np.mean(hits):.2f}" if hits else None
    return row


def table(runs: Runs, tasks: Path, budget: float) -> pd.DataFrame:
    """Joins the losses with the results of the tasks and with `decode.json`, where it is there."""
    rows = losses(runs, budget)
    order = [arm.name for arm in ALL_ARMS]
    rows = rows[rows["arm"].isin(order)].reset_index(drop=True)
    results = read_results(tasks)
    rows = rows.join(pd.DataFrame([found(results, arm) for arm in rows["arm"]]))
    path = tasks / "decode.json"
    speeds = json.loads(path.read_text()) if path.exists() else {}
    for batch in next(iter(speeds.values()), ()):
        own = [speeds.get(arm, {}).get(batch) for arm in rows["arm"]]
        rows[f"decode, batch {batch}"] = [None if x is None else f"{x:.2f}" for x in own]
    return rows
