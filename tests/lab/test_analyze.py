"""`mode-lab analyze`: the passage it shows, and what the command writes, of any text."""

import collections
import itertools
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from mode.lab import analysis_report
from mode.lab.__main__ import main
from mode.lab.analysis_report import AnalysisRecord
from mode.lab.analyze import run_analysis
from mode.lab.commands import Analysis
from mode.lab.data import Sequences, read_corpus
from mode.lab.figures import STYLE
from mode.lab.files import read_record
from mode.lab.options import Size
from mode.lab.passage import find_passage, glyphs, lines_of
from mode.lab.routing_map import plot_generated
from tests.lab.helpers import LINE, documents, quiet, said, slow_class
from tests.lab.runs import untrained


SIZE = Size(dim=8, depth=4, heads=1, length=32, batch=3, experts=2, noop=1, capacity=0.25)


# The passage.


@pytest.mark.parametrize("length", [8, 100, 4096])
def test_the_passage_is_a_piece_of_the_text_in_lines(length: int) -> None:
    binary = bytes(range(256)) * 40
    text = "".join(LINE.format(n) for n in range(200))
    source = Sequences(documents(binary, text), length)
    passage = find_passage(source)
    rows = np.stack([source[row]["tokens"][:-1] for row in passage.rows])
    assert np.array_equal(passage.cut(rows[None])[0], passage.tokens)
    assert bytes(passage.tokens.tolist()).decode() in text
    assert passage.document == "1"
    assert len(passage.tokens) > 300
    for place in passage.sequence_starts():
        assert (passage.part.start + place) % length == 0
    lines = [passage.tokens[line].tolist() for line in lines_of(passage.tokens, 30)]
    assert list(itertools.chain(*lines)) == passage.tokens.tolist()
    assert all(len(line) <= 30 and 10 not in line[:-1] for line in lines)


def test_short_and_odd_texts_have_a_passage() -> None:
    for text in ("a", "ab\n", "\n" * 300, b"\xff\xfe" * 100, "née d'où " * 9):
        source = Sequences(documents(text), 32)
        passage = find_passage(source)
        assert 1 <= len(passage.tokens) <= len(source.documents.tokens) - 1
        assert len(glyphs(passage.tokens)) == len(passage.tokens)
    characters = glyphs(np.array([256, *"é€😀".encode(), 0xC3]))
    assert characters == ["\ufffd", "é", "", "€", "", "", "😀", "", "", "", "\ufffd"]


# The command.


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("texts")
    for number in range(12):
        (folder / f"{number}.txt").write_text(LINE.format(number) * 12)
    return str(folder / "*.txt")


