"""Reports on loss against size: `report.md`, `report.json`, `isoflop.png` and a table."""

import math
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from rich.console import Console

from ..console import say
from ..files import write_text
from ..folder import read_settings
from ..tables import prose, to_console, to_markdown, write_tables
from .curves import Curve, Parabola
from .figure import plot_curves
from .frame import Runs, to_frame
from .presets import SWEEP_ARMS
from .records import SEARCH_SEED, RunRecord, Store, SweepSettings


_CURVE_COLUMNS = (
    *("training FLOPs", "arm", "sizes x seeds", "optimum, parameters", "loss there", "over seeds"),
    *("misfit", "forward FLOPs / token", "FLOPs to match dense"),
)
_FORMATS = {
    "training FLOPs": ".3g",
    "optimum, parameters": ",.0f",
    "loss there": ".4f",
    "over seeds": ".4f",
    "misfit": ".4f",
    "forward FLOPs / token": ",.0f",
    "capacity": "g",
    "top-k": ".4f",
    "causal": ".4f",
    "slots / token, causal": ".3f",
    "ms / step": ".1f",
}


def report_sweep(out: Path, console: Console) -> None:
    """Writes the report of the records in a folder.

    **Raises:** `ValueError` where the folder holds no sweep, or runs that cannot be compared.
    """
    settings = read_settings(out, SweepSettings)
    store = Store(out)
    records = store.all(settings)
    parts, tables = ["# Loss against size at equal training FLOPs"], {}
    if records:
        frame = to_frame(records)
        runs = Runs.of(frame, settings.reference)
        names = set(runs.frame["arm"])
        arms = [f"- {arm.name}: {arm.description}" for arm in SWEEP_ARMS if arm.name in names]
        if runs.curves:
            tables["curves"] = _curve_table(runs.curves)
            plot_curves(out / "isoflop.png", runs.curves, _about(runs))
        if len(settings.rates) > 1:
            tables["rates"] = _rate_table(frame, settings)
        tables["runs"] = _run_table(runs.frame)
        parts += [
            _curve_section(tables.get("curves"), console),
            *("## Learning rates", _rate_section(tables.get("rates"), settings)),
            *("## Runs", to_markdown(tables["runs"], _FORMATS), "\n".join(arms)),
            *("## Made with", _made_with(records, settings)),
        ]
    failures = [f"- {name}: {reason}" for name, reason in store.failures().items()]
    if failures:
        parts += ["## Runs without a result", "\n".join(failures)]
    write_text(out / "report.md", "\n\n".join(parts) + "\n")
    write_tables(out / "report.json", tables)
    say(console, f"{len(records)} runs: see {out / 'report.md'}.")


def _about(runs: Runs) -> str:
    """What the models of the curves are, for a caption."""
    size, frame = runs.reference, pd.concat([curve.runs for curve in runs.curves])
    sizes, seeds = frame["size"].nunique(), frame["seed"].nunique()
    depths = sorted({size.depth for size in frame["size"]})
    layers = " to ".join(str(depth) for depth in dict.fromkeys((depths[0], depths[-1])))
    return (
        f"Models of {layers} layers and {sizes} sizes, trained for equal FLOPs on sequences of "
        f"{size.length} bytes; a capacity of {size.capacity:g} in every other layer; {seeds} "
        f"seed{'s'[: seeds > 1]}; losses under the causal rule, on text that no run trained on."
    )


def _curve_section(table: pd.DataFrame | None, console: Console) -> str:
    if table is None:
        nothing = "No arm has three sizes at one budget yet: there is nothing to fit."
        say(console, nothing)
        return nothing
    console.print(to_console(table, _FORMATS, title="Loss against size"))
    return prose("isoflop", table=to_markdown(table, _FORMATS)).strip()


