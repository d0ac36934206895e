"""The pictures of an analysis, at the width at which a paper prints them: 3.4 inches, or 7.

Two selections are told apart by place and by colour, from a palette that colour-blind readers can
tell apart; each picture is a PNG and a PDF.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, PercentFormatter

from .files import write_atomically
from .passage import Passage
from .plots import INK, PALE
from .routing_map import draw_routing_map
from .summary import Depth, RouterWeights, Summary, number


_COLUMN, _PAGE = 3.4, 7.0
_MOST_LAYERS = 6  # of histograms; more would not be told apart
_MOST_LABELLED = 12  # experts whose number stands in the picture
_RARE = 0.001  # share of tokens that no bar or dot would show
_FEW = 20  # tokens below which quartiles say nothing
_GREY, _PASSED = "#999999", "#C9C9C6"
_CHOSEN = {"top-k": "#E69F00", "causal": "#0072B2", "as trained": "#0072B2"}
_STYLE: dict[Any, Any] = {
    "font.size": 7.5,
    "axes.titlesize": 8,
    "axes.labelsize": 7.5,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "pdf.fonttype": 42,  # text that can be searched and edited
}


def plot_analysis(
    out: Path,
    summaries: Sequence[Summary],
    passage: Passage,
    taken: Mapping[str, Int[np.ndarray, "layers tokens"]],
) -> list[str]:
    """Draw all that there is to draw of a routed model; the names of the pictures.

    **Arguments:**

    - `out`: the folder to write to.
    - `summaries`: one for each selection.
    - `passage`, `taken`: the text of the routing map, and by selection how many experts of each
        routed layer took each of its tokens.
    """
    unit = unit_of(summaries[0])

    def routing_map() -> Figure:
        return draw_routing_map(passage, taken, summaries[0].layers, unit)

    pictures: dict[str, Callable[[], Figure]] = {
        "routing_map": routing_map,
        "router_weights": lambda: _weights(summaries),
        "depth_used": lambda: _depths(summaries, unit),
        "compute_by_class": lambda: _classes(summaries),
        "compute_and_entropy": lambda: _entropies(summaries, unit),
    }
    if any(len(router.layers[0].shares) > 1 for router in summaries[0].routers):
        pictures["expert_loads"] = lambda: _loads(summaries)
    with rc_context(_STYLE):
        for name, draw in pictures.items():
            figure = draw()
            for kind in ("png", "pdf"):
                write_atomically(
                    out / f"{name}.{kind}",
                    lambda beside, kind=kind, figure=figure: figure.savefig(
                        beside, format=kind, dpi=300
                    ),
                )
    return list(pictures)


def unit_of(summary: Summary) -> str:
    """What a token's compute counts: blocks of Mixture-of-Depths, else experts."""
    return "blocks" if summary.most == len(summary.layers) else "experts"


def _shown(router: RouterWeights) -> list[int]:
    """Layers to draw: all, or some from the lowest to the highest."""
    count = len(router.layers)
    return (
        np.unique(np.linspace(0, count - 1, min(count, _MOST_LAYERS)).round()).astype(int).tolist()
    )


def _weights(summaries: Sequence[Summary]) -> Figure:
    """Histograms of the gate's output: a row for each layer, a column for each selection."""
    rows = [(n, m) for n, router in enumerate(summaries[0].routers) for m in _shown(router)]
    figure = Figure(
        figsize=(_COLUMN if len(summaries) == 1 else 1.5 * _COLUMN, 0.62 * len(rows) + 0.75),
        layout="constrained",
    )
    grid = figure.subplots(len(rows), len(summaries), squeeze=False, sharey="row")
    for row, (n, m) in enumerate(rows):
        for column, summary in enumerate(summaries):
            axes = grid[row, column]
            router = summary.routers[n]
            edges, layer = np.array(router.edges), router.layers[m]
            bins = np.array([layer.passed_bins, layer.taken_bins], np.float64)
            bins /= max(bins.sum(), 1)
            colour = _CHOSEN[summary.name]
            axes.stairs(bins[0], edges, fill=True, color=_PASSED)
            axes.stairs(bins[1], edges, fill=True, color=colour, alpha=0.85)
            axes.set_yticks([])
            axes.spines["left"].set_visible(False)
            axes.margins(y=0.02)
            axes.set_xlim(edges[0], edges[-1])
            last = row + 1 == len(rows) or rows[row + 1][0] != n
            axes.tick_params(labelbottom=last)
            if not row:
                axes.set_title(summary.name, loc="left", color=INK)
            if not column:
                name = f"layer {layer.layer}" + (",\ninside" if router.nested else "")
                axes.set_ylabel(name, rotation=0, ha="right", va="center")
    figure.legend(
        handles=[
            Patch(facecolor=_PASSED, label="passed by"),
            *(Patch(facecolor=_CHOSEN[one.name], label=f"taken, {one.name}") for one in summaries),
        ],
        loc="outside upper left",
        ncols=3,
        handlelength=1,
    )
    figure.supxlabel("router weight, as it multiplies an update", fontsize=7.5)
    figure.supylabel("share of weights", fontsize=7.5)
    return figure


