"""What a store shows of loss against size: `report.md`, `isoflop.png` and a table."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import rich.box
from rich.console import Console
from rich.table import Table

from ..arms import Size
from ..files import read_settings, write_atomically, write_text
from .figure import plot_curves
from .fit import Curve, curves
from .records import SEARCH_SEED, Record, Store, size_name


_COLUMNS = (
    "training FLOPs",
    "arm",
    "sizes x seeds",
    "optimum, parameters",
    "loss there",
    "over seeds",
    "misfit",
    "forward FLOPs / token",
    "as dense's optimum, at",
)

_READING = """\
## How to read it

- *Loss* is held out and causal, in bits per byte: as a sampler would get it. Top-k looks ahead.
- A parabola in the logarithm of the parameters goes through the runs of an arm and budget, of the
  seeds that every size has. Its lowest point counts where it lies between the sizes that were run,
  and is otherwise *not bracketed*: nothing is extrapolated. *Over seeds* is the standard deviation
  of the lowest points of a parabola for each seed.
- *Misfit* is the furthest that the mean over seeds at a size lies from the parabola. Where it is as
  large as a difference between arms, the parabola cannot resolve that difference. Three sizes have
  none: a parabola goes through any three points.
- *As dense's optimum, at* is the smallest share of the forward FLOPs of the dense optimum at which
  the arm's parabola is as low as that optimum; with "at most" where that is the smallest size run.
- Steps are the budget over the FLOPs of a step's loss and gradient, counted on the traced program;
  the learning rate falls over exactly these. It was chosen for each size on the dense arm alone.
"""


def report(out: Path, console: Console) -> None:
    """Write what the store in `out` shows.

    **Raises:** `ValueError` where there is no store, or one whose records cannot be compared.
    """
    settings = read_settings(out)
    store = Store(out)
    records = store.all()
    check_alike(records, settings, out)
    reference = Size(**settings["reference"])
    found = curves(records, reference)
    if found:
        write_atomically(out / "isoflop.png", lambda beside: plot_curves(beside, found))
    table = Table(title="Loss against size", title_justify="left", box=rich.box.SIMPLE)
    for place, name in enumerate(_COLUMNS):
        table.add_column(name, justify="left" if place == 1 else "right", overflow="fold")
    for row in _rows(found):
        table.add_row(*row)
    if found:
        console.print(table)
    else:
        console.print("No arm has three sizes at one budget yet: nothing to fit.", highlight=False)
    write_text(out / "report.md", _markdown(records, found, settings, store.failures()))
    console.print(f"{len(records)} runs: see {out / 'report.md'}.", highlight=False)


def is_sweep(settings: dict[str, Any]) -> bool:
    """Whether they are those of a folder of `mode-lab isoflop`."""
    return "reference" in settings


def check_alike(records: Sequence[Record], settings: dict[str, Any], out: Path) -> None:
    """Refuse records of another text, evaluation or recipe than the folder's."""
    for record in records:
        run = record.run
        wrong = [
            name
            for name, value in (("corpus", run.corpus), ("held_out", run.held_out))
            if value != settings[name]
        ]
        recipe = {**settings["recipe"], "learning_rate": run.recipe.learning_rate}
        wrong += [name for name in recipe if recipe[name] != getattr(run.recipe, name)]
        if wrong:
            raise ValueError(
                f"`out` must hold runs of one configuration, got {run.name} in {out}, of another "
                f"{' and '.join(wrong)}. Move it to a folder of its own."
            )


def _rows(found: Sequence[Curve]) -> list[list[str]]:
    rows = []
    for curve in found:
        dense = next((c for c in found if c.arm == "dense" and c.budget == curve.budget), None)
        lowest, spread = curve.fit.lowest, curve.spread
        sizes = len({record.run.size for record in curve.records})
        rows.append(
            [
                f"{curve.budget:.3g}",
                curve.arm,
                f"{sizes} x {len({record.run.seed for record in curve.records})}",
                "not bracketed" if lowest is None else f"{lowest:,.0f}",
                "-" if curve.lowest is None else f"{curve.lowest:.4f}",
                "-" if spread is None else f"{spread:.4f}",
                f"{curve.misfit:.4f}" if sizes > 3 else "-",
                "-" if lowest is None else f"{curve.forward_flops(lowest):,.0f}",
                _cheapest(curve, dense),
            ]
        )
    return rows


def _cheapest(curve: Curve, dense: Curve | None) -> str:
    if dense is None or dense.fit.lowest is None or dense.lowest is None or curve is dense:
        return "-"
    found = curve.cheapest(dense.lowest)
    if found is None:
        return "never"
    flops, bracketed = found
    share = flops / dense.forward_flops(dense.fit.lowest)
    return f"{'' if bracketed else 'at most '}{share:.2f}"


