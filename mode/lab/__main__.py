"""The command `mode-lab`."""

import itertools
import os
import shlex
import signal
import sys
import traceback
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from pkgutil import resolve_name
from typing import Annotated, Any, Union

from . import interrupts


_NEEDED = ("annotated_types", "filelock", "grain", "matplotlib", "pandas", "pydantic")
_NEEDED += ("rich", "scipy", "tabulate", "tyro")
# The module of each command's options and its function, both imported where they are needed.
_COMMANDS = {
    "ablate": ("commands:Ablation", "ablate:run_ablation"),
    "report": ("commands:Rereport", "ablate:run_rereport"),
    "tasks": ("commands:Tasks", "tasks.command:run_tasks"),
    "train": ("commands:Training", "run:run_training"),
    "generate": ("commands:Generating", "generate:run_generation"),
    "analyze": ("commands:Analysis", "analyze:run_analysis"),
    "isoflop": ("commands:Isoflop", "evidence.commands:run_isoflop"),
    "claims": ("commands:Claims", "evidence.commands:run_claims"),
    "convert": ("healing.options:Converting", "healing.command:run_converting"),
    "heal": ("healing.options:Healing", "healing.command:run_healing"),
    "plan": ("commands:Planning", "plan:run_planning"),
}
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

    The code is 2 for a mistake of the user, 70 for one of `mode`, 130 and 143 for signals.
    """
    args = sys.argv[1:] if args is None else args
    goes_on = _GOES_ON.get(args[0] if args else "", "")
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
    name, options = _parse(args)
    options = check_options(options)
    # The text that `generate` makes goes to the standard output alone.
    command(name)(options, make_console(stderr=name == "generate"))
    return 0


def command(name: str) -> Callable[[Any, Any], None]:
    """The function of a command. It is imported now, with all that it needs."""
    return resolve_name(f"{__package__}.{_COMMANDS[name][1]}")


def _parse(args: list[str]) -> tuple[str, Any]:
    """The name of a command, and its options."""
    import tyro

    kinds = {name: resolve_name(f"{__package__}.{of}") for name, (of, _) in _COMMANDS.items()}
    defaults = {"plan": {"default": kinds["plan"].defaults(args if args[:1] == ["plan"] else [])}}
    commands = tuple(
        Annotated[kind, tyro.conf.subcommand(name, prefix_name=False, **defaults.get(name, {}))]
        for name, kind in kinds.items()
    )
    options: Any = tyro.cli(
        Union[commands],  # pyright: ignore  # noqa: UP007
        prog="mode-lab",
        description="Routing experiments with `mode`.",
        args=args,
    )
    return next(name for name, kind in kinds.items() if type(options) is kind), options


if __name__ == "__main__":
    sys.exit(main())
