"""Records in files, files that are whole or absent, locks, tables and printed text."""

import dataclasses
import io
import json
import math
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from rich.console import Console

from mode.lab import console, files, tables
from mode.lab.files import DamagedFile, FloatOrNaN, Record, read_record, write_record
from mode.lab.options import Size


class Example(Record):
    """A record of every kind of field."""

    format = "an example"
    version = 2

    count: int
    mean: FloatOrNaN
    losses: tuple[float, ...]
    size: Size
    maybe: float | None
    name: str


EXAMPLE = Example(
    count=3, mean=math.nan, losses=(1, 0.1), size=Size(dim=8), maybe=None, name="ärm | [x]"
)


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "[v1].json"
    write_record(path, EXAMPLE)
    again = read_record(path, Example)
    assert math.isnan(again.mean)
    assert again.model_copy(update={"mean": 0.0}) == EXAMPLE.model_copy(update={"mean": 0.0})
    assert files.read_format(path) == "an example"
    envelope = json.loads(path.read_text(encoding="utf-8"), parse_constant=pytest.fail)
    assert list(envelope) == ["format", "version", "digest", "content"]
    assert os.listdir(tmp_path) == ["[v1].json"]


def _change(**fields: Any) -> Callable[[dict[str, Any]], object]:
    return lambda envelope: envelope["content"].update(fields)


CHANGES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "another format": (lambda e: e.update(format="b"), "its format is 'b', not 'an example'"),
    "a newer version": (lambda e: e.update(version=3), "its version is 3, not 2. A newer mode-lab"),
    "an older version": (lambda e: e.update(version=1), "its version is 1, not 2. An older"),
    "no digest": (lambda e: e.pop("digest"), "it is JSON, but not a record of mode-lab"),
    "another number": (_change(count=4), "its content was changed"),
    "a digit less": (_change(losses=[1, 0]), "its content was changed"),
    "a number too large": (_change(count=10**400), "its content was changed"),
    "a string": (_change(count="3"), "field `count`: input should be a valid integer, got '3'"),
    "a bool": (_change(count=True), "field `count`: input should be a valid integer"),
    "null": (_change(count=None), "field `count`: input should be a valid integer, got 'None'"),
    "not a number": (_change(maybe=math.nan), "field `maybe`: input should be a finite number"),
    "a list": (_change(size=[]), "field `size`: "),
    "out of range": (_change(size=dataclasses.asdict(Size(dim=0))), "field `size.dim`: input"),
    "a field more": (_change(more=1), "field `more`: extra inputs are not permitted"),
    "a field less": (lambda e: e["content"].pop("count"), "field `count` is missing"),
    "a default less": (lambda e: e["content"]["size"].pop("dim"), "a field is missing"),
    "content of another kind": (lambda e: e.update(content=[]), "it is JSON, but not a record"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_record_is_refused(tmp_path: Path, change: str) -> None:
    path = tmp_path / "record.json"
    write_record(path, EXAMPLE)
    envelope = json.loads(path.read_text())
    harm, what = CHANGES[change]
    harm(envelope)
    path.write_text(json.dumps(envelope))
    with pytest.raises(DamagedFile) as caught:
        read_record(path, Example)
    assert str(caught.value).startswith(f"{path}: {what}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "it is empty"),
        (b" \n", "it is empty"),
        (b"\xff\xfe", "it is not text in UTF-8"),
        (b'{"format": "an ex', "it is not JSON"),
        (b"[" * 10**5, "it is not JSON"),
        (b"9" * 10**5, "it is not JSON"),
        *((text.encode(), "it is JSON, but not a record") for text in ("[]", "3", "null", '"x"')),
        (b"{}", "it is JSON, but not a record"),
    ],
)
def test_what_is_no_record_is_refused(tmp_path: Path, content: bytes, what: str) -> None:
    path = tmp_path / "record.json"
    path.write_bytes(content)
    for read in (lambda: read_record(path, Example), lambda: files.read_format(path)):
        with pytest.raises(DamagedFile) as caught:
            read()
        assert str(caught.value).startswith(f"{path}: {what}")
        assert str(caught.value).endswith("Delete it, and run the command that made it again.")


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DamagedFile, match="there is no such file"):
        read_record(tmp_path / "nowhere.json", Example)
    with pytest.raises(DamagedFile, match="it is a folder or a device"):
        read_record(tmp_path, Example)


