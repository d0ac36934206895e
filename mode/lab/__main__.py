"""The command `mode-lab`."""

import os
import shlex
import sys
from importlib.util import find_spec
from pkgutil import resolve_name
from typing import Annotated, Any, Union


_NEEDED = ("annotated_types", "filelock", "grain", "matplotlib", "pandas", "pydantic")
_NEEDED += ("rich", "scipy", "tabulate", "tyro")
# The module of each command's options and its function, both imported where they are needed.
_COMMANDS = {
    "ablate": ("commands:Ablation", "ablate:run_ablation"),
    "report": ("commands:Rereport", "ablate:run_rereport"),
    "train": ("commands:Training", "run:run_training"),
    "generate": ("commands:Generating", "generate:run_generation"),
    "analyze": ("analyze:Analysis", "analyze:run_analysis"),
    "isoflop": ("evidence.commands:Isoflop", "evidence.commands:run_isoflop"),
    "claims": ("evidence.commands:Claims", "evidence.commands:run_claims"),
    "plan": ("commands:Planning", "plan:run_planning"),
}
_GOES_ON = {
    "ablate": " The same command goes on after the last finished arm.",
    "train": " The same command goes on from the last checkpoint.",
    "isoflop": " The same command goes on after the last finished run.",
}


def main(args: list[str] | None = None) -> int:
    """Runs one command. Mistakes of the user print as a message and give exit code 2."""
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        print(
            f"mode-lab needs {', '.join(missing)}, which the extra `lab` installs: in a clone,\n"
            '    pip install ".[lab]"    or    uv run --extra lab mode-lab ...',
            file=sys.stderr,
        )
        return 2
    from . import interrupts
    from .console import make_console

    args = sys.argv[1:] if args is None else args
    interrupts.install()
    make_console(stderr=True)  # what cannot be encoded is escaped
    try:
        if any("\udc80" <= letter <= "\udcff" for letter in "".join(args)):
            raise ValueError(f"arguments must be text in UTF-8, got {shlex.join(args)!r}.")
        name, options = _parse(args)
        function = resolve_name(f"{__package__}.{_COMMANDS[name][1]}")
        interrupts.check()
        # The text that `generate` makes goes to the standard output alone.
        function(options, make_console(stderr=name == "generate"))
        interrupts.check()
    except BrokenPipeError:  # the reader of the text has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except ConnectionError as error:
        print(f"mode-lab: {error}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(2)  # the usual way out waits for the process that is gone, for 100 s
    except (ValueError, FloatingPointError, ImportError, OSError) as error:
        print(f"mode-lab: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        goes_on = _GOES_ON.get(args[0] if args else "", "")
        print(f"mode-lab: interrupted.{goes_on}", file=sys.stderr)
        return 128 + (interrupts.received() or 2)
    return 0


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