def _markdown(
    records: Sequence[Record],
    found: Sequence[Curve],
    settings: dict[str, Any],
    failures: dict[str, str],
) -> str:
    lines = ["# Loss against size at equal training FLOPs", ""]
    if found:
        lines += ["![Loss against parameters and forward FLOPs](isoflop.png)", ""]
        lines += markdown_table(_COLUMNS, _rows(found))
    else:
        lines += ["No arm has three sizes at one budget: there is nothing to fit.", ""]
    lines += [_READING, "## Learning rates", ""]
    lines += _rates(records, settings)
    lines += ["## Runs", "", *_runs(records)]
    if failures:
        lines += ["## Runs without a result", ""]
        lines += [f"- {name}: {why}" for name, why in failures.items()] + [""]
    lines += ["## Made with", "", *made_with(records, settings)]
    return "\n".join(lines)


def markdown_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Its lines, and an empty one."""
    return [
        "| " + " | ".join(heads) + " |",
        "|" + "---|" * len(heads),
        *("| " + " | ".join(row) + " |" for row in rows),
        "",
    ]


def _rates(records: Sequence[Record], settings: dict[str, Any]) -> list[str]:
    rates = sorted(settings["rates"])
    if len(rates) == 1:
        return [f"{rates[0]:g}, not searched.", ""]
    rows = []
    found: dict[str, dict[float, float]] = {}
    for record in records:
        if record.run.seed >= SEARCH_SEED:
            losses = found.setdefault(size_name(record.run.size), {})
            losses[record.run.recipe.learning_rate] = record.end.bits_causal
    for name, losses in found.items():
        best = min(losses, key=lambda rate: losses[rate])
        cells = [f"{losses[rate]:.4f}" if rate in losses else "-" for rate in rates]
        edge = " (at the edge of the search)" if best in (rates[0], rates[-1]) else ""
        rows.append([name, *cells, f"{best:g}{edge}"])
    heads = ("size", *(f"{rate:g}" for rate in rates), "chosen")
    budget = f"Loss of the dense arm after {settings['search_budget']:.3g} training FLOPs, one seed"
    return [f"{budget} apart from those compared.", "", *markdown_table(heads, rows)]


def _runs(records: Sequence[Record]) -> list[str]:
    cells: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        run = record.run
        if run.seed < SEARCH_SEED:
            size = run.size
            place = (run.budget, run.arm, size.dim, size.depth, size.length, size.capacity)
            cells.setdefault(place, []).append(record)
    heads = (
        *("training FLOPs", "arm", "size", "length", "capacity", "seeds", "steps", "top-k"),
        *("causal", "over seeds", "slots / token, causal", "ms / step"),
    )
    rows = []
    for (budget, arm, dim, depth, length, capacity), cell in sorted(cells.items()):
        causal = [record.end.bits_causal for record in cell]
        compute = [r.end.compute for r in cell if r.end.compute is not None]
        rows.append(
            [
                *(f"{budget:.3g}", arm, f"{dim}x{depth}", f"{length}", f"{capacity:g}"),
                *(f"{len(cell)}", f"{cell[0].steps}"),
                f"{statistics.mean(record.end.bits_top_k for record in cell):.4f}",
                f"{statistics.mean(causal):.4f}",
                f"{statistics.stdev(causal):.4f}" if len(causal) > 1 else "-",
                f"{statistics.mean(compute):.3f}" if compute else "-",
                f"{1e3 * statistics.median(record.step_seconds for record in cell):.1f}",
            ]
        )
    return markdown_table(heads, rows)


def made_with(records: Sequence[Record], settings: dict[str, Any]) -> list[str]:
    """Time, machines, versions and text of the records, as lines of a list."""
    seconds = {
        name: sum(record.seconds[name] for record in records)
        for name in ("training", "waiting", "evaluating")
    }
    whole = seconds["training"] + seconds["evaluating"]
    lines = []
    if records:
        steps = [record.steps for record in records]
        lines += [f"- {len(records)} runs of {min(steps):,} to {max(steps):,} steps"]
    if whole:
        lines += [
            f"- {whole / 3600:.2f} hours of runs; {seconds['waiting'] / whole:.1%} of it waiting "
            f"for data, {seconds['evaluating'] / whole:.1%} evaluating"
        ]
    machines = sorted({record.machine for record in records})
    made = sorted({", ".join(f"{n} {v}" for n, v in r.versions.items()) for r in records})
    lines += [f"- {machine}" for machine in machines] + [f"- {versions}" for versions in made]
    if len(made) > 1:
        lines += ["- **Several versions took part**: differences between them are not told apart."]
    lines += [f"- text {settings['corpus']}, {settings['held_out']} held-out sequences", ""]
    return lines
