"""A sweep that trains: killed, continued, repeated and reported."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mode.lab.commands import Claims
from mode.lab.data import read_corpus
from mode.lab.evidence.claims import CLAIMS
from mode.lab.evidence.commands import run_claims, run_isoflop
from mode.lab.evidence.presets import Grid, Preset, sweep_arms
from mode.lab.evidence.records import Store
from mode.lab.evidence.report import report_sweep
from mode.lab.options import Recipe
from tests.lab.helpers import quiet, said
from tests.lab.records import REFERENCE, made_up
from tests.lab.runs import isoflop


def kill_after_the_first_run(out: Path, texts: str) -> None:
    """Starts the same sweep in a process of its own, and kills it when it has a record."""
    code = (
        "from pathlib import Path; from tests.lab.test_sweep import isoflop, quiet, run_isoflop;"
        f"run_isoflop(isoflop(Path({str(out)!r}), {texts!r}), quiet())"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[2])
    try:
        while not list((out / "records").glob("*.json")):
            assert process.poll() is None
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
    finally:
        process.kill()
        process.wait()


def test_a_sweep_from_its_first_run_to_the_verdicts(tmp_path: Path, texts: str) -> None:
    """Killed, continued, repeated, reported: one test, as every size takes long to compile."""
    out = tmp_path / "out"
    kill_after_the_first_run(out, texts)
    store = Store(out)
    grid = Grid(sweep_arms("dense"), (REFERENCE,), (2e8,))
    corpus = read_corpus(texts, length=32).fingerprint
    settings = Preset("", REFERENCE, (grid,), (0.01,), 4).settings(Recipe(), corpus)
    kept = store.all(settings)
    assert 1 <= len(kept) < 3
    run_isoflop(isoflop(out, texts), quiet())
    records = store.all(settings)
    assert len(records) == 3
    assert all(record in records for record in kept)
    for record in records:
        assert abs(record.steps * record.step_flops - 2e8) <= record.step_flops / 2
        assert record.end.step == record.steps
        assert 5 <= len(record.marks) <= 8
        assert record.seconds["waiting"] < record.seconds["training"]
        assert len(record.losses) == min(100, record.steps)
    report = (out / "report.md").read_text()
    assert "| dense | 3 x 1" in " ".join(report.split())
    assert (out / "isoflop.png").read_bytes().startswith(b"\x89PNG")
    # A run that is missing is run again, with the same result, and no other is.
    before = next(record for record in records if record not in kept)
    stamps = {path: path.stat().st_mtime_ns for path in (out / "records").iterdir()}
    store.path(before.run).unlink()
    console = quiet()
    run_isoflop(isoflop(out, texts), console)
    assert "3 runs, 2 of them finished before" in said(console)
    after = store.get(before.run)
    assert after is not None
    assert (after.end, after.marks, after.losses) == (before.end, before.marks, before.losses)
    assert sum(path.stat().st_mtime_ns != stamp for path, stamp in stamps.items()) == 1
    # The claims, and the report alone.
    console = quiet()
    run_claims(Claims(out), console)
    assert "not run" in said(console)
    results = json.loads((out / "claims.json").read_text())
    assert [result["verdict"] for result in results] == ["not run"] * len(CLAIMS)
    assert "no such runs" in (out / "claims.md").read_text()
    (out / "report.md").unlink()
    report_sweep(out, quiet())
    assert "| dense | 3 x 1" in " ".join((out / "report.md").read_text().split())
    with pytest.raises(ValueError, match=r"same configuration, got .*\n.*held_out: 4 there, 8 "):
        run_isoflop(isoflop(out, texts, held_out=8), quiet())
    # A record of another text.
    store.add(made_up("mod", 2.0))
    with pytest.raises(ValueError, match=r"runs of one corpus"):
        run_claims(Claims(out), quiet())