@pytest.mark.parametrize("field", ["maybe", "losses"])
def test_a_number_that_is_not_finite_is_not_written(field: str) -> None:
    value = math.inf if field == "maybe" else (math.nan,)
    with pytest.raises(ValueError, match="finite number"):
        Example(**{**dict(EXAMPLE), field: value})


def test_a_write_that_fails_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "text"
    files.write_text(path, "old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"text: it cannot be written \(No space left on device\)"):
        files.write_text(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["text"]
    with pytest.raises(OSError, match="nowhere/text: it cannot be written"):
        files.write_text(tmp_path / "nowhere" / "text", "new")


def test_temporary_files_of_dead_processes_are_removed(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    host = socket.gethostname()
    owners = {f"{host}-{dead.pid}": False, f"{host}-{os.getppid()}": True}
    owners |= {f"other-{dead.pid}": True}
    for owner in owners:
        (tmp_path / f".text.{owner}.part").touch()
    files.write_text(tmp_path / "text", "new")
    left = {name for name in os.listdir(tmp_path) if name.endswith(".part")}
    assert left == {f".text.{owner}.part" for owner, stays in owners.items() if stays}


def test_a_lock_has_one_owner(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with files.lock(path) as one, files.lock(path) as other:
        assert (one, other) == (True, False)
        code = "import sys, pathlib\nfrom mode.lab import files\n"
        code += "with files.lock(pathlib.Path(sys.argv[1])) as lock: print(lock)"
        command = [sys.executable, "-c", code, str(path)]
        assert subprocess.check_output(command, text=True) == "False\n"
    with files.lock(path) as again:
        assert again


FRAME = pd.DataFrame(
    {"arm": ["a|b", "*c* [d](e)"], "loss": [1.23456, math.nan], "steps | all": [1, 20]}
)


def test_a_table_in_markdown() -> None:
    lines = tables.to_markdown(FRAME, {"loss": ".3f"}, bold=[0]).splitlines()
    cells = [[cell.strip() for cell in line.split(" | ")] for line in lines]
    assert cells[0] == ["| arm", "loss", r"steps \| all |"]
    assert cells[2] == [r"| **a\|b**", "**1.235**", "**1** |"]
    assert cells[3] == [r"| \*c\* \[d\](e)", "-", "20 |"]
    assert lines[1].startswith("|:--")
    assert lines[1].endswith("--:|")


def test_a_table_in_a_console() -> None:
    shown = Console(file=io.StringIO(), width=60)
    shown.print(tables.to_console(FRAME, {"loss": ".3f"}, title="[b]title", bold=[0]))
    assert isinstance(shown.file, io.StringIO)
    text = shown.file.getvalue()
    for words in ("[b]title", "a|b", "*c* [d](e)", "1.235"):
        assert words in text


def test_text_is_printed_as_it_is() -> None:
    shown = Console(file=io.StringIO(), width=20)
    text = "runs/[v1]/[/b] " + "long " * 20 + ":smile:"
    console.say(shown, text)
    assert isinstance(shown.file, io.StringIO)
    assert shown.file.getvalue() == text + "\n"


def test_a_console_takes_any_text() -> None:
    code = "from mode.lab.console import make_console, say; say(make_console(), 'läufe →')"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    printed = subprocess.check_output([sys.executable, "-c", code], text=True, env=environment)
    assert printed == "l\\xe4ufe \\u2192\n"
