"""Loss curves, and routing maps: which tokens each routed layer took, over the text itself."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from .data import DOCUMENT_START
from .store import ArmResult


# Okabe and Ito's palette, which colour-blind readers can tell apart.
COLOURS = {
    "dense": "#000000",
    "mod": "#0072B2",
    "mod-predictor": "#56B4E9",
    "mod-random": "#999999",
    "moe": "#D55E00",
    "moe-reduced": "#E69F00",
    "mode-staged": "#009E73",
    "mode-integrated": "#CC79A7",
}
INK, PALE = "#333333", "#F0F0EE"
# Neither, top-k alone, causal alone, both.
AGREEMENT = (PALE, "#E69F00", "#56B4E9", "#00507D")
# Experts that took a token: none, one, two, three or more.
COUNTS = (PALE, "#BFDCCB", "#5FB08A", "#00694A")
# Of a generated text: bytes in a line, and lines shown.
_WIDTH, _LINES = 80, 12
SYMBOLS = {ord(" "): "\u00b7", ord("\n"): "\u21b5", ord("\t"): "\u2192", DOCUMENT_START: "\u25b6"}


def plot_curves(path: Path, results: Sequence[ArmResult], change: float) -> None:
    """Training loss against the share of the FLOPs spent, held-out causal loss at the end.

    **Arguments:**

    - `path`: the PNG to write.
    - `change`: share of training after which the causal rule takes over.
    """
    figure = Figure(figsize=(11.5, 5.6), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    lows, highs = [], []
    for result in sorted(results, key=lambda result: result.bits_causal):
        colour = COLOURS[result.name]
        smooth = _smoothed(np.asarray(result.losses, np.float64))
        spent = np.arange(1, len(smooth) + 1) / len(smooth)
        label = f"{result.name}  {result.bits_causal:.3f}"
        axes.plot(spent, smooth, color=colour, linewidth=1.6, label=label)
        axes.plot(1.012, result.bits_causal, "o", color=colour, markersize=5, clip_on=False)
        lows += [float(smooth.min()), result.bits_causal]
        highs.append(float(smooth[len(smooth) // 12]))
    if change < 1:
        axes.axvline(change, color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
        axes.annotate(
            "causal rule takes over ",
            (change, 0.985),
            xycoords=("data", "axes fraction"),
            ha="right",
            va="top",
            fontsize=8,
            color=INK,
        )
    span = max(highs) - min(lows)
    axes.set_ylim(min(lows) - 0.05 * span, max(highs) + 0.05 * span)
    axes.set_xlim(0, 1.02)
    axes.set_xlabel("share of the training FLOPs spent (equal for all arms)")
    axes.set_ylabel("training loss, bits per byte, smoothed")
    axes.set_title("Loss at equal training FLOPs", loc="left", color=INK)
    axes.grid(axis="y", color="#E2E2E2", linewidth=0.7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(
        frameon=False,
        fontsize=9,
        title="arm, held-out causal (dot)",
        loc="upper left",
        bbox_to_anchor=(1.03, 1.0),
    )
    figure.savefig(path, format="png")


def _smoothed(losses: Float[np.ndarray, " steps"]) -> Float[np.ndarray, " steps"]:
    """The mean of a fifteenth of the steps around each."""
    width = max(1, len(losses) // 15)
    kernel = np.ones(width)
    total = np.convolve(losses, kernel, mode="same")
    return total / np.convolve(np.ones(len(losses)), kernel, mode="same")


def plot_routing(path: Path, maps: Mapping[str, Mapping[str, np.ndarray]]) -> None:
    """One panel per arm, token by routed layer, the text under each.

    **Arguments:**

    - `path`: the PNG to write.
    - `maps`: by arm: `tokens`, and how many experts took each under `top_k` and `causal`.
    """
    heights = [sample["top_k"].shape[0] + 2.2 for sample in maps.values()]
    tokens = max(len(sample["tokens"]) for sample in maps.values())
    figure = Figure(
        figsize=(0.165 * tokens + 1.6, 0.2 * sum(heights) + 1.3), dpi=150, layout="constrained"
    )
    grid = figure.add_gridspec(len(maps), 1, height_ratios=heights)
    for place, (name, sample) in enumerate(maps.items()):
        axes = figure.add_subplot(grid[place])
        if name.startswith(("mod", "mode-staged")) and sample["top_k"].max() <= 1:
            code = (sample["top_k"] > 0) + 2 * (sample["causal"] > 0)
            _draw_map(axes, code, sample["tokens"], AGREEMENT, name)
        else:
            _draw_map(axes, np.minimum(sample["causal"], 3), sample["tokens"], COUNTS, name)
    figure.suptitle(
        "Which tokens of a held-out text each routed layer took", x=0.01, ha="left", color=INK
    )
    depth = ["passed by", "top-k alone", "causal rule alone", "both"]
    experts = ["experts, causal: none", "1", "2", "3 or more"]
    figure.legend(
        handles=[Patch(facecolor=c, label=label) for c, label in zip(AGREEMENT, depth, strict=True)]
        + [Patch(facecolor=c, label=label) for c, label in zip(COUNTS, experts, strict=True)],
        loc="outside lower left",
        ncols=8,
        frameon=False,
        fontsize=9,
    )
    figure.savefig(path, format="png")


def plot_generated(
    path: Path,
    tokens: Int[np.ndarray, " tokens"],
    counts: Int[np.ndarray, "layers tokens"],
    prompt: int,
) -> None:
    """A text line by line, and over it which of its bytes each routed layer computed.

    **Arguments:**

    - `path`: the PNG to write.
    - `counts`: how many of a router's choices computed each token.
    - `prompt`: how many of the tokens were given.
    """
    experts = counts.max() > 1
    colours = COUNTS if experts else (PALE, AGREEMENT[3])
    starts = range(0, min(len(tokens), _LINES * _WIDTH), _WIDTH)
    width = min(len(tokens), _WIDTH)
    height = 0.2 * (len(counts) + 2.2) * len(starts)
    figure = Figure(figsize=(0.165 * width + 1.6, height + 0.9), dpi=150, layout="constrained")
    for place, start in enumerate(starts):
        axes = figure.add_subplot(len(starts), 1, place + 1)
        part = slice(start, start + _WIDTH)
        given = f"from byte {start}" + (f", the first {prompt} given" if start < prompt else "")
        _draw_map(axes, np.minimum(counts[:, part], 3), tokens[part], colours, given)
        axes.set_xlim(0, width)
    labels = ["no expert", "1", "2", "3 or more"] if experts else ["passed by", "computed"]
    figure.legend(
        handles=[Patch(facecolor=c, label=label) for c, label in zip(colours, labels, strict=True)],
        loc="outside lower left",
        ncols=4,
        frameon=False,
        fontsize=9,
    )
    figure.savefig(path, format="png")


def _draw_map(
    axes: Axes,
    code: Int[np.ndarray, "layers tokens"],
    tokens: Int[np.ndarray, " tokens"],
    colours: Sequence[str],
    name: str,
) -> None:
    layers, count = code.shape
    bounds = np.arange(len(colours) + 1) - 0.5
    axes.pcolormesh(
        code,
        cmap=ListedColormap(list(colours)),
        norm=BoundaryNorm(bounds, len(colours)),
        edgecolors="white",
        linewidth=1.2,
    )
    # Every other layer is routed, from the second on; the lowest layer stands next to the text.
    axes.set_yticks(np.arange(layers) + 0.5, [f"layer {2 * n + 2}" for n in range(layers)])
    axes.set_xticks(np.arange(count) + 0.5, [_symbol(int(token)) for token in tokens])
    for label, token in zip(axes.get_xticklabels(), tokens, strict=True):
        label.set_fontfamily("monospace")
        label.set_fontsize(11)
        label.set_color("#AAAAAA" if int(token) in SYMBOLS else INK)
    axes.tick_params(length=0, pad=2)
    axes.tick_params(axis="y", labelsize=8, labelcolor="#777777")
    axes.spines[:].set_visible(False)
    axes.set_title(name, loc="left", fontsize=10, fontweight="bold", color=INK, pad=3)


def _symbol(token: int) -> str:
    """A visible sign for any token: those that print stand for themselves."""
    if token in SYMBOLS:
        return SYMBOLS[token]
    return chr(token) if 32 < token < 127 else "\u25a1"
