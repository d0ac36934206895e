"""One table of the main command over several seeds.

    for seed in 0 1 2; do
      mode-lab ablate --seed $seed --out runs/ablations/$seed --no-recall \
        --arms dense left-out mod mod-random
    done

`tables.py` prints it with the other tables of EVIDENCE.md.
"""

from pathlib import Path

import pandas as pd

from mode.lab.files import read_record
from mode.lab.intervals import Interval
from mode.lab.tables import Tables


_CAUSAL = "bits / byte, CAUSAL"
# Of the reports, and of the table of EVIDENCE.md.
_COMPARISONS = {"equal FLOPs": "equal FLOPs", "recovery": "equal steps"}


def table(folder: Path) -> pd.DataFrame:
    """Compares the causal losses of all arms with those of `mod-random`, seed by seed."""
    reports = [read_record(path, Tables).tables for path in sorted(folder.glob("*/report.json"))]
    rows = []
    for name, comparison in _COMPARISONS.items():
        columns = [(report[name]["arm"], report[name][_CAUSAL]) for report in reports]
        seeds = [dict(zip(arms, losses, strict=True)) for arms, losses in columns]
        losses = pd.DataFrame(seeds).astype(float)
        for arm in losses:
            difference = losses[arm] - losses["mod-random"]
            rows.append(
                {
                    "at": comparison,
                    "arm": arm,
                    "causal, by seed": " ".join(f"{loss:.3f}" for loss in losses[arm]),
                    "minus mod-random": (
                        None if arm == "mod-random" else Interval.of(difference).text("+.3f")
                    ),
                }
            )
    return pd.DataFrame(rows)
