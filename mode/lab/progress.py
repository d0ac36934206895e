"""Progress bars of a run."""

from collections.abc import Iterator
from contextlib import contextmanager

import rich.progress
from rich.console import Console

from .train import Watch


class Bars:
    """One bar for the arm that is training and, of several, one for all of them."""

    def __init__(self, bars: rich.progress.Progress, count: int):
        self.bars = bars
        self.total = bars.add_task("all arms", total=count, note="", visible=count > 1)

    @contextmanager
    def arm(self, name: str, steps: int) -> Iterator[Watch]:
        """Shows the bar of one arm: yields the function that its training calls."""
        bar = self.bars.add_task(name, total=steps, note="compiling")

        def watch(step: int, loss: float) -> None:
            note = f"step {step} of {steps}, {loss:.3f} bits per byte"
            self.bars.update(bar, completed=step, note=note)

        yield watch
        self.bars.advance(self.total)
        self.bars.remove_task(bar)


@contextmanager
def progress(console: Console, count: int) -> Iterator[Bars]:
    """Shows bars for `count` arms while the context lasts, where somebody can see them."""
    bars = rich.progress.Progress(
        rich.progress.TextColumn("{task.description:15}", markup=False),
        rich.progress.BarColumn(),
        rich.progress.TextColumn("{task.fields[note]}", markup=False),
        rich.progress.TimeRemainingColumn(),
        console=console,
        transient=True,
        # A bar in a log file is noise; the line of each finished arm is printed either way.
        disable=not console.is_terminal,
    )
    with bars:
        yield Bars(bars, count)
