"""What `mode-lab` prints: text as it is, in any encoding, and progress bars."""

import datetime
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import rich.progress
from rich.console import Console
from rich.text import Text


# Told the steps done and the latest loss, in bits per byte.
Watch = Callable[[int, float], None]


class QuietConsole(Console):
    """A console that shows results and no progress: what `--quiet` is for."""


def make_console(*, stderr: bool = False, quiet: bool = False) -> Console:
    """Makes a console on one of the standard streams.

    Characters that the encoding of the stream does not have are printed as escapes.
    """
    stream = sys.stderr if stderr else sys.stdout
    if hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="backslashreplace")  # pyright: ignore
    # Where nobody looks at a terminal, tables get the width they need.
    width = None if stream.isatty() else 120
    kind = QuietConsole if quiet else Console
    return kind(width=width, stderr=stderr, markup=False, emoji=False, highlight=False)


def say(console: Console, text: str, style: str = "") -> None:
    """Prints text as it is: square brackets are no markup, and long lines are not broken."""
    console.print(Text(text, style=style), soft_wrap=True)


def say_progress(console: Console, text: str) -> None:
    """Prints what is of use only while a command runs: where it stands, and hints."""
    if not isinstance(console, QuietConsole):
        say(console, text)


class Bars:
    """One bar for the arm that is training and, of several, one for all of them."""

    def __init__(self, bars: rich.progress.Progress, count: int):
        self.bars = bars
        self.total = bars.add_task("all arms", total=count, note="", visible=count > 1)

    @contextmanager
    def arm(
        self, name: str, steps: int, *, tokens: int = 0, log_every: int | None = None
    ) -> Iterator[Watch]:
        """Shows the bar of one arm: yields the function that its training calls.

        Where there are no bars to see, a line is printed at the first two calls, from which the
        speed is known, and every `log_every` steps. `tokens` are those of a step.
        """
        bar = self.bars.add_task(name, total=steps, note="compiling")
        calls: list[tuple[int, float]] = []  # steps and times

        def watch(step: int, loss: float) -> None:
            last = calls[-1][0] if calls else 0
            calls.append((step, time.monotonic()))
            note = f"step {step} of {steps}, {loss:.3f} bits per byte{_pace(calls, steps, tokens)}"
            self.bars.update(bar, completed=step, note=note)
            is_due = log_every and (len(calls) <= 2 or step // log_every > last // log_every)
            if is_due and self.bars.disable:
                say_progress(self.bars.console, note)

        yield watch
        self.bars.advance(self.total)
        self.bars.remove_task(bar)


def _pace(calls: Sequence[tuple[int, float]], steps: int, tokens: int) -> str:
    """The speed over the last calls, and the time left; the first call is after compilation."""
    (first, began), (last, now) = calls[-10:][0], calls[-1]
    if not tokens or last == first or now == began:
        return ""
    per_step = (now - began) / (last - first)
    left = datetime.timedelta(seconds=round((steps - last) * per_step))
    return f", {tokens / per_step:,.0f} tokens per second, {left} left"


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
        # A bar in a log file is noise.
        disable=not console.is_terminal or isinstance(console, QuietConsole),
    ) as bars:
        yield Bars(bars, count)
