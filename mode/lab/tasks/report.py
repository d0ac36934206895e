"""The report of the tasks: accuracy, hit rates by class, and a picture of where the slots went."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from rich.console import Console

from ..console import say
from ..figures import DARK_BLUE, GREY, ORANGE, PAGE, PALE, save_figure
from ..files import write_text
from ..folder import read_settings
from ..intervals import Interval
from ..options import TASK_ARMS, TASK_TEXTS
from ..tables import Format, prose, to_console, to_markdown, write_tables
from .records import TaskResult, TaskSettings, read_results
from .sequences import Task, task_named


_ACCURACIES = ("accuracy, top-k", "accuracy, CAUSAL")
_SHOWN = 4  # sequences of each arm in the picture
# Of a token: neither needed nor with a slot, with a slot only, needed only, both.
_SIGNS, _COLOURS = ".xo#", (PALE, GREY, ORANGE, DARK_BLUE)


def report_tasks(out: Path, console: Console) -> None:
    """Writes `report.md`, its tables as `report.json` and a picture for each task in a folder, and
    prints the tables.

    **Raises:** `ValueError` where it holds no result.
    """
    settings, results = read_settings(out, TaskSettings), read_results(out)
    if not results:
        raise ValueError(f"`out` must hold at least one finished run, got {out}, which has none.")
    parts, tables = [], {}
    for name in TASK_TEXTS:
        own = [result for result in results if result.task == name]
        if not own:
            continue
        own.sort(key=lambda result: list(TASK_ARMS).index(result.arm))
        task = task_named(name, density=settings.density)
        table = tables[name] = hit_table(task, own)
        title = f"{task.name}: {task.about}"
        numbers: dict[str, Format] = dict.fromkeys(table.columns.drop("arm"), ".2f")
        numbers |= dict.fromkeys(_ACCURACIES, _with_error)
        console.print(to_console(table, numbers, title=title, right=numbers))
        text = slots_in_text(task, own)
        say(console, text)
        picture = out / f"{task.name}.png"
        plot_slots(picture, task, own)
        shown = f"![Where the slots went]({picture.name})"
        parts.append(f"## {title}\n\n{to_markdown(table, numbers, right=numbers)}\n\n{shown}")
    write_text(out / "report.md", prose("tasks", tasks="\n\n".join(parts)))
    write_tables(out / "report.json", tables)
    say(console, f"See {out / 'report.md'}.")


def hit_table(task: Task, results: Sequence[TaskResult]) -> pd.DataFrame:
    """Makes a row for each arm: accuracy over the seeds and, of each class, the mean of the
    fraction that got a slot.
    """
    rows = []
    for arm in dict.fromkeys(result.arm for result in results):
        own = [result for result in results if result.arm == arm]
        top_k = Interval.of(result.top_k.accuracy for result in own)
        last = Interval.of(result.last.accuracy for result in own)
        row: dict[str, object] = {"arm": arm, **dict(zip(_ACCURACIES, (top_k, last), strict=True))}
        for name in task.classes:
            hits = [result.last.hits[name] for result in own if result.last.hits]
            marked = f"{name} *" if name in task.needed else name
            row[f"slots: {marked}"] = float(np.mean(hits)) if hits else None
        rows.append(row)
    return pd.DataFrame(rows)


def _with_error(interval: Interval) -> str:
    """The mean and, of several seeds, half of its 95 % interval."""
    if interval.count == 1:
        return f"{interval.mean:.3f}"
    return f"{interval.mean:.3f} ± {interval.high - interval.mean:.3f}"


def _shown(task: Task, results: Sequence[TaskResult]) -> dict[str, np.ndarray]:
    """By arm with slots, a few sequences of the first seed: numbers of `_SIGNS`."""
    first, shown = min(result.seed for result in results), {}
    for result in results:
        if result.seed == first and result.last.hits:
            classes, selected = np.array(result.last.classes), np.array(result.last.selected)
            needed = np.isin(classes, [task.classes.index(name) for name in task.needed])
            shown[result.arm] = (2 * needed + selected)[:_SHOWN]
    return shown


def slots_in_text(task: Task, results: Sequence[TaskResult]) -> str:
    """Writes one sequence for each arm: a sign for each token, what it needs and what it got."""
    shown = _shown(task, results)
    if not shown:
        return ""
    lines = [
        f"{arm:>10}  {''.join(_SIGNS[number] for number in rows[0])}" for arm, rows in shown.items()
    ]
    legend = "# needed, with a slot   o needed, without   x a slot for filler   . filler"
    return "\n".join([*lines, f"{'':>10}  {legend}"])


def plot_slots(path: Path, task: Task, results: Sequence[TaskResult]) -> None:
    """Draws a few sequences for each arm of the first seed: which tokens got a slot."""
    shown = _shown(task, results)
    if not shown:
        return
    text = (
        f"Which tokens got one of the {task.slots} slots in {task.name}: {task.about}. Each row is "
        "a sequence, from left to right.",
        "Blue: needed, with a slot. Orange: needed, without. Grey: a slot for a token that is not "
        f"needed. Needed are: {', '.join(task.needed)}.",
    )

    def draw() -> Figure:
        figure = Figure(figsize=(PAGE, 0.5 * len(shown) + 0.4))
        panels = figure.subplots(len(shown), 1, squeeze=False)[:, 0]
        for axes, (arm, rows) in zip(panels, shown.items(), strict=True):
            colours = ListedColormap(list(_COLOURS))
            axes.pcolormesh(rows, cmap=colours, vmin=0, vmax=3, edgecolors="white")
            axes.set_ylabel(arm, rotation=0, ha="right", va="center")
            axes.set(xticks=[], yticks=[])
        return figure

    save_figure(draw, path, text=text)
