"""What `mode-lab analyze` prints and saves."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from rich.console import Console

from .analysis_figures import READING, plot_analysis
from .arms import arm_named
from .console import say
from .files import Record, write_record, write_text
from .measures import CLASSES
from .options import Size
from .routing_map import RoutingMap
from .summary import FEW, Summary
from .tables import Format, escape, prose, to_console, to_markdown
from .versions import PACKAGES, versions


@dataclasses.dataclass(frozen=True)
class About:
    """The run that is analysed, its text in a few words, and what a reader must know of it."""

    checkpoint: str
    arm: str
    steps: int
    size: Size
    text: str
    notes: tuple[str, ...]
    seed: int


class AnalysisRecord(Record):
    """`analysis.json`. `Summary` describes the columns of the tables."""

    format = "mode-lab analysis"
    version = 1

    about: About
    versions: dict[str, str]
    routed_layers: tuple[int, ...]
    unit: str
    max_compute: int
    tables: dict[str, dict[str, tuple[str | bool | int | float | None, ...]]]
    routing_map: RoutingMap | None


def _interval(cell: tuple[float, float, float]) -> str:
    value, low, high = (f"{number:z.2f}" for number in cell)
    return value if math.isnan(cell[1]) else f"{value} [{low}, {high}]"


def _quantiles(cell: tuple[float, float, float]) -> str:
    return "{:z.3f} ({:z.3f} to {:z.3f})".format(*cell)


# The titles and formats of the columns of tables.
_COLUMNS: dict[str, tuple[str, Format]] = {
    "bits_per_byte": ("bits / byte", ".3f"),
    "compute": ("compute", ".3f"),
    "pearson": ("r", _interval),
    "spearman": ("rho", _interval),
    "token_fraction": ("of tokens", ".1%"),
    "compute_fraction": ("of compute", ".1%"),
    "ratio": ("ratio", _interval),
    "entropy": ("mean entropy", "z.2f"),
    "fraction": ("of tokens", ".1%"),
    "independent": ("if independent", ".1%"),
    "mean": ("mean entropy", "z.2f"),
    "selected": ("selected weights", _quantiles),
    "skipped": ("other weights", _quantiles),
    "above_half": ("above 0.5", ".1%"),
    "noop": ("no-op probability", ".1%"),
}
_FORMATS = dict(_COLUMNS.values())


def write_analysis(
    out: Path, about: About, summary: Summary, routing_map: RoutingMap | None, console: Console
) -> None:
    """Writes `analysis.json`, `analysis.md` and the pictures, and prints a short table.

    `routing_map` is `None` where nothing is routed.
    """
    out.mkdir(parents=True, exist_ok=True)
    total = summary.totals.iloc[0]
    heading = (
        f"{about.arm} after {about.steps} steps, on {about.text}: {total['tokens']:,} predictions "
        f"in {total['sequences']} sequence{'s' if total['sequences'] > 1 else ''} of "
        f"{about.size.length}."
    )
    record = _record(about, summary, routing_map)
    write_record(out / "analysis.json", record)
    pictures = [] if routing_map is None else plot_analysis(out, summary, routing_map, heading)
    arm = arm_named(about.arm)
    trained = ""
    if arm.rule is None:
        trained = " The selection of this model is causal in training already: it is shown once."
    elif arm.under_rule:
        last = f" The last {100 * arm.under_rule:.0f} % of a training of this arm run"
        trained = f"{last} under the causal rule, with the slots of top-k."
    tables = {"totals": _totals(summary), "classes": _classes(summary)}
    if routing_map is not None:
        tables |= {"depths": _depths(summary), "routers": _routers(summary)}
    text = prose(
        "analysis_dense" if routing_map is None else "analysis",
        heading=escape(heading),
        arm=arm,
        summary=summary,
        total=total,
        notes="".join(f"- {escape(n)}\n" for n in (f"From {about.checkpoint}.", *about.notes)),
        pictures="".join(f"![{READING[name]}]({name}.png)\n\n" for name in pictures),
        trained=trained,
        few=FEW,
        definitions=prose("byte_classes"),
        versions="\n".join(f"- {name} {number}" for name, number in record.versions.items()),
        **{name: to_markdown(table, _FORMATS) for name, table in tables.items()},
    )
    write_text(out / "analysis.md", text)
    say(console, heading)
    for note in about.notes:
        say(console, note, "bold")
    if routing_map is None:
        say(console, "Nothing is routed: every layer computes every token.")
    for name in ("totals", "classes"):
        console.print(to_console(tables[name], _FORMATS))
    say(console, f"Numbers, pictures and how to read them: {out / 'analysis.md'}")


def _table(frame: pd.DataFrame, names: Sequence[str]) -> pd.DataFrame:
    return frame[list(names)].rename(columns={n: _COLUMNS[n][0] for n in names if n in _COLUMNS})


def _cells(frame: pd.DataFrame, *names: str) -> pd.Series:
    """Joins a number and its two ends in one cell; a number that is not defined has no cell."""
    return frame[list(names)].apply(tuple, axis=1).where(frame[names[0]].notna())


def _intervals(frame: pd.DataFrame, *names: str) -> pd.DataFrame:
    return frame.assign(**{n: _cells(frame, n, f"{n}_low", f"{n}_high") for n in names})


def _totals(summary: Summary) -> pd.DataFrame:
    routed = ["compute", "pearson", "spearman"] if summary.layers else []
    frame = _intervals(summary.totals, "pearson", "spearman")
    return _table(frame, ["selection", "bits_per_byte", "entropy", *routed])


def _classes(summary: Summary) -> pd.DataFrame:
    frame = _intervals(summary.classes, "ratio")
    frame = frame.sort_values("class", key=lambda names: names.map(CLASSES.index), kind="stable")
    routed = ["selection", "compute_fraction", "ratio"] if summary.layers else []
    return _table(frame, ["class", "token_fraction", *routed, "entropy"])


def _depths(summary: Summary) -> pd.DataFrame:
    frame = summary.depths.rename(columns={"compute": summary.unit})
    frame = frame[frame[summary.unit] <= frame[frame["count"] > 0][summary.unit].max()]
    frame = frame.sort_values(summary.unit, kind="stable")
    return _table(frame, [summary.unit, "selection", "fraction", "independent", "mean"])


def _routers(summary: Summary) -> pd.DataFrame:
    frame = summary.routers.copy()
    inside = frame["nested"].map({True: ", inside the block", False: ""})
    frame["layer"] = frame["layer"].astype(str) + inside
    by_layer = summary.loads.groupby(["selection", "router", "layer"], sort=False)["fraction"]
    ends = zip(by_layer.min(), by_layer.max(), strict=True)
    frame["of tokens, each expert"] = [
        f"{low:.1%}" if low == high else f"{low:.1%} to {high:.1%}" for low, high in ends
    ]
    for kind in ("selected", "skipped"):
        frame[kind] = _cells(frame, f"{kind}_50%", f"{kind}_5%", f"{kind}_95%")
    names = ["selection", "layer", "of tokens, each expert", "selected", "skipped"]
    return _table(frame, [*names, "above_half", "noop"])


def _record(about: About, summary: Summary, routing_map: RoutingMap | None) -> AnalysisRecord:
    tables = {}
    for name in ("totals", "classes", "depths", "routers", "loads", "histograms"):
        frame: pd.DataFrame = getattr(summary, name)
        defined = frame.astype(object).where(frame.notna(), None)
        tables[name] = {key: tuple(column) for key, column in defined.to_dict("list").items()}
    return AnalysisRecord(
        about=about,
        versions=versions(*PACKAGES, "numpy", "scipy", "matplotlib"),
        routed_layers=summary.layers,
        unit=summary.unit,
        max_compute=summary.max_compute,
        tables=tables,
        routing_map=routing_map,
    )
