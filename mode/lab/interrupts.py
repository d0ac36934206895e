"""Ctrl-C and SIGTERM: training finishes its step and saves; all else ends at once.

Ends at once means without a `KeyboardInterrupt`, which may be lost: code that runs while memory is
collected has its exceptions ignored, and JAX has such code. Files are whole at any moment.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator


_now = {"received": 0, "deferred": 0}
_line = [""]


def install(line: str) -> None:
    """Handles the signals from here on: `line` is printed when one ends the process.

    Only the main thread can.
    """
    _now["received"] = 0
    _line[0] = line
    for number in (signal.SIGINT, signal.SIGTERM):
        with contextlib.suppress(ValueError):
            signal.signal(number, _handle)


def _handle(number: int, frame: object) -> None:
    if _now["deferred"] and not _now["received"]:
        _now["received"] = number
    else:  # a second signal is not deferred
        _leave(number)


def _leave(number: int) -> None:
    """Prints the line and ends the process with the exit code of a signal, 128 + `number`."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):  # the signal may have come while it was written to
            stream.flush()
    # A bar may have hidden the cursor of a terminal.
    cursor = "\x1b[?25h" if os.isatty(2) else ""
    with contextlib.suppress(OSError):
        os.write(2, f"{cursor}{_line[0]}\n".encode())
    os._exit(128 + number)


def received() -> int:
    """The number of the signal that came, 0 for none."""
    return _now["received"]


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """While the context lasts, the first signal is only remembered: its code reads `received`."""
    _now["deferred"] = 1
    try:
        yield
    finally:
        _now["deferred"] = 0
    if received():
        raise KeyboardInterrupt