def _curve_table(curves: Sequence[Curve]) -> pd.DataFrame:
    dense = {curve.budget: curve.fit for curve in curves if curve.arm == "dense"}
    rows = []
    for curve in curves:
        fit, sizes, seeds = curve.fit, curve.runs["size"].nunique(), curve.runs["seed"].nunique()
        row = (curve.budget, curve.arm, f"{sizes} x {seeds}", fit.optimum, fit.lowest)
        deviation = pd.Series([one.lowest for one in curve.seeds.values()], dtype=float).std()
        misfit = curve.misfit if sizes > 3 else math.nan
        costs = (fit.forward_flops(fit.optimum), _cost(fit, dense.get(curve.budget)))
        rows.append((*row, deviation, misfit, *costs))
    return pd.DataFrame(rows, columns=pd.Index(_CURVE_COLUMNS))


def _cost(fit: Parabola, dense: Parabola | None) -> str | None:
    if dense is None or dense is fit or math.isnan(dense.optimum):
        return None
    ratio, flops = fit.cost_of(dense), dense.forward_flops(dense.optimum)
    bound = "at most " if ratio == fit.forward_flops(fit.sizes(2)[0]) / flops else ""
    return "never" if math.isinf(ratio) else f"{bound}{ratio:.2f}"


def _rate_section(table: pd.DataFrame | None, settings: SweepSettings) -> str:
    if table is None:
        return f"{settings.rates[0]:g}, not searched."
    formats = dict.fromkeys(map("{:g}".format, settings.rates), ".4f")
    return (
        f"Loss of the dense arm after {settings.search_budget:.3g} training FLOPs, with a seed "
        f"that no comparison uses.\n\n{to_markdown(table, formats)}"
    )


def _rate_table(frame: pd.DataFrame, settings: SweepSettings) -> pd.DataFrame:
    rates = sorted(settings.rates)
    search = frame[frame["seed"] >= SEARCH_SEED]
    losses = search.pivot(index="shape", columns="recipe.learning_rate", values="causal")
    best = losses.idxmin(axis="columns")
    edge = best.isin([rates[0], rates[-1]]).map({True: " (at the edge of the search)", False: ""})
    table = losses.rename(columns="{:g}".format).assign(chosen=best.map("{:g}".format) + edge)
    return table.rename_axis(index="size", columns=None).reset_index()


def _run_table(frame: pd.DataFrame) -> pd.DataFrame:
    keys = ["budget", "arm", "size.dim", "size.depth", "size.length", "size.capacity"]
    columns = {
        "size": ("shape", "first"),
        "length": ("size.length", "first"),
        "capacity": ("size.capacity", "first"),
        "seeds": ("seed", "size"),
        "steps": ("steps", "first"),
        "top-k": ("top_k", "mean"),
        "causal": ("causal", "mean"),
        "over seeds": ("causal", "std"),
        "slots / token, causal": ("slots", "mean"),
        "ms / step": ("step_seconds", "median"),
    }
    table = frame.groupby(keys).agg(**columns).reset_index()
    table["ms / step"] *= 1e3
    return table.rename(columns={"budget": "training FLOPs"})[["training FLOPs", "arm", *columns]]


def _made_with(records: Sequence[RunRecord], settings: SweepSettings) -> str:
    steps = [record.steps for record in records]
    seconds = pd.DataFrame([record.seconds for record in records]).sum()
    whole = seconds["training"] + seconds["evaluating"]
    lines = [
        f"{len(records)} runs of {min(steps):,} to {max(steps):,} steps, {whole / 3600:.2f} hours: "
        f"{seconds['waiting'] / whole:.1%} waiting for data, {seconds['evaluating'] / whole:.1%} "
        "evaluating",
        f"text {settings.corpus}, {settings.held_out} held-out sequences",
        *sorted({record.machine for record in records}),
        # Of several versions, each is named: differences may be due to them.
        *sorted({", ".join(f"{n} {v}" for n, v in one.versions.items()) for one in records}),
    ]
    return "\n".join(f"- {line}" for line in lines)
