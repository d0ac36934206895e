"""The pictures of an ablation: loss curves, and which tokens of a text each arm selected."""

from collections.abc import Sequence
from pathlib import Path

import equinox as eqx
import jax
import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

from .evaluate import Snippet
from .figures import DARK_BLUE, INK, ORANGE, PAGE, PALE, arm_colour, caption, save_figure
from .observe import name_layers, router_places
from .routing_map import EXPERTS, TextMap, add_legend
from .run import TrainResult


# Of a routed block, by which rule selected the token: the sum of 1 for top-k and 2 for causal.
_AGREEMENT = {"not selected": PALE, "top-k only": ORANGE, "causal only": "#56B4E9"} | {
    "both": DARK_BLUE
}


def plot_curves(path: Path, results: Sequence[TrainResult], about: str) -> None:
    """Draws training losses against the fraction of the FLOPs, and held-out losses at the end.

    **Arguments:**

    - `path`: the picture to write.
    - `about`: the size of the models and their text, for the caption.
    """
    save_figure(lambda: _curves(results, about), path)


def _curves(results: Sequence[TrainResult], about: str) -> Figure:
    change = 1 - max(result.arm.under_rule for result in results)
    figure = Figure(figsize=(PAGE, 3.4))
    axes = figure.add_subplot()
    lows, highs = [], []
    for result in sorted(results, key=lambda result: result.evaluation.bits_causal):
        name, bits = result.arm.name, result.evaluation.bits_causal
        colour = arm_colour(name)
        smooth = _smoothed(np.asarray(result.losses, np.float64))
        spent = np.arange(1, len(smooth) + 1) / len(smooth)
        axes.plot(spent, smooth, color=colour, label=f"{name}  {bits:.3f}")
        axes.plot(1.012, bits, "o", color=colour, clip_on=False)
        lows += [float(smooth.min()), bits]
        highs.append(float(smooth[len(smooth) // 12]))
    if change < 1:
        axes.axvline(change, color=INK, linewidth=0.6, linestyle=(0, (4, 3)))
    span = max(highs) - min(lows)
    axes.set_ylim(min(lows) - 0.05 * span, max(highs) + 0.05 * span)
    axes.set_xlim(0, 1.02)
    axes.set_xlabel("fraction of the training FLOPs, which are equal for all arms")
    axes.set_ylabel("loss (bits per byte)")
    axes.grid(axis="y")
    figure.legend(title="arm, held-out causal loss", loc="outside right upper")
    note = " Dashed line: the causal rule takes over in the arms that end under it."
    caption(
        figure,
        f"Loss at equal training FLOPs. {about}",
        "Lines: training loss, smoothed over a fifteenth of the steps. Dots: held-out loss under "
        f"the causal rule.{note if change < 1 else ''}",
    )
    return figure


def _smoothed(losses: Float[np.ndarray, " steps"]) -> Float[np.ndarray, " steps"]:
    kernel = np.ones(max(1, len(losses) // 15))
    count = np.convolve(np.ones(len(losses)), kernel, mode="same")
    return np.convolve(losses, kernel, mode="same") / count


def plot_selections(path: Path, results: Sequence[TrainResult], about: str) -> None:
    """Draws which tokens of a line of text the routed layers of each arm selected.

    **Arguments:**

    - `path`: the picture to write.
    - `about`: the size of the models and their text, for the caption.
    """
    save_figure(lambda: _selections(results, about), path)


def _selections(results: Sequence[TrainResult], about: str) -> Figure:
    panels = {
        f"{result.arm.name}, routed {name_layers(_routed_layers(result))}": _text_map(snippet)
        for result in results
        if (snippet := result.evaluation.snippet) is not None
    }
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
    caption(
        figure,
        f"Which tokens of a held-out text each routed layer selected. {about}",
        "Strips below the text are the routed layers, the lowest of the model at the bottom.",
    )
    return figure


def _routed_layers(result: TrainResult) -> Sequence[int]:
    arm, size = result.arm, result.settings.options.size
    model = eqx.filter_eval_shape(lambda: arm.build(size, key=jax.random.key(0)))
    return router_places(model)[0].layers


def _text_map(snippet: Snippet) -> TextMap:
    tokens, top_k, causal = map(np.array, (snippet.tokens, snippet.top_k, snippet.causal))
    colours, strips = EXPERTS, np.minimum(causal, len(EXPERTS) - 1)
    if top_k.max(initial=0) <= 1 and causal.max(initial=0) <= 1:
        colours, strips = _AGREEMENT, top_k + 2 * causal
    return TextMap(tokens, strips, list(colours.values()), [PALE] * len(tokens))
