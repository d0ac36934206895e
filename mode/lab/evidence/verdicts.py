"""The command `mode-lab claims`: what a store says of each claim, of the gap and of the leak."""

import dataclasses
from collections.abc import Container, Sequence
from pathlib import Path

import rich.box
from rich.console import Console
from rich.table import Table

from ..arms import Size
from ..files import read_settings, write_atomically, write_json, write_text
from .cells import Cells
from .claims import CLAIMS, Claim
from .findings import Finding
from .fit import curves
from .records import Store, size_name
from .report import check_alike, is_sweep, made_with, markdown_table
from .studies import (
    Against,
    Closing,
    Leak,
    Learned,
    against_default,
    closing,
    comparable,
    leaks,
    learned,
)
from .study_figures import plot_closing, plot_leaks
from .variants import VARIANTS


@dataclasses.dataclass(frozen=True)
class Claims:
    """Test the paper's claims, one by one, on the runs of `mode-lab isoflop`. Trains nothing."""

    out: Path = Path("runs/isoflop")
    """The folder of the runs."""


_READING = """\
Intervals in brackets are Student's, of confidence 0.95, for the mean of differences between runs of
one seed and budget. A verdict is *reproduced* where the interval lies on the claim's side,
*contradicted* where it lies on the other side, and otherwise *not resolved at this scale*. Seeds
differ in parameters, data order and random routing; the text, the code and the small scale are the
same in all of them, so no interval speaks about other texts or larger models. Runs of several
budgets count as so many differences though they share their seeds; where budgets stand apart, read
each by itself. With many claims, one in twenty such intervals misses by chance.
"""

_CLOSING = """\
All arms at one size, {size}, and equal training FLOPs, from the lowest causal loss to the highest.
*Slots* are those filled per token under the causal rule; top-k fills the capacity. A rule that
fills more spends more, and its loss is no fair win. Whiskers are standard deviations over seeds.
"""

_AGAINST = """\
Pairs of runs of one seed and budget, over all budgets. `mod` is the raw gate, the running quantile
at rate 0.03, and the last fifth of training under it. An interval that holds 0 does not tell an arm
from it.
"""

_LEARNED = """\
Every size and budget at which both were run, by the steps that the router had to learn in. Above 0,
learned routing is better than routing by noise.
"""

_LEAK = """\
Arms that train under top-k to the end and are then run under the running quantile. What top-k knows
of the future is in the first loss and not in the second; so is whatever the rule gets wrong.
Whiskers are standard deviations over seeds, brackets intervals for the mean.
"""


@dataclasses.dataclass(frozen=True)
class Studies:
    """What `studies` finds in a store.

    **Attributes:**

    - `size`: the reference, at which arms are compared.
    """

    size: str
    closing: list[Closing]
    against: list[Against]
    learned: list[Learned]
    leaks: list[Leak]


def run_claims(asked: Claims, console: Console) -> None:
    """Write `claims.md`, `claims.json`, `gap.png` and `leak.png`, and print the verdicts.

    **Raises:** `ValueError` where there is no store, or one whose records cannot be compared.
    """
    settings = read_settings(asked.out)
    if not is_sweep(settings):
        raise ValueError(
            f"`out` must be a folder of `mode-lab isoflop`, got {asked.out}, of another command."
        )
    store = Store(asked.out)
    records = store.all()
    check_alike(records, settings, asked.out)
    reference = Size(**settings["reference"])
    cells, over_sizes = Cells(records, reference), curves(records, reference)
    findings = [(claim, claim.test(cells, over_sizes)) for claim in CLAIMS]
    arms = comparable(cells, [arm.name for arm in VARIANTS])
    found = Studies(
        size_name(reference),
        closing(cells, arms),
        against_default(cells, arms),
        learned(cells),
        leaks(cells),
    )
    if found.closing:
        write_atomically(asked.out / "gap.png", lambda beside: plot_closing(beside, found.closing))
    if found.leaks:
        write_atomically(asked.out / "leak.png", lambda beside: plot_leaks(beside, found.leaks))
    write_json(asked.out / "claims.json", _record(findings, found))
    text = _markdown(findings, found)
    names = {record.run.arm for record in records}
    text += ["## The arms", "", *_arms(names), ""]
    made = ["## Made with", "", *made_with(records, settings)]
    write_text(asked.out / "claims.md", "\n".join([*text, *made]))
    table = Table(title="Claims", title_justify="left", box=rich.box.SIMPLE)
    for name in ("claim", "source", "verdict", "numbers"):
        table.add_column(name, overflow="fold")
    for row in _rows(findings):
        table.add_row(*row)
    console.print(table)
    console.print(f"See {asked.out / 'claims.md'}.", highlight=False)


