"""Ctrl-C and SIGTERM: training finishes its step and saves; all else stops at once.

A signal is remembered, as the `KeyboardInterrupt` that Python raises for it may be lost: code that
runs while memory is collected has its exceptions ignored.
"""

import contextlib
import os
import signal
from collections.abc import Iterator


_now = {"received": 0, "deferred": 0}


def install() -> None:
    """Handles the signals from here on. (Only the main thread can.)"""
    _now["received"] = 0
    for number in (signal.SIGINT, signal.SIGTERM):
        with contextlib.suppress(ValueError):
            signal.signal(number, _handle)


def _handle(number: int, frame: object) -> None:
    if _now["deferred"] and _now["received"]:  # a second signal: without delay
        os._exit(128 + number)
    _now["received"] = number
    if not _now["deferred"]:
        raise KeyboardInterrupt


def received() -> int:
    """The number of the signal that came, 0 for none."""
    return _now["received"]


def check() -> None:
    """Raises `KeyboardInterrupt` where a signal came before."""
    if received():
        raise KeyboardInterrupt


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """While the context lasts, signals are only remembered: the code inside reads `received`."""
    check()
    _now["deferred"] = 1
    try:
        yield
    finally:
        _now["deferred"] = 0
    check()
