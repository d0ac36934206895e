"""Bars that say how far a run is."""

from collections.abc import Iterator
from contextlib import contextmanager

import rich.progress
from rich.console import Console

from .train import Watch


class Bars:
    """One bar for the arm that is training and, of several, one for all of them."""

    def __init__(self, bars: rich.progress.Progress, count: int):
        self.bars = bars
        self.count = count
        self.done = 0
        self.total = bars.add_task("all arms", total=count, note="", visible=count > 1)

    @contextmanager
    def arm(self, name: str, steps: int) -> Iterator[Watch]:
        """The bar of one arm: yields what its training tells about each look at the loss."""
        bar = self.bars.add_task(name, total=steps, note="compiling")

        def watch(taken: int, loss: float) -> None:
            note = f"step {taken} of {steps}, {loss:.3f} bits per byte"
            self.bars.update(bar, completed=taken, note=note)
            self.bars.update(
                self.total,
                completed=self.done + taken / steps,
                note=f"arm {self.done + 1} of {self.count}",
            )

        yield watch
        self.done += 1
        self.bars.remove_task(bar)


@contextmanager
def progress(console: Console, count: int) -> Iterator[Bars]:
    """Bars for `count` arms, shown while the context lasts and where somebody can see them."""
    bars = rich.progress.Progress(
        rich.progress.TextColumn("{task.description:15}"),
        rich.progress.BarColumn(),
        rich.progress.TextColumn("{task.fields[note]}"),
        rich.progress.TimeRemainingColumn(),
        rich.progress.TextColumn("left"),
        console=console,
        transient=True,
        speed_estimate_period=120,
        # A bar in a log file is noise; the line of each finished arm is printed either way.
        disable=not console.is_terminal,
    )
    with bars:
        yield Bars(bars, count)
