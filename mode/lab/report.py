"""The report of an ablation: a table, figures, and a text on what they show and what not."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console

from .ablation_figures import plot_curves, plot_selections
from .budget import flops_per_step, forward_flops_per_token, parameter_count
from .console import say
from .files import Record, write_record, write_text
from .recovery import recovery_table
from .run import TrainResult
from .tables import DASH, Format, escape, prose, to_console, to_markdown, write_tables
from .versions import PACKAGES, machine, versions


class Results(Record):
    """`results.json`: what `report.md` shows, as numbers."""

    format = "mode-lab ablation results"
    version = 3

    command: str
    versions: dict[str, str]
    machine: str
    arms: tuple[TrainResult, ...]
    equal_steps: tuple[TrainResult, ...]


_FORMATS: dict[str, Format] = {
    "parameters": lambda count: f"{count / 1e3:,.0f} k",
    "forward FLOPs / token": lambda flops: f"{flops / 1e6:.3f} M",
    "ms / step": ".0f",
    "bits / byte, top-k": ".3f",
    "bits / byte, CAUSAL": ".3f",
    "recovery": ".0%",
    "without its updates": ".3f",
    **dict.fromkeys(("precision", "recall"), lambda values: _each(values, 2)),
    **dict.fromkeys(
        ("slots / token, top-k", "slots / token, causal"), lambda values: _each(values, 3)
    ),
}
# Below this the learning rate has hardly risen, and running quantiles have hardly settled.
_FEW_STEPS = 100


def write_report(
    out: Path,
    results: Sequence[TrainResult],
    equal_steps: Sequence[TrainResult],
    command: str,
    console: Console,
) -> None:
    """Writes `report.md`, its tables as `report.json`, `results.json`, `curves.png` and
    `routing.png`, and prints the tables.

    `results` are of equal training FLOPs, `equal_steps` those from which recovery is computed.
    """
    options = results[0].settings.options
    size = options.size
    record = Results(
        command=command,
        versions=versions(*PACKAGES),
        machine=machine(),
        arms=tuple(results),
        equal_steps=tuple(equal_steps),
    )
    write_record(out / "results.json", record)
    about = (
        f"{size.depth} layers of {size.dim} features, sequences of {size.length} bytes, seed "
        f"{options.seed}, on {options.data or 'the source of the Python standard library'}."
    )
    pictures = "![Training loss against training FLOPs](curves.png)\n"
    plot_curves(out / "curves.png", results, about)
    if any(result.evaluation.snippet for result in results):
        plot_selections(out / "routing.png", results, about)
        pictures += "\n![Which tokens each routed layer selected](routing.png)\n"
    frame = pd.DataFrame(map(_row, results))
    best = min(frame["bits / byte, CAUSAL"])
    style = {
        "bold": [row for row, bits in enumerate(frame["bits / byte, CAUSAL"]) if bits == best],
        # Cells that hold the number of each router, too.
        "right": [name for name in frame.columns if name != "arm"],
    }
    steps = min(frame["steps"])
    recovered = recovery_table(equal_steps)
    flops = max(r.settings.options.steps * _flops(r) for r in results)
    text = prose(
        "ablation",
        record=record,
        table=to_markdown(frame, _FORMATS, **style),
        arms="".join(f"- **{r.arm.name}**: {escape(r.arm.description)}.\n" for r in results),
        recovery=""
        if recovered is None
        else prose("ablation_recovery", table=to_markdown(recovered, _FORMATS)),
        flops=f"{flops:.3g}",
        short=prose("ablation_short", steps=steps) if steps < _FEW_STEPS else "",
        size=size,
        bytes=f"{results[0].evaluation.bytes:,}",
        pictures=pictures,
        versions="".join(f"- {name} {number}\n" for name, number in record.versions.items()),
    )
    write_text(out / "report.md", text)
    tables = {"equal FLOPs": frame} | ({} if recovered is None else {"recovery": recovered})
    write_tables(out / "report.json", tables)
    title = "Held-out results at equal training FLOPs"
    console.print(to_console(frame, _FORMATS, title=title, **style))
    if recovered is not None:
        title = "Equal steps: the part of the routed blocks' worth that an arm recovers"
        console.print(to_console(recovered, _FORMATS, title=title))
    else:
        say(console, "No recovery: it needs the arms `dense` and `left-out`.")
    if steps < _FEW_STEPS:
        short = f"An arm took fewer than {_FEW_STEPS} steps: too short to mean anything."
        say(console, short, style="bold red")
    words = "Top-k looks at the future; the causal column is what a sampler gets. One seed, toy"
    say(console, f"{words} scale: see {out / 'report.md'}.")


def _flops(result: TrainResult) -> float:
    """FLOPs of a step, the mean over the training."""
    options = result.settings.options
    return flops_per_step(result.arm, options.size, options.recipe)


def _row(result: TrainResult) -> dict[str, Any]:
    arm, size, routers = result.arm, result.settings.options.size, result.evaluation.routers
    return {
        "arm": arm.name,
        "parameters": parameter_count(arm.shapes(size)),
        "forward FLOPs / token": forward_flops_per_token(arm, size),
        "steps": result.settings.options.steps,
        "ms / step": 1e3 * result.step_seconds,
        "bits / byte, top-k": result.evaluation.bits_top_k,
        "bits / byte, CAUSAL": result.evaluation.bits_causal,
        "precision": tuple(router.precision for router in routers),
        "recall": tuple(router.recall for router in routers),
        "slots / token, top-k": tuple(router.compute_top_k for router in routers),
        "slots / token, causal": tuple(router.compute_causal for router in routers),
    }


def _each(values: Sequence[float | None], digits: int) -> str:
    """The number of each router."""
    return " / ".join(f"{value:.{digits}f}" for value in values if value is not None) or DASH
