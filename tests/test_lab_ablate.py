"""The ablation end to end, at a size that trains in seconds: equal FLOPs, resuming, reporting."""

import contextlib
import dataclasses
import io
import json
import math
import os
import signal
import subprocess
import sys
import time
import warnings

import equinox as eqx
import jax
import numpy as np
import optax
import pytest
from rich.console import Console

import mode
from mode.lab import ablate, arms, budget, evaluate, files, step as steps, store, train
from mode.lab.__main__ import main
from mode.lab.data import Batch, batches, held_out_batches, read_corpus


OPTIMISED = True


SIZE = arms.Size(dim=8, depth=2, heads=1, length=96, batch=2, experts=2, noop=1)
FLAGS = [
    *("--size.dim", "8", "--size.depth", "2", "--size.heads", "1", "--size.length", "96"),
    *("--size.batch", "2", "--size.experts", "2", "--size.noop", "1"),
    *("--held-out", "4", "--budget", "0.043"),
]


@pytest.fixture
def texts(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(12):
        line = f"line {number} of a text that repeats itself\n"
        (folder / f"{number}.txt").write_text(line * 30)
    return str(folder / "*.txt")


@contextlib.contextmanager
def running(*words):
    """The command in a process of its own, which does not outlive the test."""
    process = subprocess.Popen(
        [sys.executable, "-m", "mode.lab", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def test_steps_make_training_flops_equal():
    flops = budget.training_budget(0.5, SIZE)
    for arm in arms.ARMS:
        per_step = budget.flops_per_step(arm, SIZE)
        steps = budget.steps_for(arm, flops, per_step)
        assert abs(steps * per_step - flops) <= per_step
    dense, mod = (budget.forward_flops_per_token(arm, arms.Size()) for arm in arms.ARMS[:2])
    assert mod < 0.7 * dense


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_a_bad_budget_is_refused(value):
    with pytest.raises(ValueError, match=r"`budget` must be a finite number above 0, got"):
        budget.training_budget(value, SIZE)


def test_a_budget_below_two_steps_is_refused():
    with pytest.raises(ValueError, match=r"`budget` must pay for at least 2 steps.*0\.40 steps"):
        budget.steps_for(arms.ARMS[0], 40.0, 100)


def test_an_unknown_arm_is_refused():
    with pytest.raises(ValueError, match=r"`arms` must be one or more of dense.*got nonsense"):
        arms.arms_named(["dense", "nonsense"])


def test_the_arm_of_most_routers_is_causal_under_its_rule():
    (arm,) = arms.arms_named(["mode-staged"])
    model = arm.build(SIZE, key=jax.random.key(0))
    causal = mode.causal(model, by=arm.rule, limit=1.0)
    mode.testing.assert_causal(causal, vocab=257, tokens=48)


def test_training_moves_thresholds_and_ends_under_the_selectors_it_began_with(texts):
    arm = arms.arms_named(["mod"])[0]
    documents = read_corpus(texts, length=SIZE.length).train
    seen = []
    trained = train.train(
        arm,
        SIZE,
        steps.Recipe(),
        documents,
        steps=12,
        seed=0,
        watch=lambda taken, loss: seen.append(taken),
    )
    router = mode.routers(trained.model)[0]
    assert isinstance(router.select, mode.ExpertChoice)
    assert np.all(np.asarray(router.state.updates) == 12)
    assert np.all(np.asarray(router.state.threshold) != 0)
    assert len(trained.losses) == 12
    assert seen[-1] == 12
    assert trained.losses[-1] < trained.losses[0]


def trained_with(texts, **recipe):
    return train.train(
        arms.arms_named(["mod"])[0],
        SIZE,
        steps.Recipe(**recipe),
        read_corpus(texts, length=SIZE.length).train,
        steps=12,
        seed=0,
        watch=lambda taken, loss: None,
    )


def test_a_loss_that_is_not_finite_stops_the_run(texts):
    """At the step itself, with what the routers did; the parameters are those before it."""
    words = r"of arm 'mod' is not finite at step \d+ \(router 1: largest logit .* slots per token"
    with pytest.raises(FloatingPointError, match=words):
        trained_with(texts, learning_rate=math.inf)


@pytest.fixture
def fresh_programs():
    """Steps compiled before know nothing of what a test puts in place of their parts."""
    steps._jitted.cache_clear()
    yield steps._jitted.cache_clear
    steps._jitted.cache_clear()


def test_a_step_that_is_not_finite_can_be_skipped(texts, monkeypatch, fresh_programs):
    """It changes nothing and is said; many in a row stop the run all the same."""
    whole = steps.loss_and_gradient

    def now_and_then(arm, model, batch, key):
        loss, routings, gradient = whole(arm, model, batch, key)
        # Of the state, so that one program serves all steps.
        bad = mode.routers(model)[0].state.updates.reshape(-1)[0] == bad_after
        return jax.numpy.where(bad, math.nan, loss), routings, gradient

    monkeypatch.setattr(steps, "loss_and_gradient", now_and_then)
    bad_after = -1
    assert all(map(math.isfinite, trained_with(texts, on_nonfinite="skip").losses))
    fresh_programs()
    bad_after = 3  # after three good steps none is good: the router state stays as it is
    with (
        warnings.catch_warnings(record=True, action="always") as said,
        pytest.raises(FloatingPointError, match=r"is not finite at step 13"),
    ):
        train.train(
            arms.arms_named(["mod"])[0],
            SIZE,
            steps.Recipe(on_nonfinite="skip"),
            read_corpus(texts, length=SIZE.length).train,
            steps=20,
            seed=0,
            watch=lambda taken, loss: None,
        )
    assert len(said) == 9
    assert "the loss (nan) of arm 'mod' is not finite at step 4, which is left" in str(
        said[0].message
    )


@pytest.mark.parametrize(("length", "warmup"), [(2, 0.05), (10, 0.05), (300, 0.05), (40, 0.5)])
def test_the_schedule_is_that_of_optax(length, warmup):
    recipe = steps.Recipe(learning_rate=0.02, warmup=warmup)
    schedule = steps.Schedule.of(recipe, length)
    rises = max(1, round(warmup * length))
    optax_schedule = optax.warmup_cosine_decay_schedule(0.0, 0.02, rises, length, 0.001)
    places = np.arange(length + 1)
    rates = [float(schedule.rate(jax.numpy.asarray(place, "int32"))) for place in places]
    assert rates == pytest.approx(
        [float(optax_schedule(jax.numpy.asarray(place, "float32"))) for place in places], rel=1e-5
    )


def test_runs_of_other_lengths_and_rates_share_a_program(texts):
    arm = arms.arms_named(["dense"])[0]
    one = steps.make_step(arm, steps.Recipe(learning_rate=0.1, warmup=0.2))
    assert one is steps.make_step(arm, steps.Recipe())
    assert one is not steps.make_step(arm, steps.Recipe(clip=0.5))
    documents = read_corpus(texts, length=SIZE.length).train
    sample = next(batches(documents, length=SIZE.length, batch=SIZE.batch, seed=0))
    states = []
    for recipe, length in ((steps.Recipe(), 7), (steps.Recipe(learning_rate=0.1), 20)):
        state = steps.begin(arm, SIZE, recipe, steps=length, seed=0)
        states.append(one(sample, one(sample, state)[0])[0])
    assert one._cached._cache_size() == 1
    assert not np.array_equal(*(state.model.embedding for state in states))


def test_one_program_serves_a_phase(texts):
    arm = arms.arms_named(["mod"])[0]
    documents = read_corpus(texts, length=SIZE.length).train
    recipe = steps.Recipe()
    model = arm.build(SIZE, key=jax.random.key(0))
    state = steps.TrainState(
        model,
        steps.make_optimizer(recipe).init(eqx.filter(model, mode.trainable(model))),
        jax.numpy.zeros((), "int32"),
        jax.random.key(1),
        steps.Schedule.of(recipe, 8),
    )
    traces = []

    def auxiliary(routings):
        traces.append(1)
        return jax.numpy.zeros(())

    step = steps.make_step(dataclasses.replace(arm, auxiliary=auxiliary), recipe)
    stream = batches(documents, length=SIZE.length, batch=SIZE.batch, seed=0)
    for _ in range(3):
        state, _ = step(next(stream), state)
    assert len(traces) == 1


def test_weights_of_another_document_do_not_count(texts):
    documents = read_corpus(texts, length=SIZE.length).train
    batch = Batch.of(next(batches(documents, length=SIZE.length, batch=2, seed=0)))
    model = arms.ARMS[0].build(SIZE, key=jax.random.key(0))
    loss, _ = steps.next_byte_loss(model, batch, jax.random.key(0))
    targets = jax.numpy.where(batch.weights > 0, batch.targets, 7)
    other = eqx.tree_at(lambda b: b.targets, batch, targets)
    assert loss == steps.next_byte_loss(model, other, jax.random.key(0))[0]


def test_a_killed_run_keeps_finished_arms_and_the_same_command_goes_on(texts, tmp_path):
    out = tmp_path / "run"
    command = ["ablate", "--out", str(out), "--data", texts, *FLAGS]
    command += ["--arms", "dense", "mod"]
    record = out / "arms" / "dense.json"
    with running(*command) as first:
        while not record.exists():
            assert first.poll() is None, first.stderr.read()
            time.sleep(0.02)
        first.send_signal(signal.SIGKILL)
        first.wait()
    assert not (out / "arms" / "mod.json").exists(), "killed too late to show anything"
    kept = record.stat().st_mtime_ns, record.read_bytes()
    # What a kill in the middle of a write leaves behind.
    (out / "arms" / ".mod.json.7.part").write_text('{"name": "mo')

    with running(*command) as second:
        printed, errors = second.communicate(timeout=240)
    assert second.returncode == 0, errors
    assert "dense: finished before, kept." in printed
    assert kept == (record.stat().st_mtime_ns, record.read_bytes())
    results = json.loads((out / "results.json").read_text())
    assert [arm["name"] for arm in results["arms"]] == ["dense", "mod"]
    for arm in results["arms"]:
        assert len(arm["losses"]) == arm["steps"]
    _check_report(out, results)
    _check_saved_models(out, results, texts)


def _check_report(out, results):
    text = (out / "report.md").read_text()
    for arm in results["arms"]:
        assert f"| {arm['name']} |" in text
        assert f"{arm['bits_causal']:.3f}" in text
    for said in ("One seed", "Toy scale", "looks at the future", "mode-lab ablate", "- jax "):
        assert said in text
    for name in ("curves.png", "routing.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    spent = [arm["steps"] * arm["step_flops"] for arm in results["arms"]]
    dearest = max(arm["step_flops"] for arm in results["arms"])
    assert max(spent) - min(spent) <= dearest


def _check_saved_models(out, results, texts):
    dense, mod = results["arms"]
    arm = arms.ARMS[0]
    model = store.load_model(out, "dense", arm.build(SIZE, key=jax.random.key(5)))
    held_out = held_out_batches(
        read_corpus(texts, length=SIZE.length).held_out,
        length=SIZE.length,
        batch=SIZE.batch,
        sequences=4,
    )
    found = evaluate.evaluate(arm, model, held_out, key=jax.random.key(0))
    assert found.bits_causal == pytest.approx(dense["bits_causal"], rel=1e-5)

    like = arms.arms_named(["mod"])[0].build(SIZE, key=jax.random.key(5))
    updates = mode.routers(store.load_model(out, "mod", like))[0].state.updates
    assert np.all(np.asarray(updates) == mod["steps"])
    sample = store.load_sample(out, "mod")
    assert sample["top_k"].shape == sample["causal"].shape == (1, len(sample["tokens"]))


def test_reporting_again_needs_no_training_and_another_configuration_is_refused(
    texts, tmp_path, capsys
):
    out = tmp_path / "run"
    command = ["ablate", "--out", str(out), "--data", texts, "--arms", "dense", *FLAGS]
    assert main(command) == 0
    (out / "report.md").unlink()
    before = (out / "results.json").read_text()
    assert main(["report", "--out", str(out)]) == 0
    assert (out / "results.json").read_text() == before
    assert "--size.dim 8" in (out / "report.md").read_text()
    capsys.readouterr()

    assert main([*command, "--seed", "7"]) == 2
    message = capsys.readouterr().err
    assert "seed: 0 there, 7 asked for" in message
    assert "size.dim" not in message
    assert main(["report", "--out", str(tmp_path / "nowhere")]) == 2
    assert "the folder of a run was expected, got" in capsys.readouterr().err
    assert main([*command[:4], str(tmp_path / "no*file"), "--out", str(tmp_path / "new")]) == 2
    assert "`data` must match at least one file" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_changed_corpus_is_another_configuration(tmp_path):
    settings = {"seed": 0, "corpus": "a", "size": {"dim": 8}}
    files.claim(tmp_path / "run", settings)
    files.claim(tmp_path / "run", settings)
    with pytest.raises(ValueError, match="corpus: a there, b asked for"):
        files.claim(tmp_path / "run", {**settings, "corpus": "b"})
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="`out` must be a folder"):
        files.claim(tmp_path / "file", settings)


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "record.json"
    files.write_json(path, {"old": 1})

    def broken(beside):
        beside.write_text('{"new":')
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        files.write_atomically(path, broken)
    assert json.loads(path.read_text()) == {"old": 1}
    assert os.listdir(tmp_path) == sorted([f".record.json.{os.getpid()}.part", "record.json"])


def test_no_finished_arm_is_no_report(tmp_path):
    files.claim(tmp_path, ablate.Ablation().settings())
    with pytest.raises(ValueError, match="at least one finished arm"):
        ablate.report(tmp_path, Console(file=io.StringIO()))


def test_a_missing_extra_is_named(monkeypatch, capsys):
    monkeypatch.setattr("mode.lab.__main__.find_spec", lambda name: None)
    assert main([]) == 2
    assert 'pip install ".[lab]"' in capsys.readouterr().err
