"""The routing map: real text, line by line, shaded by its compute, and under each line who took it.

The shade of a character is its compute over all routed layers; the strips below it are these layers
one by one, the lowest of the model at the bottom.
"""

from collections.abc import Mapping
from functools import cache

import numpy as np
from jaxtyping import Int
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm, LinearSegmentedColormap, ListedColormap
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font
from matplotlib.patches import Patch

from .passage import Passage, glyphs, lines_of
from .plots import AGREEMENT, COUNTS, INK, PALE, SYMBOLS


_WIDTH = 56  # bytes in a line
_LINES = 14
_PAGE, _LINE_HEIGHT = 7.0, 0.125  # inches
_FONT, _POINTS = "DejaVu Sans Mono", 6.6
# In heights of a line of text: the strip of a layer, of all layers, and what separates lines.
_STRIP, _STRIPS, _GAP = 0.3, 2.4, 0.4
_SHADES = LinearSegmentedColormap.from_list("compute", [PALE, "#9CC3DA", AGREEMENT[3]])
_SIGN = "#AAAAAA"  # of what stands for a byte that does not print
_LEGEND = {
    "ncols": 7,
    "alignment": "left",
    "handlelength": 1,
    "columnspacing": 1,
    "borderaxespad": 0,
}


def draw_routing_map(
    passage: Passage,
    taken: Mapping[str, Int[np.ndarray, "layers tokens"]],
    layers: tuple[int, ...],
    unit: str,
) -> Figure:
    """One column of text for each selection.

    **Arguments:**

    - `taken`: by selection, how many experts of each routed layer took each token of `passage`.
    - `layers`: the numbers of these layers.
    - `unit`: of compute: `"blocks"` or `"experts"`.
    """
    lines = _lines(passage)
    # One selection alone fills both columns, the first half of the text in the left one.
    half = -(-len(lines) // 2)
    panels = [(name, counts, lines) for name, counts in taken.items()]
    if len(panels) == 1:
        ((name, counts),) = taken.items()
        panels = [(name, counts, lines[:half]), ("", counts, lines[half:])]
    rows = max(len(some) for _, _, some in panels)
    pitch = 1 + min(_STRIP * len(layers), _STRIPS) + _GAP
    # A token can have as much compute as there are blocks; few have many experts.
    blocks = len(layers) if unit == "blocks" else 1
    most = max(blocks, *(int(counts.sum(0).max()) for counts in taken.values()))
    shades = ListedColormap(_SHADES(np.linspace(0, 1, most + 1)))
    norm = BoundaryNorm(np.arange(most + 2) - 0.5, shades.N)
    several = max(int(counts.max()) for counts in taken.values()) > 1
    strips: list[str] = list(COUNTS) if several else [PALE, AGREEMENT[3]]
    size = (_PAGE, _LINE_HEIGHT * pitch * rows + 0.95)
    figure = Figure(figsize=size, layout="constrained")
    columns = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (name, counts, some) in zip(columns, panels, strict=True):
        axes.set_axis_off()
        axes.set_xlim(0, _WIDTH)
        axes.set_ylim(pitch * rows, 0)
        axes.set_title(name, loc="left", color=INK)
        for number, line in enumerate(some):
            _draw_line(axes, passage, counts, line, number * pitch, (shades, norm), strips)
    _explain(figure, (shades, norm), strips, layers, unit)
    return figure


def _lines(passage: Passage) -> list[slice]:
    """Those to show, without blank ones at the end."""
    lines = list(lines_of(passage.tokens, _WIDTH))[:_LINES]
    while len(lines) > 1 and np.isin(passage.tokens[lines[-1]], list(b" \t\r\n")).all():
        lines.pop()
    return lines


def _draw_line(
    axes: Axes,
    passage: Passage,
    counts: Int[np.ndarray, "layers tokens"],
    line: slice,
    top: float,
    shading: tuple[ListedColormap, BoundaryNorm],
    strips: list[str],
) -> None:
    shades, norm = shading
    here = counts[:, line]
    total = here.sum(0)
    x = np.arange(here.shape[1] + 1)
    axes.pcolormesh(x, [top, top + 1], total[None], cmap=shades, norm=norm, rasterized=True)
    bottom = top + 1.06 + min(_STRIP * len(here), _STRIPS)
    axes.pcolormesh(
        x,
        np.linspace(top + 1.06, bottom, len(here) + 1),
        np.minimum(here[::-1], len(strips) - 1),
        cmap=ListedColormap(strips),
        vmin=-0.5,
        vmax=len(strips) - 0.5,
        rasterized=True,
    )
    characters = glyphs(passage.tokens)[line]
    for place, (character, token) in enumerate(zip(characters, passage.tokens[line], strict=True)):
        if not character:
            continue
        # A character of several bytes stands at its first one, on that one's shade.
        sign = SYMBOLS.get(int(token))
        dark = norm(total[place]) > 0.55 * (shades.N - 1)
        axes.text(
            place + 0.5,
            top + 0.5,
            _drawable(character) if sign is None else sign,
            family=_FONT,
            fontsize=_POINTS,
            ha="center",
            va="center_baseline",
            color="white" if dark else INK if sign is None else _SIGN,
        )
    for place in passage.begins():
        if line.start <= place < line.stop:
            axes.vlines(place - line.start, top, bottom, color="#D55E00", linewidth=1)


@cache
def _font() -> FT2Font:
    return FT2Font(font_manager.findfont(_FONT))


def _drawable(character: str) -> str:
    """The character, or a box where the font has none for it."""
    return character if _font().get_char_index(ord(character)) else "\u25a1"


def _explain(
    figure: Figure,
    shading: tuple[ListedColormap, BoundaryNorm],
    strips: list[str],
    layers: tuple[int, ...],
    unit: str,
) -> None:
    shades = shading[0]
    shown = np.unique(np.linspace(0, shades.N - 1, min(shades.N, 7)).round().astype(int))
    figure.legend(
        handles=[Patch(facecolor=shades(int(n)), label=str(n)) for n in shown],
        title=f"shade: {unit} that took the byte",
        loc="outside lower left",
        **_LEGEND,
    )
    names = ["passed by", "taken"] if len(strips) == 2 else ["no expert", "1", "2", "3 or more"]
    every = ", ".join(map(str, layers)) if len(layers) <= 6 else f"{layers[0]} to {layers[-1]}"
    figure.legend(
        handles=[Patch(facecolor=c, label=n) for c, n in zip(strips, names, strict=True)],
        title=f"strips, from the bottom: routed layer{'s' if len(layers) > 1 else ''} {every}",
        loc="outside lower right",
        **_LEGEND,
    )
