"""The ablation end to end, at a size that trains in seconds: equal FLOPs, resuming, reporting."""

import contextlib
import dataclasses
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest

import mode
from mode.lab import ablate, arms, budget, evaluate, folder, report, run, step as steps
from mode.lab.__main__ import main
from mode.lab.data import held_out_batches, read_corpus
from mode.lab.files import read_record
from mode.lab.options import check_options
from tests.lab.helpers import quiet, repeating_texts


SIZE = arms.Size(dim=8, depth=2, heads=1, length=96, batch=2, experts=2, noop=1)
FLAGS = [
    *("--size.dim", "8", "--size.depth", "2", "--size.heads", "1", "--size.length", "96"),
    *("--size.batch", "2", "--size.experts", "2", "--size.noop", "1"),
    *("--held-out", "4", "--budget", "0.043", "--no-recall"),
]


@pytest.fixture
def texts(tmp_path: Path) -> str:
    folder = tmp_path / "texts"
    folder.mkdir()
    return repeating_texts(folder)


@contextlib.contextmanager
def running(*words: str) -> Iterator[subprocess.Popen[str]]:
    """The command in a process of its own, which does not outlive the test."""
    process = subprocess.Popen(
        [sys.executable, "-m", "mode.lab", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},  # compiled as quickly as here
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def test_steps_make_training_flops_equal() -> None:
    size = dataclasses.replace(SIZE, depth=3)  # of which a loop stands for one layer at least
    flops = budget.training_budget(0.5, size)
    for arm in arms.ALL_ARMS:
        per_step = budget.flops_per_step(arm, size, steps.Recipe())
        count = budget.steps_for(arm, flops, per_step)
        assert abs(count * per_step - flops) <= per_step
    each = [arms.arm_named(name) for name in ("dense", "left-out", "mod")]
    dense, left_out, mod = (budget.forward_flops_per_token(arm, arms.Size()) for arm in each)
    assert left_out < mod < 0.7 * dense


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_a_bad_budget_is_refused(value: float, tmp_path: Path) -> None:
    ablation = ablate.Ablation(tmp_path / "out", budget=value)
    with pytest.raises(ValueError, match=rf"`budget` must be (above 0|finite), got {value}"):
        check_options(ablation)


def test_a_budget_below_two_steps_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`budget` must pay for at least 2 steps.*0\.40 steps"):
        budget.steps_for(arms.ARMS[0], 40.0, 100.0)


def test_an_unknown_arm_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`arms` must be one or more of dense.*got nonsense"):
        arms.arms_named(["dense", "nonsense"])


def test_a_loop_needs_layers_to_stand_for() -> None:
    for name in ("loop", "recursion", "recursion-depth"):
        with pytest.raises(ValueError, match=r"`size.depth` must be at least 3.*got 2"):
            arms.arm_named(name).shapes(dataclasses.replace(SIZE, depth=2))


def test_an_arm_differs_from_its_control_in_the_selector_alone() -> None:
    """What learned routing gets, random routing gets too."""
    for name in ("mod", "mod-queries", "recursion"):
        of_arm, of_control = (
            mode.routers(arms.arm_named(arm).shapes(arms.Size()))
            for arm in (name, f"{name}-random")
        )
        for router, control in zip(of_arm, of_control, strict=True):
            assert isinstance(control.select, mode.RandomChoice)
            assert (router.gate, router.capacity) == (control.gate, control.capacity)


def test_a_killed_run_keeps_finished_arms_and_the_same_command_goes_on(
    texts: str, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    command = ["ablate", "--out", str(out), "--data", texts, *FLAGS]
    command += ["--arms", "dense", "mod"]
    record = out / "arms" / "dense" / "result.json"
    with running(*command) as first:
        while not record.exists():
            assert first.poll() is None, first.communicate()
            time.sleep(0.02)
        first.send_signal(signal.SIGKILL)
        first.wait()
    assert not (out / "arms" / "mod" / "result.json").exists(), "killed too late"
    kept = record.stat().st_mtime_ns, record.read_bytes()
    # What a kill in the middle of a write leaves behind.
    (out / "arms" / "mod").mkdir(exist_ok=True)
    stale = out / "arms" / "mod" / f".result.json.{socket.gethostname()}-{first.pid}.part"
    stale.write_text('{"name": "mo')

    with running(*command) as second:
        printed, errors = second.communicate()
    assert second.returncode == 0, errors
    assert "dense: finished before, kept." in printed
    assert kept == (record.stat().st_mtime_ns, record.read_bytes())
    assert not stale.exists()
    results = read_record(out / "results.json", report.Results)
    assert [result.arm.name for result in results.arms] == ["dense", "mod"]
    for result in results.arms:
        assert len(result.losses) == result.settings.options.steps
    _check_report(out, results)
    _check_saved_models(out, results, texts)


def _check_report(out: Path, results: report.Results) -> None:
    text = (out / "report.md").read_text()
    costs = []
    for result in results.arms:
        assert f"**{result.arm.name}**" in text
        assert f"{result.evaluation.bits_causal:.3f}" in text
        costs.append(budget.flops_per_step(result.arm, SIZE, steps.Recipe()))
    for words in ("One seed", "Toy scale", "looks at the future", "mode-lab ablate", "- jax "):
        assert words in text
    for name in ("curves.png", "routing.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    lengths = [result.settings.options.steps for result in results.arms]
    spent = [length * cost for length, cost in zip(lengths, costs, strict=True)]
    assert max(spent) - min(spent) <= max(costs)


def _check_saved_models(out: Path, results: report.Results, texts: str) -> None:
    dense, mod = results.arms
    corpus = read_corpus(texts, length=SIZE.length)
    held_out = held_out_batches(corpus.held_out, length=SIZE.length, batch=SIZE.batch, sequences=4)
    model = run.load_run(out / "arms" / "dense", quiet()).model
    again = evaluate.evaluate(dense.arm, model, held_out, key=jax.random.key(0))
    assert again.bits_causal == pytest.approx(dense.evaluation.bits_causal, rel=1e-5)
    model = run.load_run(out / "arms" / "mod", quiet()).model
    updates = mode.routers(model)[0].state.updates
    assert np.all(np.asarray(updates) > 0)
    snippet = mod.evaluation.snippet
    assert snippet is not None
    assert np.shape(snippet.top_k) == np.shape(snippet.causal) == (1, len(snippet.tokens))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """An ablation of one arm, and its command."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "texts").mkdir()
    glob = repeating_texts(folder / "texts")
    command = ["ablate", "--out", str(folder / "run"), "--data", glob, "--arms", "mod", *FLAGS]
    assert main(command) == 0
    return folder / "run", command


def test_reporting_again_needs_no_training_and_another_configuration_is_refused(
    finished: tuple[Path, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, command = finished
    (out / "report.md").unlink()
    before = (out / "results.json").read_text()
    assert main(["report", "--out", str(out)]) == 0
    assert (out / "results.json").read_text() == before
    assert "--size.dim 8" in (out / "report.md").read_text()
    capsys.readouterr()

    assert main([*command, "--seed", "7"]) == 2
    message = capsys.readouterr().err
    assert "seed: 0 there, 7 now" in message
    assert "size.dim" not in message
    assert main(["report", "--out", str(tmp_path / "nowhere")]) == 2
    assert "the folder of a run was expected, got" in capsys.readouterr().err
    assert main(["ablate", "--data", str(tmp_path / "no*"), "--out", str(tmp_path / "new")]) == 2
    assert "`data` must match at least one file" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("harm", [b"", b"[]", b"null", b"{}", b'{"format": 3}', b"\xff", b"{"])
def test_a_damaged_file_is_named(
    finished: tuple[Path, list[str]], harm: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    out, _ = finished
    for path in (out / "config.json", out / "arms" / "mod" / "result.json"):
        whole = path.read_bytes()
        path.write_bytes(harm)
        assert main(["report", "--out", str(out)]) == 2
        message = capsys.readouterr().err
        assert message.startswith(f"mode-lab: {path}: it is ")
        assert message.count("\n") == 1
        path.write_bytes(whole)


def test_a_changed_number_is_seen(
    finished: tuple[Path, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    out, _ = finished
    path = out / "arms" / "mod" / "result.json"
    whole = path.read_text()
    record = json.loads(whole)
    record["content"]["evaluation"]["bits_causal"] = 0.123
    path.write_text(json.dumps(record))
    assert main(["report", "--out", str(out)]) == 2
    assert f"{path}: its content was changed" in capsys.readouterr().err
    path.write_text(whole)


def test_a_changed_corpus_is_another_configuration(tmp_path: Path) -> None:
    settings = ablate.AblationSettings(options=ablate.Ablation(), corpus="a")
    folder.claim(tmp_path / "run", settings)
    folder.claim(tmp_path / "run", settings)
    with pytest.raises(ValueError, match="corpus: a there, b now"):
        folder.claim(tmp_path / "run", settings.model_copy(update={"corpus": "b"}))
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="`out` must be a folder"):
        folder.claim(tmp_path / "file", settings)


def test_no_finished_arm_is_no_report(tmp_path: Path) -> None:
    folder.claim(tmp_path, ablate.AblationSettings(options=ablate.Ablation(), corpus="a"))
    with pytest.raises(ValueError, match="at least one finished arm"):
        ablate.report(tmp_path, quiet())


def test_a_missing_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("mode.lab.__main__.find_spec", lambda name: None)
    assert main([]) == 2
    assert 'pip install ".[lab]"' in capsys.readouterr().err
