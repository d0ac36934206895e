"""What `mode-lab plan` prints and saves."""

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import rich.box
from rich.console import Console
from rich.table import Table

from .arms import Size
from .files import write_json, write_text
from .footprint import Counted, Said
from .versions import versions


@dataclasses.dataclass(frozen=True)
class Tried:
    """One mesh of the search.

    **Attributes:**

    - `target`, `axes`: which.
    - `counted`: what it needs as far as shapes tell; `None` where the batch does not divide.
    - `said`: what the compiler said; `None` where it was not asked.
    - `fits`: whether the step fits.
    - `why`: why the compiler was not asked.
    """

    target: str
    axes: dict[str, int]
    counted: Counted | None
    said: Said | None
    fits: bool
    why: str


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that was found."""

    command: str
    arm: str
    size: Size
    memory_bytes: int
    memory_rule: str
    tried: tuple[Tried, ...]
    seconds: float

    @property
    def first(self) -> Tried | None:
        """The first mesh that fits."""
        return next((one for one in self.tried if one.fits), None)

    @property
    def shown(self) -> list[Tried]:
        """The mesh that was asked for and the first that fits, where it is another."""
        asked = self.tried[0]
        return [asked] if self.first in (asked, None) else [asked, self.first]


_READING = """\
*Counted* is from shapes and where `mode.placement` has them, and needs no compiler; *compiler* is
its own word. Temporary memory holds the gradient, which is whole before the first update as its
norm is clipped, the activations, weights gathered from other devices, and work space; the compiler
gives one number for all of them. Counted activations are what automatic differentiation keeps from
the forward to the backward pass and what grows with the batch: an estimate, as the compiler may
keep less and compute again, or on the chip, or more. They and the gradient need not be there at
once. Of a program that it refuses, it says no parts, and as needed what it has found by then.

FLOPs are those of the whole step, update included, as `mode.count_flops` counts them, over the
devices; the compiler counts the body of a loop, such as that over layers, once. Bytes of
collectives are of their results on one device; a loop of known length multiplies them.

