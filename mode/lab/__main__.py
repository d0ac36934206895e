"""The command `mode-lab`."""

import itertools
import os
import shlex
import signal
import sys
import traceback
from collections.abc import Callable
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from . import interrupts
from .parse import COMMANDS, command_of, parse


_NEEDED = ("annotated_types", "filelock", "grain", "matplotlib", "pandas", "pydantic")
_NEEDED += ("rich", "scipy", "tabulate", "tyro")
# Set to anything, this variable shows the traceback of an error of ours.
_DEBUG = "MODE_LAB_DEBUG"
_GOES_ON = {
    "ablate": " The same command goes on after the last finished arm.",
    "tasks": " The same command goes on after the last finished run.",
    "train": " The same command goes on from the last checkpoint.",
    "isoflop": " The same command goes on after the last finished run.",
    "heal": " The same command goes on from the last checkpoint.",
}


def main(args: list[str] | None = None) -> int:
    """Runs one command. What goes wrong is a message of one line and an exit code, no traceback.

    The code is 2 for a mistake of the user, 70 for one of `mode`, 130 and 143 for signals, 141
    where nobody reads the output. `texts/help.txt` tells users so.
    """
    args = sys.argv[1:] if args is None else args
    if "--version" in itertools.takewhile(lambda word: word not in COMMANDS, args):
        print(f"mode-lab {metadata.version('mode-jax')}")
        return 0
    goes_on = _GOES_ON.get(command_of(args), "")
    interrupts.install(f"mode-lab: interrupted.{goes_on}")
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        print(
            f"mode-lab needs {', '.join(missing)}, which the extra `lab` installs: in a clone,\n"
            '    pip install ".[lab]"    or    uv run --extra lab mode-lab ...',
            file=sys.stderr,
        )
        return 2
    try:
        return _run(args)
    except BrokenPipeError:  # the reader of the text has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except ConnectionError as error:
        _say(error)
        sys.stdout.flush()
        os._exit(2)  # the usual way out waits for the process that is gone, for 100 s
    except (ValueError, FloatingPointError, ImportError, OSError) as error:
        _say(error)
        return 2
    except KeyboardInterrupt:
        _say(f"interrupted.{goes_on}")
        return 128 + (interrupts.received() or signal.SIGINT)
    except Exception as error:
        if os.environ.get(_DEBUG):
            raise
        *_, last = traceback.extract_tb(error.__traceback__)
        place = f"{Path(last.filename).name}:{last.lineno}"
        text = " ".join(str(error).split())[:300]
        _say(f"an error of mode, {type(error).__name__} at {place}: {text} ({_DEBUG}=1 shows all.)")
        return 70
    return 0


def _say(message: object) -> None:
    text = str(message).partition("\n--------------------\n")[0]  # behind it, a hint of JAX's
    print(f"mode-lab: {text}", file=sys.stderr, flush=True)


def _run(args: list[str]) -> int:
    from .console import make_console
    from .options import check_options

    make_console(stderr=True)  # what cannot be encoded is escaped
    if any("\udc80" <= letter <= "\udcff" for letter in "".join(args)):
        raise ValueError(f"arguments must be text in UTF-8, got {shlex.join(args)!r}.")
    for option, value in itertools.pairwise((*args, "none")):
        name, is_flag = option.rstrip("="), option.startswith("--")
        if is_flag and name != "--prompt" and (option.endswith("=") or not value):
            raise ValueError(f"`{name}` must have a value, got an empty one.")
    line = parse(args)
    options = check_options(line.options)
    # The text that `generate` makes goes to the standard output alone.
    console = make_console(stderr=line.name == "generate", quiet=line.quiet)
    command(line.name)(options, console)
    return 0


def command(name: str) -> Callable[[Any, Any], None]:
    """The function of a command. It is imported now, with all that it needs."""
    return resolve_name(f"{__package__}.{COMMANDS[name][1]}")


if __name__ == "__main__":
    sys.exit(main())
