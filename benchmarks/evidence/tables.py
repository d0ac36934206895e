r"""The tables of EVIDENCE.md, computed from the records in `records.tar.gz`.

    python benchmarks/evidence/tables.py            # says where EVIDENCE.md differs
    python benchmarks/evidence/tables.py --write    # puts them in
    python benchmarks/evidence/tables.py --write \
      --pack-from runs/evidence runs/forms runs/ablations

In EVIDENCE.md a table stands between `<!-- NAME -->` and `<!-- /NAME -->`.
"""

import re
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

import ablations
import forms
import pandas as pd
import studies
import tyro
from rich.console import Console

from mode.lab.evidence.claims import CLAIMS
from mode.lab.evidence.frame import Runs, to_frame
from mode.lab.evidence.records import Store, SweepSettings
from mode.lab.evidence.report import report_sweep
from mode.lab.folder import read_settings
from mode.lab.tables import to_markdown


HERE = Path(__file__).parent
# The arms that were run with five seeds at the larger budget, too.
MAIN = ("dense", "left-out", "mod", "mod-random", "mod-queries", "mod-queries-random")
ARCHIVE, TEXT = HERE / "records.tar.gz", HERE.parent / "EVIDENCE.md"


def pack(evidence: Path, tasks: Path, seeds: Path) -> None:
    """Packs what the tables need of the folders, under fixed names."""
    files = [
        *(("evidence", evidence, path) for path in evidence.rglob("*.json")),
        *(("forms", tasks, path) for path in tasks.rglob("*.json")),
        *(("ablations", seeds, path) for path in seeds.glob("*/report.json")),
    ]
    with tarfile.open(ARCHIVE, "w:gz") as archive:
        for name, folder, path in sorted(files):
            archive.add(path, f"{name}/{path.relative_to(folder)}")


def squeeze(table: str) -> str:
    """Takes the padding out of a table."""
    cells = re.sub(r"-{3,}", "---", re.sub(r" *\| *", " | ", table))
    return "\n".join(line.strip() for line in cells.strip().splitlines())


def compute(folder: Path) -> Iterator[tuple[str, str]]:
    """Computes all tables, with their names, from the unpacked archive."""
    evidence, tasks = folder / "evidence", folder / "forms"
    settings = read_settings(evidence, SweepSettings)
    runs = Runs.of(to_frame(Store(evidence).all(settings)), settings.reference)
    report_sweep(evidence, Console(quiet=True))
    report = (evidence / "report.md").read_text()
    for name, title in (("curves", "Loss against size"), ("rates", "Learning rates")):
        yield name, next(iter(tables_of(report.split(title, 1)[1])))
    rows = [(claim.statement, claim.source, *claim.test(runs)) for claim in CLAIMS]
    columns = pd.Index(["claim", "source", "numbers", "verdict"])
    yield "claims", to_markdown(pd.DataFrame(rows, columns=columns))
    names = {"budget": "training FLOPs", "shape": "size", "gain": "mod-random minus mod, causal"}
    formats = {"training FLOPs": ".3g", "steps": ","}
    learning = studies.gain_of_learning(runs)[["shape", "budget", "steps", "gain"]]
    yield "learning", to_markdown(learning.rename(columns=names), formats)
    yield "batch", to_markdown(studies.by_batch(runs).rename(columns=names), formats)
    smallest = min(runs.frame["budget"])
    yield "ablations", to_markdown(ablations.table(folder / "ablations"))
    yield "forms", to_markdown(forms.table(runs, tasks, smallest), forms.FORMATS)
    for budget in sorted(set(runs.frame["budget"]))[1:]:
        rows = forms.losses(runs, budget)
        yield "more", to_markdown(rows[rows["arm"].isin(MAIN)], forms.FORMATS)


def tables_of(text: str) -> list[str]:
    """Finds the tables in a page."""
    return re.findall(r"(?:^\|.*\n?)+", text, flags=re.MULTILINE)


def main(write: bool = False, pack_from: tuple[Path, Path, Path] | None = None) -> int:
    """Compare the tables of EVIDENCE.md with the records, or write them.

    Args:
        write: Write them.
        pack_from: First make the archive, of the folders of the runs, the tasks and the ablations.
    """
    if pack_from is not None:
        pack(*pack_from)
    text = before = TEXT.read_text()
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(ARCHIVE) as archive:
            archive.extractall(folder, filter="data")
        for name, table in compute(Path(folder)):
            start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
            assert start in text, f"EVIDENCE.md has no place for {name}"
            head, rest = text.split(start, 1)
            text = f"{head}{start}\n{squeeze(table)}\n{end}{rest.split(end, 1)[1]}"
    if write:
        TEXT.write_text(text)
    elif text != before:
        print("EVIDENCE.md is not what the records say. Run this with `--write`.")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