@pytest.fixture(scope="module")
def staged(tmp_path_factory: pytest.TempPathFactory, texts: str) -> Path:
    return untrained(tmp_path_factory.mktemp("staged") / "run [1]", texts, "mode-staged", SIZE)


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes most of the time, and not every test is about it."""
    monkeypatch.setattr(analysis_report, "plot_analysis", lambda *_: [])


def analysed(options: Analysis) -> tuple[str, AnalysisRecord]:
    """Runs the command, and returns what it printed and what it saved."""
    console = quiet()
    run_analysis(options, console)
    out = options.out or options.checkpoint / "analysis"
    return said(console), read_record(out / "analysis.json", AnalysisRecord)


def test_a_run_is_analysed_on_its_own_held_out_text(
    staged: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["analyze", "--checkpoint", str(staged), "--sequences", "7"]) == 0
    printed = capsys.readouterr().out
    assert "the run's held-out text" in printed
    assert "in 7 sequences of 32" in printed
    out = staged / "analysis"
    assert str(out / "analysis.md") in printed
    record = read_record(out / "analysis.json", AnalysisRecord)
    tables = {name: pd.DataFrame(columns) for name, columns in record.tables.items()}
    assert list(tables["totals"]["selection"]) == ["top-k", "causal"]
    for total in tables["totals"].to_dict("records"):
        selection = total["selection"]
        routers, classes = (
            tables[name][tables[name]["selection"] == selection] for name in ("routers", "classes")
        )
        assert list(routers["nested"]) == [False, False, True, True]
        assert math.isclose(classes["token_fraction"].sum(), 1)
        if total["compute"]:
            assert math.isclose(classes["compute_fraction"].sum(), 1)
    assert record.routing_map is not None
    text = bytes(record.routing_map.tokens).decode()
    assert "return" in text
    rows = [row for rows in record.routing_map.counts.values() for row in rows]
    assert {len(row) for row in rows} == {len(text)}
    page = (out / "analysis.md").read_text()
    pictures = [line.split("](")[1][:-1] for line in page.splitlines() if line.startswith("![")]
    assert len(pictures) == 6
    for picture in pictures:
        assert (out / picture).read_bytes().startswith(b"\x89PNG")
    assert not [path for path in out.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(
    "text", ["x", "Überall 日本語,\tnaïve café; 42 \x00 Ωμέγα.\r\n" * 20 + 99 * "7"]
)
def test_texts_of_the_users_own(staged: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "own.txt").write_bytes(text.encode())
    options = Analysis(staged, str(tmp_path / "*.txt"), out=tmp_path / "out")
    printed, record = analysed(options)
    assert "(1 file)" in printed
    assert "was trained on" not in printed
    # Each byte is predicted once, from the token before it.
    assert record.tables["totals"]["tokens"] == (len(text.encode()),) * 2
    tokens = [256, *text.encode()[:-1]]
    expected = collections.Counter(map(slow_class, [256, *tokens], tokens))
    classes = record.tables["classes"]
    for name, count in zip(classes["class"], classes["tokens"], strict=True):
        assert count == expected[str(name)]


@pytest.mark.usefixtures("no_pictures")
def test_it_says_what_the_model_was_trained_on(staged: Path, tmp_path: Path, texts: str) -> None:
    printed, _ = analysed(Analysis(staged, texts, sequences=2, out=tmp_path / "out"))
    held_out = len(read_corpus(texts, length=SIZE.length).held_out.names)
    assert f"was trained on {12 - held_out} of these files" in printed


def test_a_dense_model_routes_nothing(tmp_path: Path, texts: str) -> None:
    out = untrained(tmp_path / "run", texts, "dense", SIZE)
    printed, record = analysed(Analysis(out, sequences=4))
    assert "Nothing is routed" in printed
    assert record.routing_map is None
    assert record.routed_layers == ()
    assert "**Nothing is routed.**" in (out / "analysis/analysis.md").read_text()
    assert not list((out / "analysis").glob("*.png"))


def test_what_the_command_refuses(
    staged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refusal(*args: str) -> str:
        assert main(["analyze", *args]) == 2
        return capsys.readouterr().err

    at = ("--checkpoint", str(staged))
    (tmp_path / "file").write_text("")
    assert "has no config.json" in refusal("--checkpoint", str(tmp_path / "nowhere"))
    assert "`sequences` must be at least 1, got 0" in refusal(*at, "--sequences", "0")
    assert "`seed` must be at least 0, got -1" in refusal(*at, "--seed", "-1")
    assert "`out` must be a folder" in refusal(*at, "--out", str(tmp_path / "file"))
    assert "`data` must match" in refusal(*at, "--data", str(tmp_path / "*.none"))


# Pictures.


def test_the_style_is_in_the_package() -> None:
    assert STYLE.parent.name == "lab"
    assert "pdf.fonttype" in STYLE.read_text()


def test_a_generated_text_is_drawn(tmp_path: Path) -> None:
    tokens = np.array([256, *(LINE * 40).format(1).encode()])
    counts = np.arange(2 * len(tokens)).reshape(2, -1) % 2
    plot_generated(tmp_path / "text.png", tokens, counts, 5, (2, 4), "mod after 2 steps.")
    assert (tmp_path / "text.png").read_bytes().startswith(b"\x89PNG")
