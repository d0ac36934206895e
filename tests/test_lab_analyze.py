"""`mode-lab analyze`: the passage it shows, and what the command writes, of any text."""

import collections
import io
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from mode.lab import analysis_report, run
from mode.lab.__main__ import main
from mode.lab.analyze import Analyzing, run_analysis
from mode.lab.arms import Size, arms_named
from mode.lab.checkpoint import Checkpoints
from mode.lab.data import Sequences, read_corpus
from mode.lab.files import claim
from mode.lab.passage import find_passage, glyphs, lines_of
from mode.lab.step import begin

from .lab import LINE, documents, slow_class


SIZE = Size(dim=8, depth=4, heads=1, length=32, batch=3, experts=2, noop=1, capacity=0.25)


# The passage.


@pytest.mark.parametrize("length", [8, 100, 4096])
def test_the_passage_is_a_piece_of_the_text_in_lines(length: int) -> None:
    binary = bytes(range(256)) * 40
    text = "".join(LINE.format(n) for n in range(200))
    source = Sequences(documents(binary, text), length)
    passage = find_passage(source)
    joined = np.concatenate([source[place]["tokens"][:-1] for place in passage.places])
    assert np.array_equal(joined[passage.part], passage.tokens)
    assert bytes(passage.tokens.tolist()).decode() in text
    assert passage.document == "1"
    assert len(passage.tokens) > 300
    rows = np.stack([source[place]["tokens"][:-1] for place in passage.places])
    assert np.array_equal(passage.of(rows[None])[0], passage.tokens)
    for place in passage.begins():
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
    found = glyphs(np.array([256, *"é€😀".encode(), 0xC3]))
    assert found == ["\ufffd", "é", "", "€", "", "", "😀", "", "", "", "\ufffd"]


# The command.


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("texts")
    for number in range(12):
        (folder / f"{number}.txt").write_text(LINE.format(number) * 12)
    return str(folder / "*.txt")


def saved(out: Path, texts: str, arm: str) -> Path:
    """The folder that a run leaves, of a model as it is before its first step."""
    training = run.Training(out, arm, 2, texts, size=SIZE)
    corpus = read_corpus(texts, length=SIZE.length)
    claim(out, {**training.settings(), "corpus": corpus.fingerprint})
    state = begin(arms_named([arm])[0], SIZE, training.recipe, steps=2, seed=0)
    checkpoints = Checkpoints(out / "checkpoints", 1)
    checkpoints.save(2, state, {"stream": {}, "losses": [8.0, 8.0]})
    return out


@pytest.fixture(scope="module")
def staged(tmp_path_factory: pytest.TempPathFactory, texts: str) -> Path:
    return saved(tmp_path_factory.mktemp("staged") / "run", texts, "mode-staged")


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes most of the time, and is not what every test is about."""
    monkeypatch.setattr(analysis_report, "plot_analysis", lambda *_: [])


def said(analyzing: Analyzing) -> str:
    stream = io.StringIO()
    run_analysis(analyzing, Console(file=stream, width=400))
    return stream.getvalue()


def strict(path: Path) -> dict:
    """JSON that has no word for what is not a number."""

    def refuse(word: str) -> None:
        raise AssertionError(word)

    return json.loads(path.read_text(), parse_constant=refuse)


def test_a_run_is_analysed_on_its_own_held_out_text(
    staged: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["analyze", "--checkpoint", str(staged), "--sequences", "7"]) == 0
    printed = capsys.readouterr().out
    assert "the run's held-out text" in printed
    assert "in 7 sequences of 32" in printed
    out = staged / "analysis"
    record = strict(out / "analysis.json")
    assert list(record["selections"]) == ["top-k", "causal"]
    for selection in record["selections"].values():
        assert [router["nested"] for router in selection["routers"]] == [False, True]
        assert math.isclose(sum(row["token_share"] for row in selection["classes"]), 1)
        if selection["compute"]:
            assert math.isclose(sum(row["compute_share"] for row in selection["classes"]), 1)
    shown = record["passage"]
    text = bytes(shown["tokens"]).decode()
    assert "return" in text
    assert {len(row) for rows in shown["taken"].values() for row in rows} == {len(text)}
    page = (out / "analysis.md").read_text()
    pictures = [line.split("](")[1][:-1] for line in page.splitlines() if line.startswith("![")]
    assert len(pictures) == 6
    for picture in pictures:
        assert (out / picture).read_bytes().startswith(b"\x89PNG")
    assert not [path for path in out.iterdir() if path.name.startswith(".")]


@pytest.mark.usefixtures("no_pictures")
def test_the_same_seed_gives_the_same_numbers(staged: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        said(Analyzing(staged, sequences=3, out=tmp_path / name))
    assert strict(tmp_path / "a/analysis.json") == strict(tmp_path / "b/analysis.json")


@pytest.mark.parametrize(
    "text", ["x", "Überall 日本語,\tnaïve café; 42 \x00 Ωμέγα.\r\n" * 20 + 99 * "7"]
)
def test_texts_of_the_users_own(staged: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "own.txt").write_bytes(text.encode())
    out = tmp_path / "out"
    printed = said(Analyzing(staged, str(tmp_path / "*.txt"), out=out))
    assert "(1 file)" in printed
    assert "was trained on" not in printed
    record = strict(out / "analysis.json")
    # Each byte is predicted once, from the token before it.
    assert record["selections"]["causal"]["tokens"] == len(text.encode())
    tokens = [256, *text.encode()[:-1]]
    expected = collections.Counter(map(slow_class, [256, *tokens], tokens))
    for row in record["selections"]["causal"]["classes"]:
        assert row["tokens"] == expected[row["name"]]


@pytest.mark.usefixtures("no_pictures")
def test_it_says_what_the_model_was_trained_on(staged: Path, tmp_path: Path, texts: str) -> None:
    printed = said(Analyzing(staged, texts, sequences=2, out=tmp_path / "out"))
    held_out = len(read_corpus(texts, length=SIZE.length).held_out.names)
    assert f"was trained on {12 - held_out} of these files" in printed


def test_a_dense_model_is_told_plainly(tmp_path: Path, texts: str) -> None:
    out = saved(tmp_path / "run", texts, "dense")
    assert "Nothing is routed" in said(Analyzing(out, sequences=4))
    record = strict(out / "analysis/analysis.json")
    assert record["routed"] is False
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
    assert "`out` must be a folder" in refusal(*at, "--out", str(tmp_path / "file"))
    assert "`data` must match" in refusal(*at, "--data", str(tmp_path / "*.none"))
