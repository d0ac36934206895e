"""The pictures of an analysis; rules of selection differ in their place and their colour."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from .figures import BLUE, COLUMN, GREY, INK, ORANGE, PAGE, PALE, save_figure
from .routing_map import RoutingMap, add_legend
from .summary import FEW, Summary


_COLOURS = {"top-k": ORANGE, "causal": BLUE, "as trained": BLUE}
_SKIPPED = "#C9C9C6"
_MAX_HISTOGRAMS = 6  # layers of a router; more could not be told apart
_MAX_LABELS = 12  # experts whose number stands in the picture
_RARE = 0.001  # fraction of tokens that no bar or dot would show

# How to read each picture: its caption, and its alternative text in the report.
READING = {
    "routing_map": "Which bytes of a text were computed. Orange line: a sequence begins there, and "
    "the model sees nothing of what is before it.",
    "router_weights": "Router weights of the selected pairs of a token and an expert and of the "
    "others, layer by layer: histograms, scaled to each layer. The outermost bins hold what lies "
    "beyond them as well.",
    "depth_used": "Bars: how many tokens had how much compute. Dots: how many would have it if "
    "layers selected their tokens independently of each other.",
    "compute_by_class": "Left: fraction of the tokens and of the compute of each class of bytes. "
    "Right: the compute of a token over that of the average token, which is the dashed line; bars "
    "are 95 % intervals of a bootstrap over sequences.",
    "compute_and_entropy": "Entropy of the prediction made at a token, by the compute of the "
    "token. Box: quartiles, with the median as a line. Whiskers: 5 to 95 %. Dot: mean. Below "
    f"{FEW} tokens there is only the dot.",
    "expert_loads": "The fraction of a layer's tokens that each expert selected, in %.",
}


def plot_analysis(out: Path, summary: Summary, routing_map: RoutingMap, about: str) -> list[str]:
    """Draws the pictures of a routed model in a folder, each as a PNG and a PDF.

    `about`, the model and its text, ends each caption.

    **Returns:** the names of the pictures, which are in `READING`.
    """
    drawings: dict[str, Callable[[Summary], Figure]] = {
        "routing_map": lambda summary: routing_map.draw(summary.unit),
        "router_weights": _router_weights,
        "depth_used": _depth_used,
        "compute_by_class": _compute_by_class,
        "compute_and_entropy": _compute_and_entropy,
    }
    if summary.loads["expert"].max() > 1:
        drawings["expert_loads"] = _expert_loads
    where = f" The passage begins in {routing_map.document}."
    for name, draw in drawings.items():
        text = (READING[name] + (where if name == "routing_map" else ""), about)
        save_figure(partial(draw, summary), out / f"{name}.png", out / f"{name}.pdf", text=text)
    return list(drawings)


def _router_weights(summary: Summary) -> Figure:
    frames = summary.of("histograms")
    layers = next(iter(frames.values())).drop_duplicates(["router", "layer"])
    rows = []
    for _, part in layers.groupby("router"):
        shown = np.unique(np.linspace(0, len(part) - 1, _MAX_HISTOGRAMS).round().astype(int))
        rows += part.iloc[shown].to_dict("records")
    width = COLUMN if len(frames) == 1 else 1.5 * COLUMN
    figure = Figure(figsize=(width, 0.62 * len(rows) + 0.75))
    grid = figure.subplots(len(rows), len(frames), squeeze=False, sharey="row")
    for column, (selection, frame) in enumerate(frames.items()):
        for number, (axes, row) in enumerate(zip(grid[:, column], rows, strict=True)):
            bins = frame[(frame["router"] == row["router"]) & (frame["layer"] == row["layer"])]
            edges = [*bins["left"], bins["right"].iloc[-1]]
            total = max(bins[["selected", "skipped"]].to_numpy().sum(), 1)
            axes.stairs(bins["skipped"] / total, edges, fill=True, color=_SKIPPED)
            style = {"color": _COLOURS[selection], "alpha": 0.85}
            axes.stairs(bins["selected"] / total, edges, fill=True, **style)
            axes.set(yticks=[], xlim=(edges[0], edges[-1]))
            axes.spines["left"].set_visible(False)
            is_last = row is rows[-1] or rows[number + 1]["router"] != row["router"]
            axes.tick_params(labelbottom=is_last)
            if not column:
                label = f"layer {row['layer']}" + (",\ninside" if row["nested"] else "")
                axes.set_ylabel(label, rotation=0, ha="right", va="center")
        grid[0, column].set_title(selection)
        grid[-1, column].set_xlabel("router weight")
    selected = {f"selected, {name}": _COLOURS[name] for name in frames}
    add_legend(figure, {"not selected": _SKIPPED} | selected)
    return figure


def _depth_used(summary: Summary) -> Figure:
    frames = summary.of("depths")
    figure = Figure(figsize=(COLUMN, 2.2))
    axes = figure.add_subplot()
    width = 0.8 / len(frames)
    units = "layers" if summary.unit == "blocks" else "experts"
    seen = summary.depths.query(f"count > 0 or independent > {_RARE}")["compute"].max()
    for number, (selection, frame) in enumerate(frames.items()):
        frame = frame[frame["compute"] <= seen]
        x = frame["compute"] + (number - (len(frames) - 1) / 2) * width
        label = f"{selection}, mean {(frame['compute'] * frame['fraction']).sum():.2f}"
        axes.bar(x, frame["fraction"], 0.92 * width, color=_COLOURS[selection], label=label)
        likely = frame["independent"].where(frame["independent"] > _RARE)
        label = None if number else f"if {units} selected independently"
        axes.plot(x, likely, "o", color=INK, mfc="white", clip_on=False, label=label)
    axes.set(xlabel=_compute_label(summary), ylabel="fraction of the tokens")
    axes.set_xlim(-0.6, seen + 0.6)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    figure.legend(loc="outside upper left", ncols=2)
    return figure


def _compute_label(summary: Summary) -> str:
    if summary.unit == "blocks":
        return f"routed blocks that computed the token, of {summary.max_compute}"
    layers = len(summary.layers)
    return f"experts that computed the token, in {layers} routed layer{'s' if layers > 1 else ''}"


def _compute_by_class(summary: Summary) -> Figure:
    kept = {name: frame[frame["tokens"] > 0] for name, frame in summary.of("classes").items()}
    first = next(iter(kept.values()))
    figure = Figure(figsize=(1.5 * COLUMN, 0.36 * len(first) + 0.9))
    fractions, ratios = figure.subplots(1, 2, sharey=True, width_ratios=[1.1, 1])
    y = np.arange(len(first))[::-1]
    height = 0.78 / (1 + len(kept))
    fractions.barh(y + 0.39 - height / 2, first["token_fraction"], 0.9 * height, color=GREY)
    for number, (selection, frame) in enumerate(kept.items()):
        at = y + 0.39 - (number + 1.5) * height
        colour = _COLOURS[selection]
        fractions.barh(at, frame["compute_fraction"], 0.9 * height, color=colour)
        ends = frame[["ratio_low", "ratio_high"]].sub(frame["ratio"], axis=0).abs().T
        ratios.errorbar(frame["ratio"], at, xerr=ends, fmt="o", color=colour, clip_on=False)
    fractions.set(xlabel="fraction", yticks=y, yticklabels=first["class"])
    fractions.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    ratios.axvline(1, color=GREY, linewidth=0.7, linestyle=(0, (4, 3)))
    ratios.set(xlabel="compute per token, average = 1", xlim=(0, None))
    for axes in (fractions, ratios):
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
    add_legend(figure, {"of tokens": GREY} | {f"of compute, {n}": _COLOURS[n] for n in kept})
    return figure


def _compute_and_entropy(summary: Summary) -> Figure:
    frames = summary.of("depths")
    figure = Figure(figsize=(COLUMN if len(frames) == 1 else 1.5 * COLUMN, 2.3))
    grid = figure.subplots(1, len(frames), sharex=True, sharey=True, squeeze=False)[0]
    for axes, (selection, frame) in zip(grid, frames.items(), strict=True):
        _draw_boxes(axes, frame, _COLOURS[selection])
        total = summary.of("totals")[selection].iloc[0]
        text = f"$r$ = {total['pearson']:.2f}, $\\rho$ = {total['spearman']:.2f}"
        text = text if np.isfinite(total["pearson"]) else "no correlation defined"
        label = _compute_label(summary).replace(" that", "\nthat")
        axes.set(title=f"{selection}\n{text}", xlabel=label)
    grid[0].set_ylabel("entropy of the prediction (bits)")
    grid[0].set_ylim(0, 1.05 * np.nanmax(summary.depths[["95%", "mean"]].to_numpy()))
    return figure


def _draw_boxes(axes: Axes, frame: pd.DataFrame, colour: str) -> None:
    names = {"5%": "whislo", "25%": "q1", "50%": "med", "75%": "q3", "95%": "whishi"}
    boxed = frame[frame["count"] >= FEW]
    stats: Any = boxed[list(names)].rename(columns=names).to_dict("records")
    axes.bxp(
        stats,
        positions=list(boxed["compute"]),
        widths=0.56,
        showfliers=False,
        showcaps=False,
        manage_ticks=False,
        patch_artist=True,
        boxprops={"facecolor": PALE, "edgecolor": colour},
        medianprops={"color": colour, "linewidth": 1.4},
        whiskerprops={"color": colour},
    )
    seen = frame[frame["count"] > 0]
    axes.plot(seen["compute"], seen["mean"], "o", color=INK, markersize=2.8, zorder=4)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _expert_loads(summary: Summary) -> Figure:
    loads = summary.loads.groupby("router").filter(lambda part: part["expert"].max() > 1)
    routers, frames = loads["router"].unique(), summary.of("loads")
    experts, top = loads["expert"].max(), float(loads["fraction"].max()) or 1.0
    layers = loads.groupby("router")["layer"].nunique().max()
    width = COLUMN if len(frames) == 1 or experts <= 4 else PAGE
    figure = Figure(figsize=(width, (0.2 * min(layers, 24) + 0.5) * len(routers) + 0.5))
    grid = figure.subplots(len(routers), len(frames), squeeze=False)
    shades = ScalarMappable(Normalize(0, top), "Blues")
    for column, (selection, frame) in enumerate(frames.items()):
        for axes, router in zip(grid[:, column], routers, strict=True):
            part = frame[frame["router"] == router]
            table = part.pivot(index="layer", columns="expert", values="fraction")
            axes.imshow(table, cmap=shades.cmap, norm=shades.norm, aspect="auto", origin="lower")
            axes.spines[:].set_visible(False)
            axes.tick_params(length=0)
            step = 1 if experts <= _MAX_LABELS else 10
            axes.set_xticks(range(step - 1, table.shape[1], step), table.columns[step - 1 :: step])
            every = -(-len(table) // _MAX_LABELS)
            axes.set_yticks(range(0, len(table), every), table.index[::every])
            for (y, x), fraction in np.ndenumerate(table.to_numpy()):
                if step == 1 and np.isfinite(fraction):
                    colour = "white" if fraction > 0.6 * top else INK
                    style = {"ha": "center", "va": "center", "fontsize": 6.5, "color": colour}
                    axes.text(x, y, f"{100 * fraction:.1f}", **style)
            axes.set(title=selection, xlabel="expert")
            if not column:
                axes.set_ylabel("layer, inside its block" if part["nested"].all() else "layer")
    percent = PercentFormatter(1.0, decimals=0)
    figure.colorbar(shades, ax=grid, format=percent, label="fraction of tokens")
    return figure
