"""What the words of a command line mean, and the help that lists them."""

import dataclasses
from pathlib import Path
from pkgutil import resolve_name
from typing import Annotated, Any, NamedTuple, Union


# The module of each command's options and its function, both imported where they are needed.
COMMANDS = {
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


_COMPLETION, _SHELLS = "--tyro-print-completion", ("bash", "zsh", "fish")


class Line(NamedTuple):
    """A command, its options, and whether it shows results alone."""

    name: str
    options: Any
    quiet: bool


def command_of(args: list[str]) -> str:
    """The command that a line names, "" for none. Only options of all commands are before it."""
    return next((arg for arg in args if arg in COMMANDS), "")


def parse(args: list[str]) -> Line:
    """Parses a command line. `SystemExit` ends the process: after a help text, or with code 2.

    **Raises:** `ValueError` for completion in an unknown shell.
    """
    import tyro

    if args[:1] == [_COMPLETION] and len(args) > 1 and args[1] not in _SHELLS:
        raise ValueError(
            f"`{_COMPLETION}` must be {', '.join(_SHELLS[:-1])} or {_SHELLS[-1]}, got {args[1]!r}."
        )
    kinds = {name: resolve_name(f"{__package__}.{of}") for name, (of, _) in COMMANDS.items()}
    words = args if command_of(args) == "plan" else []
    defaults = {"plan": {"default": kinds["plan"].defaults(words)}}
    commands = tuple(
        Annotated[kind, tyro.conf.subcommand(name, prefix_name=False, **defaults.get(name, {}))]
        for name, kind in kinds.items()
    )
    any_command: Any = Union[commands]  # pyright: ignore  # noqa: UP007
    quiet = tyro.conf.arg(
        help="Show results and errors alone: no progress and no hints.", help_behavior_hint=""
    )
    version = tyro.conf.arg(help="Show the version and exit.", help_behavior_hint="")
    flag, everywhere = tyro.conf.FlagCreatePairsOff, tyro.conf.CascadeSubcommandArgs
    line = dataclasses.make_dataclass(
        "Line",
        [
            ("command", Annotated[any_command, tyro.conf.arg(name="")]),
            ("quiet", Annotated[bool, flag, everywhere, quiet], False),
            # For the help text alone: `main` reads it, as a line with this flag needs no command.
            ("version", Annotated[bool, flag, version], False),
        ],
    )
    description = "Routing experiments with `mode`."
    try:
        parsed: Any = tyro.cli(line, prog="mode-lab", description=description, args=args)
    except SystemExit as end:
        if not end.code and args[0] in ("-h", "--help"):
            text = (Path(__file__).parent / "texts" / "help.txt").read_text(encoding="utf-8")
            print(text, end="")
        raise
    name = next(name for name, kind in kinds.items() if type(parsed.command) is kind)
    return Line(name, parsed.command, parsed.quiet)
