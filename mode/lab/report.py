"""The table at the end, and the folder that says what it shows and what it does not."""

import dataclasses
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import rich.box
from rich.console import Console
from rich.table import Table

from .files import write_atomically, write_json, write_text
from .plots import plot_curves, plot_routing
from .store import ArmResult, load_sample
from .versions import versions


_COLUMNS = (
    "arm",
    "para- meters",
    "forward FLOPs / token",
    "steps",
    "ms / step",
    "bits / byte, top-k",
    "bits / byte, CAUSAL",
    "preci- sion",
    "recall",
    "slots / token, top-k",
    "slots / token, causal",
)

_READING = """\
## How to read it

- **CAUSAL is the result.** Top-k over a sequence looks at the future: whether a token is taken
  depends on tokens after it, so the model is told something about them, and no sampler can have
  that. The top-k column says how training saw the model, and how much of it is lost or kept.
- *Precision* and *recall* are of the causal rule against top-k at the same hidden states. A rule
  that never takes a token is right 87.5 % of the time at capacity 0.125; hence no accuracy. A dash:
  the training selection is causal as it is. Two numbers: the depth router and, inside it, the
  experts'.
- *Slots per token* is what was computed: slots filled per real token that reached the router, over
  all experts. Top-k fills the slots of a sequence whose end is padding too, so a little more than
  the capacity is no mistake. Under the causal rule every token that asks is taken, so an arm may
  compute more, or less, than it was trained with; a lower loss at more slots is no fair win.
- All arms spent equal training FLOPs ({flops:.3g}, loss and gradient, counted on the traced
  program), within one step. Cheaper arms took more steps and saw more text.

## What it does not show

{short}\
- **One seed.** Another seed moves these numbers; a difference in the second decimal is a lead, not
  evidence. Run other seeds into other folders.
- **Toy scale.** {depth} layers of {dim} features, sequences of {length} bytes, minutes of training.
  Which arm wins may change with size, length and training time.
- One learning rate for all arms, tuned on the dense arm; capacity and number of experts untuned.
- Time: at this size a step is bound by element-wise work, so the milliseconds say little about
  large models, and differ with what else the machine was doing.
- Expert arms hold more parameters at equal FLOPs, which costs memory that no column counts.
- The loss is teacher-forced on {bytes:,} held-out bytes; nothing was sampled.
"""


# Below this the learning rate has hardly risen, and running quantiles hardly settled.
_FEW_STEPS = 100
_SHORT = """\
- **Too short to mean anything.** The shortest arm took {steps} steps, the rate rises over the first
  of them and thresholds settle over dozens. Raise `--budget`.
"""


def write_report(
    out: Path,
    results: Sequence[ArmResult],
    settings: dict[str, Any],
    command: str,
    console: Console,
) -> None:
    """`report.md`, `results.json`, `curves.png` and `routing.png` in `out`, and the table."""
    made_with = versions("mode-jax", "jax", "equinox", "optax", "grain", "python")
    made_with["platform"] = platform.platform()
    record = {
        "command": command,
        "versions": made_with,
        "settings": settings,
        "arms": [dataclasses.asdict(result) for result in results],
    }
    write_json(out / "results.json", record)
    shares = [result.change / result.steps for result in results if result.change < result.steps]
    write_atomically(
        out / "curves.png", lambda beside: plot_curves(beside, results, min(shares, default=1.0))
    )
    routed = [result for result in results if result.routers]
    maps = {result.name: load_sample(out, result.name) for result in routed}
    if maps:
        write_atomically(out / "routing.png", lambda beside: plot_routing(beside, maps))
    write_text(out / "report.md", _markdown(results, settings, command, made_with, bool(maps)))
    console.print(_table(results))
    if _short(results):
        console.print(
            f"An arm took fewer than {_FEW_STEPS} steps: too short to mean anything.",
            style="bold red",
            highlight=False,
        )
    console.print(
        "Top-k looks at the future; the causal column is what a sampler gets. One seed, toy scale: "
        f"see {out / 'report.md'}.",
        highlight=False,
    )


def _short(results: Sequence[ArmResult]) -> str:
    steps = min(result.steps for result in results)
    return _SHORT.format(steps=steps) if steps < _FEW_STEPS else ""


def _rows(results: Sequence[ArmResult]) -> list[list[str]]:
    rows = []
    for result in results:
        routers = result.routers
        rows.append(
            [
                result.name,
                f"{result.parameters / 1e3:,.0f} k",
                f"{result.forward_flops / 1e6:.3f} M",
                f"{result.steps}",
                f"{result.step_seconds * 1e3:.0f}",
                f"{result.bits_top_k:.3f}",
                f"{result.bits_causal:.3f}",
                _each([router.precision for router in routers]),
                _each([router.recall for router in routers]),
                _each([router.compute_top_k for router in routers], 3),
                _each([router.compute_causal for router in routers], 3),
            ]
        )
    return rows


def _each(values: Sequence[float | None], digits: int = 2) -> str:
    shown = [f"{value:.{digits}f}" for value in values if value is not None]
    return "/ ".join(shown) or "-"


def _table(results: Sequence[ArmResult]) -> Table:
    table = Table(
        title="Held-out results at equal training FLOPs", title_justify="left", box=rich.box.SIMPLE
    )
    for place, name in enumerate(_COLUMNS):
        # Headings break between words, names not at all: a narrow terminal cuts nothing off.
        table.add_column(
            name,
            justify="right" if place else "left",
            vertical="bottom",
            no_wrap=not place,
            overflow="fold",
            min_width=max(map(len, name.split())),
        )
    best = min(result.bits_causal for result in results)
    for result, row in zip(results, _rows(results), strict=True):
        table.add_row(*row, style="bold" if result.bits_causal == best else None)
    return table


def _markdown(
    results: Sequence[ArmResult],
    settings: dict[str, Any],
    command: str,
    made_with: dict[str, str],
    mapped: bool,
) -> str:
    lines = ["# Routing ablation at equal training FLOPs", "", f"    {command}", ""]
    lines += ["| " + " | ".join(name.replace("- ", "") for name in _COLUMNS) + " |"]
    lines += ["|---" + "|---:" * (len(_COLUMNS) - 1) + "|"]
    lines += ["| " + " | ".join(row) + " |" for row in _rows(results)]
    lines += ["", *(f"- **{r.name}**: {r.description}." for r in results), ""]
    lines += [
        _READING.format(
            flops=max(result.steps * result.step_flops for result in results),
            bytes=results[0].bytes,
            short=_short(results),
            **{name: settings["size"][name] for name in ("depth", "dim", "length")},
        )
    ]
    lines += ["## Figures", "", "![Training loss against training FLOPs](curves.png)", ""]
    if mapped:
        lines += ["![Which tokens each routed layer took](routing.png)", ""]
    lines += ["## Made with", ""]
    lines += [f"- {name} {number}" for name, number in made_with.items()]
    lines += [f"- {jax.default_backend()}, {os.cpu_count()} processor cores", ""]
    return "\n".join(lines)