def _depths(summaries: Sequence[Summary], unit: str) -> Figure:
    """Bars of the tokens by compute, and dots where chance would have them."""
    figure = Figure(figsize=(_COLUMN, 2.2), layout="constrained")
    axes = figure.add_subplot()
    last = max(depth.compute for one in summaries for depth in one.depths if _seen(depth))
    width = 0.8 / len(summaries)
    takers = "layers" if unit == "blocks" else "experts"
    for place, summary in enumerate(summaries):
        depths = summary.depths[: last + 1]
        x = np.arange(len(depths)) + (place - (len(summaries) - 1) / 2) * width
        axes.bar(
            x,
            [depth.share for depth in depths],
            0.92 * width,
            color=_CHOSEN[summary.name],
            label=f"{summary.name}, mean {summary.compute:.2f}",
        )
        likely = [depth for depth in depths if depth.chance > _RARE]
        axes.plot(
            [x[depth.compute] for depth in likely],
            [depth.chance for depth in likely],
            "o",
            color=INK,
            markerfacecolor="white",
            markersize=3.2,
            markeredgewidth=0.8,
            linestyle="none",
            clip_on=False,
            label=None if place else f"if {takers} chose independently",
        )
    axes.set_xlabel(_compute_label(summaries[0], unit))
    axes.set_ylabel("share of tokens")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_xlim(-0.6, last + 0.6)
    figure.legend(loc="outside upper left", ncols=2, handlelength=1)
    return figure


def _seen(depth: Depth) -> bool:
    return depth.tokens > 0 or depth.chance > _RARE


def _compute_label(summary: Summary, unit: str) -> str:
    if unit == "blocks":
        return f"routed blocks that computed the token, of {summary.most}"
    layers = len(summary.layers)
    return f"experts that took the token, in {layers} routed layer{'s' if layers > 1 else ''}"


def _classes(summaries: Sequence[Summary]) -> Figure:
    """A class's compute per token against the average token's, with what share it is of both."""
    names = [one.name for one in summaries[0].classes if one.tokens]
    kept = [[one for one in summary.classes if one.tokens] for summary in summaries]
    figure = Figure(figsize=(1.5 * _COLUMN, 0.36 * len(names) + 0.9), layout="constrained")
    shares, ratios = figure.subplots(1, 2, sharey=True, width_ratios=[1.1, 1])
    y = np.arange(len(names))[::-1]
    height = 0.78 / (1 + len(summaries))
    shares.barh(
        y + 0.39 - height / 2,
        [one.token_share for one in kept[0]],
        0.9 * height,
        color=_GREY,
        label="of tokens",
    )
    for place, (summary, classes) in enumerate(zip(summaries, kept, strict=True)):
        at = y + 0.39 - (place + 1.5) * height
        colour = _CHOSEN[summary.name]
        shares.barh(
            at,
            [one.compute_share for one in classes],
            0.9 * height,
            color=colour,
            label=f"of compute, {summary.name}",
        )
        found = np.array([[one.ratio.value, one.ratio.low, one.ratio.high] for one in classes])
        around = np.abs(found[:, 1:] - found[:, :1]).T
        ratios.errorbar(
            found[:, 0],
            at,
            xerr=around,
            fmt="o",
            color=colour,
            markersize=3,
            linewidth=1,
            clip_on=False,
        )
    shares.set_yticks(y, names)
    shares.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    shares.set_xlabel("share")
    ratios.axvline(1, color=_GREY, linewidth=0.7, linestyle=(0, (4, 3)))
    ratios.set_xlim(left=0)
    ratios.set_xlabel("compute per token, average = 1")
    for axes in (shares, ratios):
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
    figure.legend(loc="outside upper left", ncols=3, handlelength=1)
    return figure


