"""The paper's figure 4: loss against size, and against the cost of a forward pass, per budget."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

from ..plots import COLOURS, INK
from .fit import Curve


_MARKERS = "osD^v"
_MISSING = "#882255"


def plot_curves(path: Path, curves: Sequence[Curve]) -> None:
    """Every run a point, every arm and budget a parabola; the optimum, where it is bracketed."""
    figure = Figure(figsize=(11.5, 5.2), dpi=150, layout="constrained")
    sizes, costs = figure.subplots(1, 2)
    budgets = sorted({curve.budget for curve in curves})
    for curve in curves:
        style = budgets.index(curve.budget)
        _against_parameters(sizes, curve, style)
        base = _dense(curves, curve.budget)
        if base is not None:
            _against_cost(costs, curve, base, style)
    sizes.set_xscale("log")
    sizes.set_xlabel("parameters")
    sizes.set_ylabel("held-out loss, causal, bits per byte")
    sizes.set_title("Equal training FLOPs, different sizes", loc="left", color=INK)
    costs.axhline(1, color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
    costs.axvline(1, color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
    costs.set_xscale("log")
    costs.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    costs.xaxis.set_major_formatter(FormatStrFormatter("%g"))
    costs.xaxis.set_minor_formatter(NullFormatter())
    costs.set_xlabel("FLOPs of a forward pass, relative to the dense optimum's")
    costs.set_ylabel("loss, relative to the dense optimum's")
    costs.set_title("Cost of a forward pass", loc="left", color=INK)
    if not costs.lines[2:]:
        costs.annotate(
            "no dense optimum is bracketed",
            (0.5, 0.5),
            xycoords="axes fraction",
            ha="center",
            color=INK,
        )
    for axes in (sizes, costs):
        axes.grid(color="#E2E2E2", linewidth=0.7)
        axes.spines[["top", "right"]].set_visible(False)
    _legend(figure, curves, budgets)
    figure.savefig(path, format="png")


def _colour(arm: str) -> str:
    return COLOURS.get(arm, _MISSING)


def _dense(curves: Sequence[Curve], budget: float) -> Curve | None:
    found = [one for one in curves if one.arm == "dense" and one.budget == budget and one.lowest]
    return found[0] if found else None


def _against_parameters(axes: Axes, curve: Curve, style: int) -> None:
    colour = _colour(curve.arm)
    points = [(record.parameters, record.end.bits_causal) for record in curve.records]
    axes.plot(
        *np.transpose(points),
        _marker(style),
        color=colour,
        markersize=3.5,
        alpha=0.55,
        markeredgewidth=0,
    )
    line = np.geomspace(curve.fit.smallest, curve.fit.largest, 200)
    axes.plot(line, [curve.fit.at(x) for x in line], color=colour, linewidth=1.5)
    if curve.fit.lowest is not None and curve.lowest is not None:
        axes.plot(curve.fit.lowest, curve.lowest, "*", color=colour, markersize=11)


def _against_cost(axes: Axes, curve: Curve, base: Curve, style: int) -> None:
    assert base.fit.lowest is not None
    assert base.lowest is not None
    cost = base.forward_flops(base.fit.lowest)
    line = np.geomspace(curve.fit.smallest, curve.fit.largest, 200)
    xs = [curve.forward_flops(x) / cost for x in line]
    axes.plot(xs, [curve.fit.at(x) / base.lowest for x in line], color=_colour(curve.arm), lw=1.5)
    means: dict[float, list[float]] = {}
    for record in curve.records:
        means.setdefault(record.forward_flops / cost, []).append(record.end.bits_causal)
    axes.plot(
        list(means),
        [np.mean(losses) / base.lowest for losses in means.values()],
        _marker(style),
        color=_colour(curve.arm),
        markersize=4.5,
    )


def _legend(figure: Figure, curves: Sequence[Curve], budgets: Sequence[float]) -> None:
    arms = dict.fromkeys(curve.arm for curve in curves)
    handles = [Line2D([], [], color=_colour(arm), label=arm) for arm in arms]
    kinds = {f"{budget:.3g} FLOPs": _marker(place) for place, budget in enumerate(budgets)}
    kinds["optimum, where bracketed"] = "*"
    handles += [
        Line2D([], [], color=INK, marker=marker, linestyle="none", label=label)
        for label, marker in kinds.items()
    ]
    figure.legend(
        handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=9
    )


def _marker(style: int) -> str:
    return _MARKERS[style % len(_MARKERS)]
