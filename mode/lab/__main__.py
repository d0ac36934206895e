"""The command `mode-lab`."""

import os
import shlex
import sys
from importlib.util import find_spec
from typing import Annotated, Any, Union


def main(args: list[str] | None = None) -> int:
    """Run one subcommand. Mistakes of the user print as a message and give exit code 2."""
    missing = [
        name for name in ("grain", "matplotlib", "orbax", "rich", "tyro") if find_spec(name) is None
    ]
    if missing:
        print(
            f"mode-lab needs {', '.join(missing)}, which the extra `lab` installs: in a clone,\n"
            '    pip install ".[lab]"    or    uv run --extra lab mode-lab ...',
            file=sys.stderr,
        )
        return 2
    asked = None
    try:
        args = sys.argv[1:] if args is None else args
        asked = _parsed(args)
        _run(asked, shlex.join(["mode-lab", *args]))
    except BrokenPipeError:  # whoever read the text has had enough
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
        goes_on = {
            "Ablation": " The same command goes on after the last finished arm.",
            "Training": " The same command goes on from the last checkpoint.",
            "Isoflop": " The same command goes on after the last finished run.",
        }
        print(f"mode-lab: interrupted.{goes_on.get(type(asked).__name__, '')}", file=sys.stderr)
        return 130
    return 0


# What follows imports where it is used: it needs the extra.


def _parsed(args: list[str]) -> Any:
    import tyro

    from .ablate import Ablation, Rereport
    from .analyze import Analyzing
    from .evidence.sweep import Isoflop
    from .evidence.verdicts import Claims
    from .generate import Generating
    from .plan import Planning
    from .run import Training

    planning = Planning.asked(args if args[:1] == ["plan"] else [])
    commands = {
        "ablate": (Ablation, {}),
        "report": (Rereport, {}),
        "train": (Training, {}),
        "generate": (Generating, {}),
        "analyze": (Analyzing, {}),
        "isoflop": (Isoflop, {}),
        "claims": (Claims, {}),
        "plan": (Planning, {"default": planning}),
    }
    kinds = tuple(
        Annotated[kind, tyro.conf.subcommand(name, prefix_name=False, **default)]
        for name, (kind, default) in commands.items()
    )
    return tyro.cli(
        Union[kinds],  # pyright: ignore  # noqa: UP007
        prog="mode-lab",
        description="Routing experiments with `mode`.",
        args=args,
    )


def _run(asked: Any, command: str) -> None:
    from rich.console import Console

    from .ablate import Ablation, report, run_ablation
    from .analyze import Analyzing, run_analysis
    from .evidence.report import is_sweep, report as report_sweep
    from .evidence.sweep import Isoflop, run_isoflop
    from .evidence.verdicts import Claims, run_claims
    from .files import read_settings
    from .generate import Generating, run_generation
    from .plan import Planning, run_planning
    from .run import Training, run_training

    # Where nobody looks at a terminal, tables get the width they need.
    console = Console(width=None if sys.stdout.isatty() else 120)
    match asked:
        case Ablation():
            run_ablation(asked, console)
        case Training():
            run_training(asked, console)
        case Generating():
            # The text alone goes where a pipe would read it, byte by byte.
            run_generation(asked, _write, Console(stderr=True))
        case Analyzing():
            run_analysis(asked, console)
        case Isoflop():
            run_isoflop(asked, console)
        case Claims():
            run_claims(asked, console)
        case Planning():
            run_planning(asked, console, command=command)
        case _:
            again = report_sweep if is_sweep(read_settings(asked.out)) else report
            again(asked.out, console)


def _write(text: bytes) -> None:
    sys.stdout.buffer.write(text)
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    sys.exit(main())
