"""What `mode-lab` prints: text as it is, in any encoding, and progress bars."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import rich.progress
from rich.console import Console
from rich.text import Text


# Told the steps done and the latest loss, in bits per byte.
Watch = Callable[[int, float], None]


def make_console(*, stderr: bool = False) -> Console:
    """Makes a console on one of the standard streams.

    Characters that the encoding of the stream does not have are printed as escapes.
    """
    stream = sys.stderr if stderr else sys.stdout
    if hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="backslashreplace")  # pyright: ignore
    # Where nobody looks at a terminal, tables get the width they need.
    width = None if stream.isatty() else 120
    return Console(width=width, stderr=stderr, markup=False, emoji=False, highlight=False)


def say(console: Console, text: str, style: str = "") -> None:
    """Prints text as it is: square brackets are no markup, and long lines are not broken."""
    console.print(Text(text, style=style), soft_wrap=True)


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
    with rich.progress.Progress(
        rich.progress.TextColumn("{task.description:15}", markup=False),
        rich.progress.BarColumn(),
        rich.progress.TextColumn("{task.fields[note]}", markup=False),
        rich.progress.TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,  # a bar in a log file is noise
    ) as bars:
        yield Bars(bars, count)
