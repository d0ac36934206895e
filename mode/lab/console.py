"""What `mode-lab` prints: text as it is, in any encoding."""

import sys

from rich.console import Console
from rich.text import Text


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
