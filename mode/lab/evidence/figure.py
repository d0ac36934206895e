"""The paper's figure 4: loss against size, and against the cost of a forward pass, per budget."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

from ..figures import INK, PAGE, arm_colour, save_figure
from .curves import Curve


_MARKERS = "osD^v"
_CAPTION = (
    "A point is a run (left) or a mean over seeds (right); a line is the parabola fitted to an arm "
    "and budget, dashed for random selection; a star is its optimum, where it lies between the "
    "sizes that were run.",
    "Right: relative to the dense optimum of the same budget, which lies where the dotted lines "
    "cross. Budgets without one are left out.",
)


def plot_curves(path: Path, curves: Sequence[Curve], about: str) -> None:
    """Draws every run as a point, and every arm and budget as a parabola.

    `about`, what the models and their text are, begins the caption.
    """
    save_figure(lambda: _draw(curves), path, text=(about, *_CAPTION))


def _line(arm: str) -> Literal["-", "--"]:
    """Dashed for random selection, so that it can be told in grey."""
    return "--" if "random" in arm else "-"


def _draw(curves: Sequence[Curve]) -> Figure:
    figure = Figure(figsize=(PAGE, 3.2))
    left, right = figure.subplots(1, 2)
    budgets = sorted({curve.budget for curve in curves})
    markers = {budget: _MARKERS[n % len(_MARKERS)] for n, budget in enumerate(budgets)}
    dense = {curve.budget: curve.fit for curve in curves if curve.arm == "dense"}
    for curve in curves:
        colour, marker, fit = arm_colour(curve.arm), markers[curve.budget], curve.fit
        points = {"color": colour, "marker": marker, "linestyle": "none"}
        sizes = fit.sizes(200)
        losses = [fit.at(size) for size in sizes]
        left.plot("parameters", "causal", data=curve.runs, **points, alpha=0.55, mew=0, ms=2.5)
        line = _line(curve.arm)
        left.plot(sizes, losses, line, color=colour)
        left.plot(fit.optimum, fit.lowest, "*", color=colour, markersize=8)
        base = dense.get(curve.budget)
        if base is not None:
            flops, loss = base.forward_flops(base.optimum), base.lowest
            costs = [fit.forward_flops(size) / flops for size in sizes]
            right.plot(costs, [one / loss for one in losses], line, color=colour)
            means = curve.runs.groupby("forward_flops")["causal"].mean()
            right.plot(means.index.to_numpy() / flops, means / loss, **points)
    left.set(title="Loss against size", xscale="log", xlabel="parameters")
    left.set_ylabel("held-out loss, causal, bits per byte")
    left.grid()
    right.axhline(1, color=INK, linewidth=0.6, linestyle=":")
    right.axvline(1, color=INK, linewidth=0.6, linestyle=":")
    right.set(title="Loss against the cost of a forward pass", xscale="log")
    right.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    right.xaxis.set_major_formatter(FormatStrFormatter("%g"))
    right.xaxis.set_minor_formatter(NullFormatter())
    right.set_xlabel("FLOPs of a forward pass / the dense optimum's")
    right.set_ylabel("loss / the dense optimum's")
    right.grid()
    arms = dict.fromkeys(curve.arm for curve in curves)
    handles = [
        Line2D([], [], color=arm_colour(arm), linestyle=_line(arm), label=arm) for arm in arms
    ] + [
        Line2D([], [], color=INK, marker=marker, linestyle="none", label=f"{budget:.3g} FLOPs")
        for budget, marker in markers.items()
    ]
    figure.legend(handles=handles, loc="outside upper left", ncols=7)
    return figure