No device took part: these are no times, and no proof that it runs.
"""


def binary(size: int | float) -> str:
    """Bytes, in the largest unit of which there is one."""
    for unit, bits in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if size >= 2**bits:
            return f"{size / 2**bits:,.2f} {unit}"
    return f"{size:.0f} B"


def decimal(size: int | float) -> str:
    """A number, to four places, with the letter of its thousands."""
    for unit, power in (("T", 12), ("G", 9), ("M", 6), ("k", 3)):
        if size >= 10**power:
            return f"{size / 10**power:,.4g} {unit}"
    return f"{size:.4g} "


def line_of(tried: Tried, memory: int) -> str:
    """One mesh in a line."""
    where = f"{tried.target}, data {tried.axes['data']} x expert {tried.axes['expert']}"
    if tried.said is not None:
        verdict = "fits" if tried.fits else "does not fit"
        need = f"needs {binary(tried.said.needed_bytes)} of {binary(memory)}"
        return f"{where}: {verdict}, {need}, compiled in {tried.said.seconds:.0f} s"
    state = "" if tried.counted is None else f" (state {binary(tried.counted.argument_bytes)})"
    return f"{where}: not compiled, {tried.why}{state}"


def write_plan(out: Path, plan: Plan, console: Console) -> None:
    """`plan.json` and `plan.md` in `out`, and the table."""
    rows = _rows(plan)
    table = Table(
        title="One training step, on each device", title_justify="left", box=rich.box.SIMPLE
    )
    for place, name in enumerate(_heads(plan)):
        table.add_column(name, justify="right" if place else "left", overflow="fold")
    for row in rows:
        table.add_row(*row, style="bold" if row[0] == "fits" else None)
    console.print(table)
    console.print(_verdict(plan), highlight=False, style="bold")
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "plan.json", _record(plan))
    write_text(out / "plan.md", _markdown(plan, rows))
    console.print(f"Saved to {out / 'plan.json'} and {out / 'plan.md'}.", highlight=False)


def _heads(plan: Plan) -> list[str]:
    return [
        "",
        *(
            f"{one.target} data {one.axes['data']} expert {one.axes['expert']}"
            for one in plan.shown
        ),
    ]


def _rows(plan: Plan) -> list[list[str]]:
    columns = [_column(plan, one) for one in plan.shown]
    names = list(dict.fromkeys(name for column in columns for name in column))
    return [[name, *(column.get(name, "-") for column in columns)] for name in names]


def _column(plan: Plan, one: Tried) -> dict[str, str]:
    found: dict[str, str] = {}
    if one.counted is not None:
        counted = one.counted
        found |= {
            "parameters, all devices (counted)": decimal(counted.parameters).strip(),
            "parameters (counted)": binary(counted.parameter_bytes),
            "optimizer (counted)": binary(counted.optimizer_bytes),
            "router state, keys, batch (counted)": binary(counted.other_bytes),
            "gradient (counted)": binary(counted.gradient_bytes),
            "activations kept (counted, estimate)": binary(counted.activation_bytes),
        }
    said = one.said
    parts = ("argument", "temporary", "result", "code")
    titles = ("arguments", "temporary", "results not in place", "code")
    for part, title in zip(parts, titles, strict=True):
        size = None if said is None else getattr(said, f"{part}_bytes")
        found[f"{title} (compiler)"] = "-" if size is None else binary(size)
    found["needed (compiler)"] = "-" if said is None else binary(said.needed_bytes)
    found["there is"] = binary(plan.memory_bytes)
    found["fits"] = "yes" if one.fits else "no" if said or "state" in one.why else "not known"
    if one.counted is not None:
        found["FLOPs (counted)"] = decimal(one.counted.flops)
    flops = None if said is None else said.flops
    found["FLOPs (compiler, loops once)"] = "-" if flops is None else decimal(flops)
    for row in _collectives(said):
        times = "?" if row["times"] is None else row["times"]
        found[f"{row['kind']} ({times} a step each)"] = f"{row['count']}: {_moved(row)}"
    if said is not None and said.argument_bytes is not None and not said.collectives:
        found["collectives"] = "none"
    return found


def _moved(row: dict[str, Any]) -> str:
    size = row["bytes"]
    if row["times"] is None:
        return f"{decimal(size)}B a turn of a loop"
    return f"{decimal(size * row['times'])}B a step"


def _collectives(said: Said | None) -> list[dict[str, Any]]:
    """By kind and how often they happen: how many in the program, and their bytes, once each."""
    if said is None:
        return []
    counts: Counter[tuple[str, int | None]] = Counter()
    sizes: Counter[tuple[str, int | None]] = Counter()
    for one in said.collectives:
        counts[one.kind, one.times] += 1
        sizes[one.kind, one.times] += one.bytes
    return [
        {"kind": kind, "times": times, "count": counts[kind, times], "bytes": sizes[kind, times]}
        for kind, times in sorted(counts, key=lambda key: (key[0], key[1] or 0))
    ]


def _verdict(plan: Plan) -> str:
    asked, first = plan.tried[0], plan.first
    if first is None:
        return (
            "It fits on none of the meshes that were tried. Make it smaller: `--size.batch`, "
            "`--size.length`, `--size.remat`, `--size.dtype bfloat16`."
        )
    where = f"{first.target} as data {first.axes['data']} x expert {first.axes['expert']}"
    return f"It fits on {where}{'' if first is asked else ', the first mesh of the search'}."


def _versions() -> dict[str, str]:
    compilers = ("libtpu", "jax-cuda13-pjrt")
    return versions("python", "mode-jax", "jax", "jaxlib", "equinox", "optax", *compilers)


def _record(plan: Plan) -> dict[str, Any]:
    def entry(one: Tried) -> dict[str, Any]:
        found = dataclasses.asdict(one)
        if one.counted is not None:
            found["counted"]["argument_bytes"] = one.counted.argument_bytes
        if one.said is not None:
            found["said"]["collectives"] = _collectives(one.said)
        return found

    return {
        "command": plan.command,
        "versions": _versions(),
        "arm": plan.arm,
        "size": dataclasses.asdict(plan.size),
        "memory_bytes": plan.memory_bytes,
        "memory_rule": plan.memory_rule,
        "tried": [entry(one) for one in plan.tried],
        "first_that_fits": None if plan.first is None else plan.tried.index(plan.first),
        "seconds": round(plan.seconds, 1),
    }


def _markdown(plan: Plan, rows: list[list[str]]) -> str:
    heads = _heads(plan)
    lines = ["# What one training step needs on each device", "", f"    {plan.command}", ""]
    lines += ["| " + " | ".join(heads) + " |", "|---" + "|---:" * (len(heads) - 1) + "|"]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    lines += ["", _verdict(plan), "", "## Meshes, in the order in which they were tried", ""]
    lines += [f"- {line_of(one, plan.memory_bytes)}" for one in plan.tried]
    lines += ["", f"Memory of a device: {plan.memory_rule}. {plan.seconds:.0f} s in all.", ""]
    lines += ["## How to read it", "", _READING, "## Made with", ""]
    lines += [f"- {name} {number}" for name, number in _versions().items()]
    return "\n".join(lines) + "\n"
