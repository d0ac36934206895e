"""The style, the colours and the files of all pictures of `mode-lab`."""

import io
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure

from .files import write_bytes


STYLE = Path(__file__).with_name("lab.mplstyle")
COLUMN, PAGE = 3.4, 7.0  # inches: the width of a paper's column and of its page

# Captions: their size, letters in an inch, and the height of a line in inches.
_POINTS, _LETTERS, _LINE = 6.5, 20, 0.115

# Okabe and Ito's palette, which colour-blind readers can tell apart.
ARM_COLOURS = {
    "dense": "#000000",
    "left-out": "#BBBBBB",
    "mod": "#0072B2",
    "mod-predictor": "#56B4E9",
    "mod-random": "#999999",
    "moe": "#D55E00",
    "moe-reduced": "#E69F00",
    "mode-staged": "#009E73",
    "mode-integrated": "#CC79A7",
}
OTHER_ARM = "#882255"
INK, GREY, PALE = "#333333", "#999999", "#F0F0EE"
BLUE, ORANGE, DARK_BLUE, VERMILION = "#0072B2", "#E69F00", "#00507D", "#D55E00"


def arm_colour(name: str) -> str:
    """Returns the colour of an arm, and one colour for every arm that has none of its own."""
    return ARM_COLOURS.get(name, OTHER_ARM)


def save_figure(draw: Callable[[], Figure], *paths: Path, text: Sequence[str] = ()) -> None:
    """Draws a figure in the style of the lab, adds the paragraphs of a caption, and writes files.

    The style holds while `draw` runs. The suffix of a path says its format, `.png` or `.pdf`.
    """
    # The file holds every setting that we rely on; those of the user's matplotlibrc do not apply.
    with rc_context(fname=STYLE):
        figure = draw()
        if text:
            caption(figure, *text)
        for path in paths:
            content = io.BytesIO()
            figure.savefig(content, format=path.suffix[1:])
            write_bytes(path, content.getvalue())


def caption(figure: Figure, *paragraphs: str) -> None:
    """Writes under a figure what it is of and how to read it, and makes the figure higher for it.

    Each paragraph begins on a new line and is wrapped to the width of the figure.
    """
    width, height = figure.get_size_inches()
    columns = int(width * _LETTERS)
    lines = [line for text in paragraphs for line in textwrap.wrap(text, columns)]
    figure.set_size_inches(width, height + _LINE * len(lines) + 0.05)
    figure.supxlabel("\n".join(lines), x=0.01, ha="left", fontsize=_POINTS)