def _entropies(summaries: Sequence[Summary], unit: str) -> Figure:
    """The entropy of predictions by compute: median, quartiles and what lies between 5 and 95 % as
    a box where there are enough tokens for it, the mean as a dot."""
    figure = Figure(figsize=(_COLUMN, 2.5), layout="constrained")
    grid = figure.subplots(1, len(summaries), sharex=True, sharey=True, squeeze=False)[0]
    for axes, summary in zip(grid, summaries, strict=True):
        _draw_entropies(axes, summary)
    grid[0].set_ylabel("entropy of the prediction (bits)")
    grid[0].set_ylim(bottom=0)
    label = _compute_label(summaries[0], unit)
    if len(summaries) == 1:
        grid[0].set_xlabel(label)
    else:
        figure.supxlabel(label, fontsize=7.5)
    return figure


def _draw_entropies(axes: Axes, summary: Summary) -> None:
    colour = _CHOSEN[summary.name]
    boxed = [depth for depth in summary.depths if depth.tokens >= _FEW]
    x = np.array([depth.compute for depth in boxed])
    quantiles = np.array([depth.entropy.quantiles for depth in boxed]).reshape(-1, 5)
    low, first, median, third, high = quantiles.T
    axes.vlines(x, low, high, color=colour, linewidth=0.7)
    axes.bar(x, third - first, 0.56, first, color=PALE, edgecolor=colour, linewidth=0.9, zorder=2)
    axes.hlines(median, x - 0.28, x + 0.28, color=colour, linewidth=1.4, zorder=3)
    found = [depth for depth in summary.depths if depth.tokens]
    means = [depth.entropy.mean for depth in found]
    numbers = [depth.compute for depth in found]
    axes.plot(numbers, means, "o", color=INK, markersize=2.8, zorder=4)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    said = "no correlation defined"
    if np.isfinite(summary.pearson.value):
        r, rho = number(summary.pearson.value), number(summary.spearman.value)
        said = f"$r$ = {r}, $\\rho$ = {rho}"
    axes.set_title(f"{summary.name}\n{said}", loc="left", color=INK)


def _loads(summaries: Sequence[Summary]) -> Figure:
    """For each layer the share of its tokens that each expert took."""
    numbers = [n for n, one in enumerate(summaries[0].routers) if len(one.layers[0].shares) > 1]
    count = max(len(summaries[0].routers[n].layers[0].shares) for n in numbers)
    layers = max(len(summaries[0].routers[n].layers) for n in numbers)
    height = (0.2 * min(layers, 24) + 0.5) * len(numbers) + 0.5
    width = _COLUMN if len(summaries) == 1 or count <= 4 else _PAGE
    figure = Figure(figsize=(width, height), layout="constrained")
    grid = figure.subplots(len(numbers), len(summaries), squeeze=False)
    tables = {
        (n, s.name): np.array([layer.shares for layer in s.routers[n].layers])
        for n in numbers
        for s in summaries
    }
    top = max(float(np.nanmax(table, initial=0.0)) for table in tables.values()) or 1.0
    images = []
    for row, n in enumerate(numbers):
        for column, summary in enumerate(summaries):
            axes, table = grid[row, column], tables[n, summary.name]
            images.append(_draw_loads(axes, table, top))
            router = summary.routers[n]
            step = -(-len(router.layers) // _MOST_LABELLED)
            shown = range(0, len(router.layers), step)
            axes.set_yticks(shown, [str(router.layers[place].layer) for place in shown])
            axes.set_title(summary.name, loc="left", color=INK)
            if not column:
                axes.set_ylabel("layer, inside its block" if router.nested else "layer")
            axes.set_xlabel("expert")
    figure.colorbar(images[0], ax=grid, format=PercentFormatter(1.0), label="share of tokens taken")
    return figure


def _draw_loads(axes: Axes, table: np.ndarray, top: float) -> AxesImage:
    image = axes.imshow(table, cmap="Blues", vmin=0, vmax=top, aspect="auto", origin="lower")
    count = table.shape[1]
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    step = 1 if count <= _MOST_LABELLED else 10
    places = range(step - 1, count, step)
    axes.set_xticks(places, [str(place + 1) for place in places])
    if step == 1:
        for (layer, expert), share in np.ndenumerate(table):
            if np.isfinite(share):
                colour = "white" if share > 0.6 * top else INK
                axes.text(
                    expert,
                    layer,
                    f"{100 * share:.1f}",
                    ha="center",
                    va="center",
                    fontsize=6.5,
                    color=colour,
                )
    return image
