"""What people expect of any command: help with examples, a version, quiet, exit codes, completion.

And JSON beside every table. Nothing is trained here.
"""

import dataclasses
import json
import math
import re
import shlex
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from mode.lab import __main__ as lab
from mode.lab.__main__ import main
from mode.lab.commands import TASK_RECIPE
from mode.lab.console import progress, say, say_progress
from mode.lab.evidence.records import SEARCH_SEED, Store
from mode.lab.files import read_record
from mode.lab.folder import claim
from mode.lab.intervals import Interval
from mode.lab.parse import COMMANDS, parse
from mode.lab.tables import Tables, write_tables
from mode.lab.tasks.records import Score, TaskResult, TaskSettings, write_result
from tests.lab.records import REFERENCE, SETTINGS, made_up


def ending(args: list[str]) -> int:
    """The exit code of a command, however it ends."""
    try:
        return main(args)
    except SystemExit as end:
        return int(end.code or 0)


@pytest.fixture
def help_text(capsys: pytest.CaptureFixture[str]) -> str:
    """What `mode-lab --help` prints."""
    assert ending(["--help"]) == 0
    return capsys.readouterr().out


def test_the_examples_of_the_help_are_command_lines(
    help_text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those of most commands, each as it is parsed."""
    part = help_text.split("\nExamples:\n")[1].split("\n\n")[0]
    lines = [re.split(r" > |\s{3,}", line.strip())[0] for line in part.splitlines()]
    names = set()
    for name, *words in map(shlex.split, lines):
        assert name == "mode-lab"
        if words[-1] == "--help":
            assert ending(words) == 0
            assert "Examples:" not in capsys.readouterr().out
        else:
            names.add(parse(words).name)
    assert {"ablate", "tasks", "train", "generate", "plan"} <= names <= set(COMMANDS)


def test_the_help_has_the_exit_codes(help_text: str) -> None:
    """Those of `main`, and those of the shell for signals."""
    part = help_text.split("\nExit codes:\n")[1].split("\n\n")[0]
    assert re.findall(r"^  (\d+) ", part, flags=re.MULTILINE) == [
        *("0", "2", "70", "130", "141", "143")
    ]


def test_a_pipe_that_is_closed_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `| head` closes it: in a process of its own, whose standard output is lost."""
    code = (
        "import sys\nfrom mode.lab import __main__ as lab\n"
        "def fail(*_): raise BrokenPipeError\n"
        "lab.command = lambda name: fail\nsys.exit(lab.main(['report']))"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout, ended.stderr) == (141, "", "")


@pytest.mark.parametrize("words", ["--version", "--quiet --version", "--version train"])
def test_the_version(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    """It needs no command, and starts none."""
    assert main(words.split()) == 0
    assert capsys.readouterr().out == f"mode-lab {metadata.version('mode-jax')}\n"


@pytest.mark.parametrize("words", ["report --quiet", "--quiet report", "report"])
def test_quiet_shows_results_and_no_progress(
    words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before the command or behind it; an error goes to the standard error either way."""

    def command(name: str) -> Any:
        def work(options: Any, console: Any) -> None:
            say_progress(console, "step 1")
            with progress(console, 1) as bars, bars.arm("mod", 2, log_every=1) as watch:
                watch(1, 2.0)
            say(console, "the result")
            raise ValueError("what was wrong")

        return work

    monkeypatch.setattr(lab, "command", command)
    assert main(words.split()) == 2
    shown = capsys.readouterr()
    told = [] if "--quiet" in words else ["step 1", "step 1 of 2, 2.000 bits per byte"]
    assert shown.out.splitlines() == [*told, "the result"]
    assert shown.err == "mode-lab: what was wrong\n"


def test_completion_in_bash(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a command, of its options and of their values."""
    assert ending(["--tyro-print-completion", "bash"]) == 0
    script = tmp_path / "completion"
    script.write_text(capsys.readouterr().out)
    if shutil.which("bash") is None:
        pytest.skip("needs bash")
    tries = {
        "tr": ["train"],
        "train --ou": ["--out"],
        "train --recipe.on-nonfinite s": ["stop", "skip"],
    }
    for line, expected in tries.items():
        words = shlex.join(["mode-lab", *line.split()])
        code = f"COMP_WORDS=({words}) COMP_CWORD={len(line.split())}; _tyro_mode_lab"
        shell = ["bash", "-c", f'. "$0"; {code}; echo "${{COMPREPLY[@]}}"', str(script)]
        assert subprocess.check_output(shell, text=True).split() == expected
    assert ending(["--tyro-print-completion", "dos"]) == 2
    assert "bash, zsh or fish, got 'dos'" in capsys.readouterr().err


def tables_of(out: Path) -> dict[str, dict[str, Any]]:
    """The tables of `report.json`, as any reader of JSON has them."""
    read_record(out / "report.json", Tables)
    return json.loads((out / "report.json").read_text())["content"]["tables"]


def test_cells_as_json(tmp_path: Path) -> None:
    """Numbers are not rounded, parts stay apart, and what JSON has no word for is `null`."""
    frame = pd.DataFrame(
        {
            "text": ["a|b", None],
            "number": [1 / 3, math.inf],
            "count": np.array([1, 2]),
            "routers": [(0.5, None), ()],
            "seeds": [Interval.of([1.0, 3.0]), Interval.of([np.float64(2.0)])],
        }
    )
    write_tables(tmp_path / "report.json", {"one": frame})
    one = tables_of(tmp_path)["one"]
    assert one["text"] == ["a|b", None]
    assert one["number"] == [1 / 3, None]
    assert one["count"] == [1, 2]
    assert one["routers"] == [[0.5, None], []]
    assert one["seeds"][0]["mean"] == 2.0
    assert one["seeds"][1] == {"mean": 2.0, "low": None, "high": None, "count": 1}


def test_a_sweep_s_tables_are_json_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Curves, rates and runs."""
    claim(tmp_path, SETTINGS.model_copy(update={"rates": (0.01, 0.02)}))
    store = Store(tmp_path)
    for number, dim in enumerate((16, 24, 32)):
        size = dataclasses.replace(REFERENCE, dim=dim)
        loss = 2.0 + 0.1 * (number - 1) ** 2
        for seed in (0, 1):
            store.add(made_up("dense", loss, size=size, seed=seed, parameters=1000 * dim))
        for rate in (0.01, 0.02):
            store.add(made_up("dense", loss + rate, size=size, seed=SEARCH_SEED, rate=rate))
    assert main(["report", "--quiet", "--out", str(tmp_path)]) == 0
    assert "Loss against size" in capsys.readouterr().out
    tables = tables_of(tmp_path)
    assert set(tables) == {"curves", "rates", "runs"}
    assert tables["curves"]["sizes x seeds"] == ["3 x 2"]
    assert tables["curves"]["loss there"][0] == pytest.approx(2.0, abs=0.01)
    assert tables["rates"]["0.02"] == pytest.approx([2.12, 2.02, 2.12])
    assert tables["runs"]["causal"] == pytest.approx([2.1, 2.0, 2.1])


def test_the_tasks_tables_are_json_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One for each task; the text has the same numbers, rounded."""
    claim(tmp_path, TaskSettings(recipe=TASK_RECIPE, density=0.0625, steps=2))
    kinds = ("key", "value", "question", "filler")
    hits = {kind: 0.125 * number for number, kind in enumerate(kinds)}
    for seed, accuracy in enumerate((0.5, 0.75)):
        routed = Score(accuracy=accuracy, hits=hits, classes=((0, 1),), selected=((True, False),))
        dense = Score(accuracy=1.0, hits={}, classes=(), selected=())
        for arm, score in (("learned", routed), ("dense", dense)):
            result = TaskResult(task="recall", arm=arm, seed=seed, top_k=score, causal=None)
            write_result(tmp_path, result)
    assert main(["report", "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    table = tables_of(tmp_path)["recall"]
    assert table["arm"] == ["dense", "learned"]
    interval = table["accuracy, CAUSAL"][1]
    assert (interval["mean"], interval["count"]) == (0.625, 2)
    assert table["slots: filler"] == [None, 0.375]
    half = interval["high"] - interval["mean"]
    for text in (shown, (tmp_path / "report.md").read_text()):
        assert f"0.625 ± {half:.3f}" in text
        assert "0.38" in text
