"""What is equal bit for bit, and what does not see the future: compiled as users compile it.

The files about the same parts make no such claim, and are compiled quickly.
"""

import dataclasses
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mode
from mode.lab import analysis_report, arms, step as steps, train
from mode.lab.analysis_report import AnalysisRecord
from mode.lab.analyze import run_analysis
from mode.lab.arms import arm_named
from mode.lab.commands import Analysis
from mode.lab.data import Batch, batches, held_out_batches, read_corpus
from mode.lab.evaluate import evaluate, without_updates
from mode.lab.evidence.presets import sweep_arms
from mode.lab.files import read_record
from mode.lab.options import Recipe, Size
from tests.lab.helpers import quiet
from tests.lab.runs import trained, untrained


pytestmark = pytest.mark.optimized


SIZE = Size(dim=8, depth=2, heads=1, length=96, batch=2, experts=2, noop=1)


def test_going_on_anywhere_gives_the_same_run(texts: str) -> None:
    """Before, at and after each change of the capacity and of the rule; a router inside another."""
    saved: list[train.Progress] = []

    def save(progress: train.Progress) -> None:
        copied = jax.tree.map(np.array, progress.state)  # the next step is given the arrays
        saved.append(dataclasses.replace(progress, state=copied))

    size = dataclasses.replace(SIZE, length=32, capacity=0.25)
    run = (texts, "mode-staged", size, Recipe(ramp=0.5, ramp_stages=2))
    whole = trained(*run, saving=train.Saving(1, save))
    assert len(saved) == 12
    for progress in (saved[done - 1] for done in (2, 3, 4, 6, 7, 9, 10, 11)):
        again = trained(*run, progress=progress)
        assert again.losses == whole.losses
        assert jax.tree.structure(again.model) == jax.tree.structure(whole.model)
        pairs = zip(jax.tree.leaves(again.model), jax.tree.leaves(whole.model), strict=True)
        assert all(np.array_equal(a, b) for a, b in pairs)


def test_the_arm_of_most_routers_is_causal_under_its_rule() -> None:
    arm = arms.arm_named("mode-staged")
    causal = arm.causal(arm.build(SIZE, key=jax.random.key(0)))
    tokens = jax.random.randint(jax.random.key(1), (2, 48), 0, 257)
    mode.testing.assert_causal(causal, tokens)


def test_weights_of_another_document_do_not_count(texts: str) -> None:
    documents = read_corpus(texts, length=SIZE.length).train
    batch = Batch.of(next(batches(documents, length=SIZE.length, batch=2, seed=0)))
    model = arms.ARMS[0].build(SIZE, key=jax.random.key(0))
    loss, _ = steps.next_byte_loss(model, batch, jax.random.key(0))
    targets = jax.numpy.where(batch.weights > 0, batch.targets, 7)
    other = eqx.tree_at(lambda b: b.targets, batch, targets)
    assert loss == steps.next_byte_loss(model, other, jax.random.key(0))[0]


@pytest.mark.parametrize("name", ["mod", "mod-sigmoid", "moe", "mode-staged", "mode-integrated"])
def test_without_its_updates_a_model_is_its_dense_part(name: str) -> None:
    """Every routing weight is 0, under any gate; a model of weight 0 by its logits is the same."""
    model = sweep_arms(name)[0].build(SIZE, key=jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (2, 32), 0, 256)
    logits, routings = without_updates(model)(tokens)
    assert not any(np.any(routing.weight) for routing in routings)
    assert not np.allclose(logits, model(tokens)[0])
    if name == "mod":
        zeroed = mode.map_routers(
            lambda r: eqx.tree_at(lambda r: r.scorer.weight, r, replace_fn=jnp.zeros_like), model
        )
        np.testing.assert_array_equal(logits, zeroed(tokens)[0])


@pytest.mark.parametrize(("name", "has"), [("mod", True), ("mod-random", True), ("moe", False)])
def test_arms_that_recover_are_evaluated_without_their_updates(
    name: str, has: bool, texts: str
) -> None:
    arm, corpus = arm_named(name), read_corpus(texts, length=SIZE.length)
    model = arm.build(SIZE, key=jax.random.key(0))
    samples = held_out_batches(corpus.held_out, length=SIZE.length, batch=SIZE.batch, sequences=4)
    results = evaluate(arm, model, samples, key=jax.random.key(1))
    assert (results.bits_without is not None) == has
    if results.bits_without is not None:
        bare = without_updates(arm.causal(model))
        again = evaluate(arm_named("dense"), bare, samples, key=jax.random.key(1))
        assert results.bits_without == again.bits_top_k != results.bits_causal


def test_the_same_seed_gives_the_same_numbers(
    tmp_path: Path, texts: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of an analysis, whose intervals are drawn."""
    monkeypatch.setattr(analysis_report, "plot_analysis", lambda *_: [])
    out, records = untrained(tmp_path / "run", texts, "mod", SIZE), []
    for name in "ab":
        run_analysis(Analysis(out, sequences=3, out=tmp_path / name), quiet())
        records.append(read_record(tmp_path / name / "analysis.json", AnalysisRecord))
    assert records[0] == records[1]
