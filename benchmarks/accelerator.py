"""All measures on one accelerator, in bfloat16, in one command of at most ten minutes.

Blocks at 4k, 8k and 32k tokens (dense, the same with `jax.nn`'s fused attention, dense on the
selected number of tokens, Mixture-of-Depths, MoE, MoDE), decoding at batch 1 to 256, and training
steps of about 100 million and 1 billion parameters. Each has a process of its own, as the peak of
memory is that of a process. What did not fit into the time is named; results so far are in
`--out` after each measure.

    pip install ".[lab]" "jax[cuda13]" && python benchmarks/accelerator.py
    python benchmarks/accelerator.py --tiny     # to see that it runs, on any machine
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
from accelerator_parts import LAYERS
from accelerator_training import MODELS

from mode.lab.files import write_text
from mode.lab.tables import to_markdown


FOLDER = Path(__file__).parent
LENGTHS, TINY_LENGTHS = (4096, 8192, 32_768), (128, 256)
BATCHES, TINY_BATCHES = (1, 8, 64, 256), (1, 4)
Measure = tuple[str, list[str]]  # the section, and the command after Python


def plan(tiny: bool) -> list[Measure]:
    """The measures, what answers most first."""
    parts, extra = str(FOLDER / "accelerator_parts.py"), ["--tiny"] if tiny else []
    training = str(FOLDER / "accelerator_training.py")
    lengths, batches = (TINY_LENGTHS, TINY_BATCHES) if tiny else (LENGTHS, BATCHES)
    blocks = [
        ("blocks", [parts, layer, str(length), *extra]) for length in lengths for layer in LAYERS
    ]
    decoding = [("decoding", [parts, "decoding", str(batch), *extra]) for batch in batches]
    steps = [("training", [training, "--one", name, *extra]) for name in MODELS]
    return blocks + decoding + steps


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as Markdown."""
    frame = pd.DataFrame(rows)
    numbers = frame.select_dtypes("float").columns
    return to_markdown(frame, dict.fromkeys(numbers, ".4g")) + "\n"


def write(out: Path, about: str, rows: dict[str, list[dict[str, Any]]]) -> None:
    """Writes all results so far, as JSON and as tables."""
    out.mkdir(parents=True, exist_ok=True)
    tables = "\n".join(table(each) for each in rows.values() if each)
    write_text(out / "results.json", json.dumps({"about": about, **rows}, indent=1))
    write_text(out / "results.md", f"{about}\n\n{tables}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/accelerator"))
    parser.add_argument("--minutes", type=float, default=9.5)
    parser.add_argument("--tiny", action="store_true", help="small models, to see that it runs")
    options = parser.parse_args()
    deadline = time.monotonic() + 60 * options.minutes
    ask = "import jax; print(f'{jax.devices()[0].device_kind}, jax {jax.__version__}')"
    about = subprocess.run([sys.executable, "-c", ask], check=True, capture_output=True, text=True)
    rows: dict[str, list[dict[str, Any]]] = {"blocks": [], "decoding": [], "training": []}
    left_out: list[str] = []
    for section, command in plan(options.tiny):
        name = " ".join(command[1:])
        remaining = deadline - time.monotonic()
        try:
            done = subprocess.run(
                [sys.executable, *command],
                check=True,
                capture_output=True,
                text=True,
                timeout=max(remaining, 0.1),
            )
        except subprocess.TimeoutExpired:
            left_out.append(f"{name}: no time was left")
            continue
        except subprocess.CalledProcessError as error:
            left_out.append(f"{name}: {error.stderr.strip().splitlines()[-1][:200]}")
            continue
        rows[section].append(json.loads(done.stdout.strip().splitlines()[-1]))
        write(options.out, about.stdout.strip(), rows)
        print(f"{name}: {rows[section][-1]}", flush=True)
    print((options.out / "results.md").read_text())
    for line in left_out:
        print(f"left out: {line}")
    sys.exit(1 if left_out else 0)