def _arms(names: Container[str]) -> list[str]:
    return [f"- `{arm.name}`: {arm.description}" for arm in VARIANTS if arm.name in names]


def _rows(findings: Sequence[tuple[Claim, Finding]]) -> list[list[str]]:
    return [
        [claim.statement, claim.source, finding.verdict or "not run", finding.numbers]
        for claim, finding in findings
    ]


def _markdown(findings: Sequence[tuple[Claim, Finding]], studies: Studies) -> list[str]:
    heads = ("claim", "section", "test", "numbers", "verdict")
    rows = [
        [
            *(claim.statement, claim.source, claim.how),
            *(finding.numbers, f"**{finding.verdict or 'not run'}**"),
        ]
        for claim, finding in findings
    ]
    lines = ["# The paper's claims, tested", "", *markdown_table(heads, rows), _READING]
    if studies.closing:
        lines += ["## Closing the gap", "", "![From top-k to causal loss](gap.png)", ""]
        lines += [_CLOSING.format(size=studies.size)]
        lines += markdown_table(
            ("training FLOPs", "arm", "top-k", "causal", "gap", "slots"),
            [_closing_row(row) for row in studies.closing],
        )
    if studies.against:
        lines += ["## Against the default", "", _AGAINST]
        lines += markdown_table(
            ("arm", "causal loss less that of mod", "slots"),
            [[row.arm, row.causal.text(4), _slots(row.slots)] for row in studies.against],
        )
    if studies.learned:
        lines += ["## What learning to route gains", "", _LEARNED]
        lines += markdown_table(
            ("size", "training FLOPs", "steps", "mod-random less mod, causal"),
            [
                [size_name(row.size), f"{row.budget:.3g}", f"{row.steps:,}", row.gain.text(4)]
                for row in studies.learned
            ],
        )
    if studies.leaks:
        lines += ["## The leak", "", "![Gap against group and layers](leak.png)", "", _LEAK]
        lines += markdown_table(
            ("arm", "varied", "value", "causal above top-k"),
            [
                [row.arm, row.field, f"{row.value}", row.share.text(2, " %")]
                for row in studies.leaks
            ],
        )
    return lines


def _closing_row(row: Closing) -> list[str]:
    return [
        *(f"{row.budget:.3g}", row.arm, f"{row.top_k.mean:.4f}", f"{row.causal.mean:.4f}"),
        "-" if row.gap.low == row.gap.high == 0 else row.gap.text(4),
        _slots(None if row.compute is None else row.compute.mean),
    ]


def _slots(filled: float | None) -> str:
    return "-" if filled is None else f"{filled:.3f}"


def _record(
    findings: Sequence[tuple[Claim, Finding]], studies: Studies
) -> dict[str, list[dict[str, object]]]:
    return {
        "claims": [
            {
                "statement": claim.statement,
                "source": claim.source,
                "test": claim.how,
                **dataclasses.asdict(finding),
            }
            for claim, finding in findings
        ],
        "closing": [dataclasses.asdict(row) for row in studies.closing],
        "learned": [dataclasses.asdict(row) for row in studies.learned],
        "against_default": [dataclasses.asdict(row) for row in studies.against],
        "leak": [dataclasses.asdict(row) for row in studies.leaks],
    }
