"""The command `mode-lab`."""

import os
import sys
from importlib.util import find_spec


def main(args: list[str] | None = None) -> int:
    """Run one subcommand. Mistakes of the user print as a message and give exit code 2."""
    missing = [
        name for name in ("grain", "matplotlib", "orbax", "rich", "tyro") if find_spec(name) is None
    ]
    if missing:
        print(
            f"mode-lab needs {', '.join(missing)}, which the extra `lab` installs:\n"
            '    pip install "mode-jax[lab]"',
            file=sys.stderr,
        )
        return 2
    # Not at the top: they need the extra.
    import tyro
    from rich.console import Console

    from .ablate import Ablation, Rereport, report, run_ablation
    from .generate import Generating, run_generation
    from .run import Training, run_training

    commands = {
        "ablate": Ablation,
        "report": Rereport,
        "train": Training,
        "generate": Generating,
    }
    asked = tyro.extras.subcommand_cli_from_dict(
        commands, prog="mode-lab", description="Routing experiments with `mode`.", args=args
    )
    # Where nobody looks at a terminal, tables get the width they need.
    console = Console(width=None if sys.stdout.isatty() else 120)
    try:
        match asked:
            case Ablation():
                run_ablation(asked, console)
            case Training():
                run_training(asked, console)
            case Generating():
                # The text alone goes where a pipe would read it, byte by byte.
                run_generation(asked, _write, Console(stderr=True))
            case _:
                report(asked.out, console)
    except BrokenPipeError:  # whoever read the text has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ValueError, FloatingPointError, OSError) as error:
        print(f"mode-lab: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        goes_on = {
            Ablation: " The same command goes on after the last finished arm.",
            Training: " The same command goes on from the last checkpoint.",
        }
        print(f"mode-lab: interrupted.{goes_on.get(type(asked), '')}", file=sys.stderr)
        return 130
    return 0


def _write(text: bytes) -> None:
    sys.stdout.buffer.write(text)
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    sys.exit(main())
