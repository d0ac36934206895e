"""Routing maps: real text, line by line, and under each line which routed layers computed it.

The shade of a character is its compute over all routed layers. The strips below it are these layers
one by one, the lowest of the model at the bottom.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import numpy as np
from jaxtyping import Int
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_hex, to_rgb, to_rgba_array
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from .data import DOCUMENT_START
from .figures import DARK_BLUE, INK, PAGE, PALE, VERMILION, save_figure
from .observe import name_layers
from .passage import glyphs, lines_of


# Colours of strips: two values of one expert, or how many of several experts.
ONE_EXPERT = {"not selected": PALE, "selected": DARK_BLUE}
EXPERTS = {"no expert": PALE, "1": "#BFDCCB", "2": "#5FB08A", "3 or more": "#00694A"}

_WIDTH = 56  # bytes in a line
_GENERATED_LINES = 40
_FONT, _POINTS = "DejaVu Sans Mono", 6.6
# A line of text in inches; in lines: the strip of a layer, all strips, the gap to the next line.
_LINE, _STRIP, _STRIPS, _GAP = 0.125, 0.3, 2.4, 0.4
_SHADES = LinearSegmentedColormap.from_list("compute", [PALE, "#9CC3DA", DARK_BLUE])
# Signs for bytes that do not print, in a colour of their own.
_SYMBOLS = {ord(" "): "\u00b7", ord("\n"): "\u21b5", ord("\t"): "\u2192", DOCUMENT_START: "\u25b6"}
_SYMBOL_COLOUR = "#AAAAAA"


@dataclasses.dataclass(frozen=True)
class TextMap:
    """A text of bytes and document starts, and the colours under it.

    `strips` number a colour in `colours` for each layer and token; `shades` are the colours of the
    tokens' backgrounds; an orange line stands before each token in `marks`.
    """

    tokens: Int[np.ndarray, " tokens"]
    strips: Int[np.ndarray, "layers tokens"]
    colours: Sequence[str]
    shades: list[str]
    marks: Sequence[int] = ()

    @property
    def pitch(self) -> float:
        """The height of a line of text with its strips and the gap below."""
        return 1 + min(_STRIP * len(self.strips), _STRIPS) + _GAP

    def draw(self, axes: Axes, lines: Sequence[slice], width: int) -> None:
        """Draws some lines of the text, `width` bytes at most in each."""
        axes.set_axis_off()
        axes.set_xlim(0, width)
        for number, line in enumerate(lines):
            self._draw_line(axes, line, number * self.pitch)

    def _draw_line(self, axes: Axes, line: slice, top: float) -> None:
        x = np.arange(line.stop - line.start + 1)
        shades = to_rgba_array(self.shades[line])
        axes.pcolormesh(x, [top, top + 1], shades[None], rasterized=True)
        bottom = top + self.pitch - _GAP + 0.06
        edges = np.linspace(top + 1.06, bottom, len(self.strips) + 1)
        colours = to_rgba_array(list(self.colours))[self.strips[::-1, line]]
        axes.pcolormesh(x, edges, colours, rasterized=True)
        font = {"family": _FONT, "fontsize": _POINTS, "ha": "center", "va": "center_baseline"}
        for token, character in enumerate(glyphs(self.tokens)[line], line.start):
            symbol = _SYMBOLS.get(int(self.tokens[token]))
            colour = INK if symbol is None else _SYMBOL_COLOUR
            colour = "white" if _is_dark(self.shades[token]) else colour
            # A character of several bytes stands at its first one, on the shade of that byte.
            place = (token - line.start + 0.5, top + 0.5)
            axes.text(*place, symbol or _drawable(character), color=colour, **font)
        for mark in self.marks:
            if line.start <= mark < line.stop:
                axes.vlines(mark - line.start, top, bottom, color=VERMILION, linewidth=1)


@dataclasses.dataclass(frozen=True)
class RoutingMap:
    """A text that begins in the file `document`, and the routed layers that computed it.

    `tokens` and `marks` are those of a `TextMap`, `layers` the numbers of the routed layers. By
    selection, `counts` are how many experts of each of these layers selected each token.
    """

    document: str
    tokens: tuple[int, ...]
    marks: tuple[int, ...]
    layers: tuple[int, ...]
    counts: dict[str, tuple[tuple[int, ...], ...]]

    def draw(self, unit: str, most_lines: int = 14) -> Figure:
        """Draws at most `most_lines` lines in one column for each selection, or two for a single.

        `unit` is that of compute, `"blocks"` or `"experts"`.
        """
        tokens, lines = np.array(self.tokens), self.lines(most_lines)
        counts = np.array(list(self.counts.values()))
        # A token can have as much compute as there are blocks; few have many experts.
        most = max(len(self.layers) if unit == "blocks" else 1, int(counts.sum(1).max()))
        shades = [to_hex(_SHADES(step)) for step in np.linspace(0, 1, most + 1)]
        strips = EXPERTS if counts.max() > 1 else ONE_EXPERT
        texts = []
        for count in counts:
            shade = [shades[total] for total in count.sum(0)]
            strip = np.minimum(count, len(strips) - 1)
            texts.append(TextMap(tokens, strip, list(strips.values()), shade, self.marks))
        panels = [(name, text, lines) for name, text in zip(self.counts, texts, strict=True)]
        if len(panels) == 1:
            half = -(-len(lines) // 2)
            panels = [(*self.counts, *texts, lines[:half]), ("", *texts, lines[half:])]
        height = texts[0].pitch * max(len(part) for _, _, part in panels)
        figure = Figure(figsize=(PAGE, _LINE * height + 0.95))
        columns = figure.subplots(1, len(panels), squeeze=False)[0]
        for axes, (name, text, part) in zip(columns, panels, strict=True):
            text.draw(axes, part, _WIDTH)
            axes.set(ylim=(height, 0), title=name)
        steps = np.unique(np.linspace(0, most, min(most + 1, 7)).round().astype(int))
        legend = {str(step): shades[step] for step in steps}
        add_legend(figure, legend, f"shade: {unit} that computed the byte")
        title = f"strips, from the bottom: routed {name_layers(self.layers)}"
        add_legend(figure, strips, title, right=True)
        return figure

    def lines(self, most: int) -> list[slice]:
        """Cuts the text into lines, without blank ones at the end."""
        tokens = np.array(self.tokens)
        lines = list(lines_of(tokens, _WIDTH))[:most]
        while len(lines) > 1 and np.isin(tokens[lines[-1]], list(b" \t\r\n")).all():
            lines.pop()
        return lines


def plot_generated(
    path: Path,
    tokens: Int[np.ndarray, " tokens"],
    counts: Int[np.ndarray, "layers tokens"],
    prompt: int,
    layers: Sequence[int],
    about: str,
) -> None:
    """Draws which bytes of a generated text each routed layer computed, and writes the picture.

    `counts` are how many experts of each of the routed `layers` selected each token; the first
    `prompt` tokens were given. `about`, the model and how it was sampled, begins the caption.
    """
    count = {"": tuple(map(tuple, counts.tolist()))}
    text = RoutingMap("", tuple(tokens.tolist()), (prompt,), tuple(layers), count)
    notes = [about]
    if prompt > 1:  # beside the start of the document
        notes += ["Orange line: the prompt ends there, and what follows is generated."]
    shown = text.lines(_GENERATED_LINES)[-1].stop
    if shown < len(tokens):
        notes += [f"The first {shown} of {len(tokens)} bytes are shown."]
    unit = "experts" if counts.max() > 1 else "blocks"
    save_figure(lambda: text.draw(unit, _GENERATED_LINES), path, text=[" ".join(notes)])


def add_legend(
    figure: Figure, colours: Mapping[str, str], title: str | None = None, *, right: bool = False
) -> None:
    """Adds a row of colours above a figure, at its left or its right."""
    figure.legend(
        handles=[Patch(facecolor=colour, label=label) for label, colour in colours.items()],
        title=title,
        loc="outside upper right" if right else "outside upper left",
        ncols=len(colours),
        alignment="left",
        columnspacing=1,
        borderaxespad=0,
    )


def _is_dark(colour: str) -> bool:
    return float(np.dot(to_rgb(colour), (0.3, 0.59, 0.11))) < 0.55


@cache
def _drawable(character: str) -> str:
    """Returns the character, or a box where the font has none for it."""
    font = font_manager.get_font(font_manager.findfont(_FONT))
    has = not character or font.get_char_index(ord(character))
    return character if has else "\u25a1"
