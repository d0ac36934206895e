"""The pictures of an ablation: loss curves, and which tokens of a text each arm selected."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from .evaluate import Snippet
from .figures import DARK_BLUE, INK, ORANGE, PAGE, PALE, arm_colour, save_figure
from .observe import name_layers, router_places
from .routing_map import EXPERTS, TextMap, add_legend
from .run import TrainResult


# Of a routed block, by which rule selected the token: the sum of 1 for top-k and 2 for causal.
_AGREEMENT = {"not selected": PALE, "top-k only": ORANGE, "causal only": "#56B4E9"} | {
    "both": DARK_BLUE
}


def plot_curves(path: Path, results: Sequence[TrainResult], about: str) -> None:
    """Draws training losses against the fraction of the FLOPs, and held-out losses at the end.

    `about` says in the caption what the models and their text are.
    """
    change = 1 - max(result.arm.under_rule for result in results)
    note = " Dashed line: the causal rule takes over in the arms that end under it."
    text = (
        f"Loss at equal training FLOPs. {about}",
        "Lines: training loss, smoothed over a fifteenth of the steps. Dots: held-out loss under "
        f"the causal rule.{note if change < 1 else ''}",
    )
    save_figure(lambda: _curves(results, change), path, text=text)


def _curves(results: Sequence[TrainResult], change: float) -> Figure:
    figure = Figure(figsize=(PAGE, 3.4))
    axes = figure.add_subplot()
    lows, highs = [], []
    for result in sorted(results, key=lambda result: result.evaluation.bits_causal):
        name, bits = result.arm.name, result.evaluation.bits_causal
        colour = arm_colour(name)
        losses = np.asarray(result.losses, np.float64)
        kernel = np.ones(max(1, len(losses) // 15))
        count = np.convolve(np.ones(len(losses)), kernel, mode="same")
        smooth = np.convolve(losses, kernel, mode="same") / count
        spent = np.arange(1, len(smooth) + 1) / len(smooth)
        axes.plot(spent, smooth, color=colour, label=f"{name}  {bits:.3f}")
        axes.plot(1.012, bits, "o", color=colour, clip_on=False)
        lows += [float(smooth.min()), bits]
        highs.append(float(smooth[len(smooth) // 12]))
    if change < 1:
        axes.axvline(change, color=INK, linewidth=0.6, linestyle=(0, (4, 3)))
    span = max(highs) - min(lows)
    axes.set_ylim(min(lows) - 0.05 * span, max(highs) + 0.05 * span)
    axes.set(xlim=(0, 1.02), ylabel="loss (bits per byte)")
    axes.set_xlabel("fraction of the training FLOPs, which are equal for all arms")
    axes.grid(axis="y")
    figure.legend(title="arm, held-out causal loss", loc="outside right upper")
    return figure


def plot_selections(path: Path, results: Sequence[TrainResult], about: str) -> None:
    """Draws which tokens of a line of text the routed layers of each arm selected.

    `about` is as `plot_curves` takes it.
    """
    text = (
        f"Which tokens of a held-out text each routed layer selected. {about}",
        "Strips below the text are the routed layers, the lowest of the model at the bottom.",
    )
    save_figure(lambda: _selections(results), path, text=text)


def _selections(results: Sequence[TrainResult]) -> Figure:
    panels = {}
    for result in results:
        if result.evaluation.snippet is not None:
            model = result.arm.shapes(result.settings.options.size)
            title = f"{result.arm.name}, routed {name_layers(router_places(model)[0].layers)}"
            panels[title] = _text_map(result.evaluation.snippet)
    heights = [panel.pitch + 2.2 for panel in panels.values()]
    figure = Figure(figsize=(PAGE, 0.125 * sum(heights) + 0.45))
    grid = figure.subplots(len(panels), squeeze=False, height_ratios=heights)[:, 0]
    width = max(len(panel.tokens) for panel in panels.values())
    for axes, (name, panel) in zip(grid, panels.items(), strict=True):
        panel.draw(axes, [slice(0, len(panel.tokens))], width)
        axes.set_ylim(panel.pitch, 0)
        axes.set_title(name)
    add_legend(figure, _AGREEMENT, "routed blocks: selected by")
    add_legend(figure, EXPERTS, "experts that selected, causal rule", right=True)
    return figure


def _text_map(snippet: Snippet) -> TextMap:
    tokens, top_k, causal = map(np.array, (snippet.tokens, snippet.top_k, snippet.causal))
    colours, strips = EXPERTS, np.minimum(causal, len(EXPERTS) - 1)
    if top_k.max(initial=0) <= 1 and causal.max(initial=0) <= 1:
        colours, strips = _AGREEMENT, top_k + 2 * causal
    return TextMap(tokens, strips, list(colours.values()), [PALE] * len(tokens))
