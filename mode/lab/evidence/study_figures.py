"""Pictures of the gap between top-k and causal loss, and of where it comes from."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FormatStrFormatter, NullLocator

from ..plots import COLOURS, INK
from .studies import Closing, Leak


_OTHER = "#882255"


def plot_closing(path: Path, rows: Sequence[Closing]) -> None:
    """A line for each arm and a panel for each budget: from the top-k loss to the causal one."""
    budgets = sorted({row.budget for row in rows})
    most = max(sum(row.budget == budget for row in rows) for budget in budgets)
    figure = Figure(figsize=(5.8 * len(budgets), 1.2 + 0.27 * most), dpi=150, layout="constrained")
    for place, budget in enumerate(budgets):
        axes = figure.add_subplot(1, len(budgets), place + 1)
        here = [row for row in rows if row.budget == budget]
        for height, row in enumerate(reversed(here)):
            colour = COLOURS.get(row.arm, _OTHER)
            axes.plot(
                [row.top_k.mean, row.causal.mean], [height, height], color=colour, linewidth=1.2
            )
            axes.plot(row.top_k.mean, height, "o", color=colour, mfc="white", markersize=5)
            if row.causal.count > 1:
                axes.errorbar(
                    row.causal.mean, height, xerr=row.causal.deviation, color=colour, capsize=2
                )
            axes.plot(row.causal.mean, height, "o", color=colour, markersize=5)
            if row.compute is not None:
                axes.annotate(
                    f"{row.compute.mean:.3f}",
                    (1.01, height),
                    xycoords=("axes fraction", "data"),
                    va="center",
                    fontsize=7,
                    color=INK,
                )
        axes.set_ylim(len(here) - most - 0.6, len(here) - 0.4)
        axes.set_yticks(range(len(here)), [row.arm for row in reversed(here)], fontsize=8)
        axes.set_xlabel("bits per byte: top-k (ring), causal (dot)")
        axes.set_title(f"{budget:.3g} training FLOPs", loc="left", fontsize=10, color=INK)
        axes.annotate(
            "slots / token",
            (1.01, 1.0),
            xycoords="axes fraction",
            fontsize=7,
            color=INK,
            va="bottom",
        )
        axes.grid(axis="x", color="#E2E2E2", linewidth=0.7)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
    figure.savefig(path, format="png")


def plot_leaks(path: Path, rows: Sequence[Leak]) -> None:
    """The gap in per cent against the routing group, and against the layers."""
    figure = Figure(figsize=(9.5, 4.0), dpi=150, layout="constrained")
    titles = {"length": "tokens in a routing group", "depth": "layers, every other one routed"}
    for place, (field, title) in enumerate(titles.items()):
        axes = figure.add_subplot(1, 2, place + 1)
        for arm, marker in (("mod-after", "o"), ("moe-after", "s")):
            here = [row for row in rows if row.arm == arm and row.field == field]
            if not here:
                continue
            colour = COLOURS[arm.removesuffix("-after")]
            axes.errorbar(
                [row.value for row in here],
                [row.share.mean for row in here],
                yerr=[row.share.deviation if row.share.count > 1 else 0.0 for row in here],
                color=colour,
                marker=marker,
                capsize=2,
                label=arm,
            )
        if field == "length":
            axes.set_xscale("log", base=2)
        values = sorted({row.value for row in rows if row.field == field})
        axes.xaxis.set_major_locator(FixedLocator(values))
        axes.xaxis.set_major_formatter(FormatStrFormatter("%d"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.axhline(0, color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
        axes.set_xlabel(title)
        axes.set_ylabel("causal above top-k loss, %")
        axes.grid(color="#E2E2E2", linewidth=0.7)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=9)
    figure.savefig(path, format="png")
