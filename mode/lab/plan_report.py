"""The output of `mode-lab plan`: a table in the console, `plan.json` and `plan.md`."""

import dataclasses
from pathlib import Path

import pandas as pd
from rich.console import Console

from .console import say
from .files import Record, write_record, write_text
from .meshes import MeshOf
from .options import Size
from .tables import prose, to_console, to_markdown


@dataclasses.dataclass(frozen=True)
class Trial:
    """One mesh of the search: what was counted, and what its compiler reported.

    Nothing is counted where the batch does not divide. `why` says why the compiler was not called.
    `fits` is `None` where that is not known.
    """

    mesh: MeshOf
    counted: dict[str, int | float] = dataclasses.field(default_factory=dict)
    compiler: dict[str, int | float] = dataclasses.field(default_factory=dict)
    exchanges: dict[str, str] = dataclasses.field(default_factory=dict)
    fits: bool | None = None
    why: str = ""

    def describe(self, memory: int) -> str:
        """One line, for devices of so many bytes."""
        if self.compiler:
            need = f"needs {binary(self.compiler['needed_bytes'])} of {binary(memory)}"
            verdict = "fits" if self.fits else "does not fit"
            return f"{self.mesh}: {verdict}, {need}, compiled in {self.compiler['seconds']:.0f} s"
        state = self.counted and f" (state {binary(self.counted['argument_bytes'])})"
        return f"{self.mesh}: not compiled, {self.why}{state or ''}"


class Plan(Record):
    """`plan.json`: the trials in their order, and what they were made with."""

    format = "mode-lab plan"
    version = 1

    command: str
    versions: dict[str, str]
    arm: str
    size: Size
    memory_bytes: int
    memory_rule: str
    trials: tuple[Trial, ...]
    seconds: float

    @property
    def first(self) -> Trial | None:
        """The first mesh that fits."""
        return next((trial for trial in self.trials if trial.fits), None)

    @property
    def shown(self) -> list[Trial]:
        """The requested mesh and the first that fits, where it is another."""
        requested = self.trials[0]
        return [requested] if self.first in (requested, None) else [requested, self.first]


def binary(size: int | float) -> str:
    """Bytes, in the largest unit of which there is one."""
    for unit, bits in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if size >= 2**bits:
            return f"{size / 2**bits:,.2f} {unit}"
    return f"{size:.0f} B"


def write_plan(out: Path, plan: Plan, console: Console) -> None:
    """Writes `plan.json` and `plan.md` in `out`, and prints the table."""
    columns = {str(trial.mesh): _column(plan, trial) for trial in plan.shown}
    table = pd.DataFrame(columns).rename_axis("").reset_index()
    style = {"right": list(columns), "bold": [0]}
    if plan.first is None:
        verdict = "It fits on none of the meshes that were tried. Make it smaller: `--size.batch`, "
        verdict += "`--size.length`, `--size.remat`, `--size.dtype bfloat16`."
    else:
        others = "" if plan.first is plan.trials[0] else ", the first that does"
        verdict = f"It fits on {plan.first.mesh}{others}."
    out.mkdir(parents=True, exist_ok=True)
    write_record(out / "plan.json", plan)
    text = prose(
        "plan",
        plan=plan,
        table=to_markdown(table, **style),
        verdict=verdict,
        trials="".join(f"- {trial.describe(plan.memory_bytes)}\n" for trial in plan.trials),
        versions="".join(f"- {name} {number}\n" for name, number in plan.versions.items()),
    )
    write_text(out / "plan.md", text)
    console.print(to_console(table, title="One training step, on each device", **style))
    say(console, verdict, style="bold")
    say(console, f"Saved to {out / 'plan.json'} and {out / 'plan.md'}.")


def _column(plan: Plan, trial: Trial) -> dict[str, str]:
    fits = {True: "yes", False: "no", None: "not known"}[trial.fits]
    column = {"fits": fits, "memory of a device": binary(plan.memory_bytes)}
    for source, numbers in (("counted", trial.counted), ("compiler", trial.compiler)):
        for name, value in numbers.items():
            row = f"{name.replace('_', ' ')} ({source})"
            column[row] = binary(value) if name.endswith("bytes") else f"{value:,.6g}"
    return column | trial.exchanges
