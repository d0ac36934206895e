"""Tables of reports: one data frame, written as Markdown and as JSON, or shown in a console."""

import dataclasses
import math
import re
import textwrap
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import pydantic
import rich.box
from rich.table import Table
from rich.text import Text

from .files import Record, write_record


# A format specification such as ".3f", or a function of one value; for columns by name.
Format = str | Callable[[Any], str]
Formats = Mapping[str, Format]
DASH = "-"  # in place of a value that is missing or undefined


def escape(text: str) -> str:
    r"""Makes text stand for itself in Markdown, on one line.

    >>> escape("a|b [x](y) *z*")
    'a\\|b \\[x\\](y) \\*z\\*'
    """
    return re.sub(r"([\\`*_\[\]<>|~&])", r"\\\1", " ".join(text.split()))


def format_cells(frame: pd.DataFrame, formats: Formats | None = None) -> pd.DataFrame:
    """Formats every cell of a frame as text, by default by `str`; `None` and NaN become a dash."""
    columns = {}
    for name in frame.columns:
        show = (formats or {}).get(name, str)
        show = show if callable(show) else ("{:" + show + "}").format
        # `None` is missing, and so is what does not equal itself.
        columns[name] = [DASH if x is None or x != x else show(x) for x in frame[name]]
    # Of objects: a column of strings alone would be of another dtype in newer versions of pandas.
    return pd.DataFrame(columns, columns=frame.columns, dtype=object)


def to_markdown(
    frame: pd.DataFrame,
    formats: Formats | None = None,
    *,
    bold: Collection[int] = (),
    right: Collection[str] = (),
) -> str:
    """Writes a frame as a table in Markdown, its text escaped, without its index.

    Rows `bold`, by position, are bold. Columns of text are aligned to the left, but for those in
    `right`; others are aligned to the right.
    """
    cells = format_cells(frame, formats).map(escape)
    for row in bold:
        cells.iloc[row] = [f"**{cell}**" for cell in cells.iloc[row]]
    cells.columns = [escape(str(name)) for name in frame.columns]
    sides = [_side(frame, name, right) for name in frame.columns]
    return cells.to_markdown(index=False, colalign=sides, disable_numparse=True)


def to_console(
    frame: pd.DataFrame,
    formats: Formats | None = None,
    *,
    title: str | None = None,
    bold: Collection[int] = (),
    right: Collection[str] = (),
) -> Table:
    """Makes a table for a console, by the arguments of `to_markdown`. Text is never markup."""
    table = Table(title=title and Text(title), title_justify="left", box=rich.box.SIMPLE)
    shown = format_cells(frame, formats)
    for place, name in enumerate(frame.columns):
        # Headings break between words, as narrow as the cells: a wide table is not cut off.
        words = str(name).split()
        longest = max(map(len, (*words, *shown[name], " " * 8)))
        table.add_column(
            Text(textwrap.fill(str(name), longest, break_long_words=False)),
            justify=_side(frame, name, right),
            vertical="bottom",
            no_wrap=not place,
            overflow="fold",
            min_width=max(map(len, words), default=0),
        )
    for row, cells in enumerate(shown.itertuples(index=False)):
        table.add_row(*map(Text, cells), style="bold" if row in bold else None)
    return table


class Tables(Record):
    """`report.json`: the tables of the `report.md` beside it, each by its columns.

    Numbers are not rounded. `null` is missing, undefined or infinite.
    """

    format = "mode-lab tables"
    version = 1

    tables: dict[str, dict[str, tuple[pydantic.JsonValue, ...]]]


def write_tables(path: Path, frames: Mapping[str, pd.DataFrame]) -> None:
    """Writes frames as JSON, each under its name and without its index.

    A cell may be a number of several parts, such as an `Interval` or one for each router.
    """
    tables = {
        name: {str(column): tuple(map(_plain, frame[column])) for column in frame}
        for name, frame in frames.items()
    }
    write_record(path, Tables(tables=tables))


def _plain(value: Any) -> Any:
    """A value as JSON has it."""
    if isinstance(value, np.generic):
        value = value.item()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {name: _plain(part) for name, part in dataclasses.asdict(value).items()}
    if isinstance(value, tuple | list):
        return [_plain(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _side(frame: pd.DataFrame, name: str, right: Collection[str]) -> Literal["left", "right"]:
    is_text = any(isinstance(value, str) for value in frame[name])
    return "left" if is_text and name not in right else "right"


def prose(name: str, **values: object) -> str:
    """The text of `texts/NAME.md`, with the values in place of the names in braces."""
    path = Path(__file__).parent / "texts" / f"{name}.md"
    return path.read_text(encoding="utf-8").format(**values)
