"""The training step: when it stops, what it skips, rates, dtypes and programs."""

import dataclasses
import math
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array, Float, PRNGKeyArray

import mode
from mode.lab import arms, run, step as steps, train
from mode.lab.data import Batch, batches, read_corpus
from tests.lab.helpers import quiet
from tests.lab.runs import losses, training


SIZE = arms.Size(dim=8, depth=2, heads=1, length=96, batch=2, experts=2, noop=1)


def test_training_moves_thresholds_and_ends_under_the_selectors_it_began_with(texts: str) -> None:
    arm = arms.arm_named("mod")
    documents = read_corpus(texts, length=SIZE.length).train
    seen: list[int] = []
    trained = train.train(
        arm,
        SIZE,
        steps.Recipe(),
        documents,
        steps=12,
        seed=0,
        watch=lambda step, loss: seen.append(step),
    )
    router = mode.routers(trained.model)[0]
    assert isinstance(router.select, mode.ExpertChoice)
    assert np.all(np.asarray(router.state.updates) > 12)  # calibrated on more batches at the end
    assert np.all(np.asarray(router.state.threshold) != 0)
    assert len(trained.losses) == 12
    assert seen[-1] == 12
    assert trained.losses[-1] < trained.losses[0]


def trained_with(texts: str, *, length: int = 12, **recipe: Any) -> train.Trained:
    return train.train(
        arms.arm_named("mod"),
        SIZE,
        steps.Recipe(**recipe),
        read_corpus(texts, length=SIZE.length).train,
        steps=length,
        seed=0,
        watch=lambda step, loss: None,
    )


def test_a_loss_that_is_not_finite_stops_the_run(texts: str) -> None:
    """At the step itself, with what the routers did; the parameters are those before it."""
    words = r"of arm 'mod' is not finite at step \d+ \(router 1: largest logit .* slots per token"
    with pytest.raises(FloatingPointError, match=words):
        trained_with(texts, learning_rate=math.inf)


@pytest.fixture
def fresh_programs() -> Iterator[Callable[[], None]]:
    """Steps compiled before know nothing of what a test puts in place of their parts."""
    steps._jitted.cache_clear()
    yield steps._jitted.cache_clear
    steps._jitted.cache_clear()


def test_a_step_that_is_not_finite_can_be_skipped(
    texts: str, monkeypatch: pytest.MonkeyPatch, fresh_programs: Callable[[], None]
) -> None:
    """It changes nothing and is reported; many in a row stop the run all the same."""
    whole = steps.loss_and_gradient

    def now_and_then(
        arm: arms.Arm,
        recipe: steps.Recipe,
        model: mode.Transformer,
        batch: Batch,
        key: PRNGKeyArray,
    ) -> Any:
        loss, routings, gradient = whole(arm, recipe, model, batch, key)
        # Of the state, so that one program serves all steps.
        bad = mode.routers(model)[0].state.updates.reshape(-1)[0] == bad_after
        return jax.numpy.where(bad, math.nan, loss), routings, gradient

    monkeypatch.setattr(steps, "loss_and_gradient", now_and_then)
    bad_after = -1
    assert all(map(math.isfinite, trained_with(texts, on_nonfinite="skip").losses))
    fresh_programs()
    bad_after = 3  # after three good steps none is good: the router state stays as it is
    with (
        warnings.catch_warnings(record=True, action="always") as caught,
        pytest.raises(FloatingPointError, match=r"is not finite at step 13"),
    ):
        trained_with(texts, length=20, on_nonfinite="skip")
    assert len(caught) == 9
    assert "the loss (nan) of arm 'mod' is not finite at step 4, which is skipped" in str(
        caught[0].message
    )


def test_skipped_steps_are_counted_over_resumes(
    texts: str, monkeypatch: pytest.MonkeyPatch, fresh_programs: Callable[[], None], tmp_path: Path
) -> None:
    """A run that stops itself stops at the same step again, however often it goes on."""
    whole = steps.loss_and_gradient

    def bad(arm: arms.Arm, recipe: steps.Recipe, *rest: Any) -> Any:
        loss, routings, gradient = whole(arm, recipe, *rest)
        return loss + math.nan, routings, gradient

    monkeypatch.setattr(steps, "loss_and_gradient", bad)
    recipe = steps.Recipe(on_nonfinite="skip")
    training = run.Training(
        tmp_path, "dense", 30, texts, held_out=4, save_every=4, size=SIZE, recipe=recipe
    )
    for _ in range(3):
        with (
            pytest.warns(UserWarning, match="which is skipped"),
            pytest.raises(FloatingPointError, match=r"at step 10\b.* checkpoint is of step 8"),
        ):
            run.run_training(training, quiet())


def test_bfloat16_keeps_its_weights_in_float32(tmp_path: Path, texts: str) -> None:
    """Activations alone are narrow; what is saved, and what the optimizer holds, is not."""
    size = dataclasses.replace(SIZE, dtype="bfloat16")
    narrow = dataclasses.replace(training(tmp_path / "run", texts, steps=2), size=size)
    run.run_training(narrow, quiet())
    assert all(map(math.isfinite, losses(tmp_path / "run")))
    model = run.load_run(tmp_path / "run", quiet()).model
    assert model.dtype == jnp.bfloat16
    leaves = [leaf for leaf in jax.tree.leaves(model) if hasattr(leaf, "dtype")]
    assert {leaf.dtype for leaf in leaves} <= {jnp.dtype("float32"), jnp.dtype("int32")}


@pytest.mark.parametrize(("length", "warmup"), [(2, 0.05), (10, 0.05), (300, 0.05), (40, 0.5)])
def test_the_rate_rises_in_a_line_and_falls_as_a_cosine(length: int, warmup: float) -> None:
    rates = steps.learning_rates(steps.Recipe(learning_rate=0.02, warmup=warmup), length)
    done, rises = np.arange(length), min(length - 1, max(1, round(warmup * length)))
    cosine = 0.5 * (1 + np.cos(np.pi * np.clip((done - rises) / (length - rises), 0, 1)))
    expected = 0.02 * np.minimum(done / rises, 0.05 + 0.95 * cosine)
    np.testing.assert_allclose(rates, expected, rtol=1e-5)


def test_runs_of_other_lengths_and_rates_share_a_program(texts: str) -> None:
    arm = arms.arm_named("dense")
    one = steps.make_step(arm, steps.Recipe(learning_rate=0.1, warmup=0.2))
    assert one is steps.make_step(arm, steps.Recipe())
    assert one is not steps.make_step(arm, steps.Recipe(clip=0.5))
    documents = read_corpus(texts, length=SIZE.length).train
    sample = next(batches(documents, length=SIZE.length, batch=SIZE.batch, seed=0))
    models = []
    for rate in np.array([0.01, 0.1], np.float32):
        state = steps.begin(arm, SIZE, steps.Recipe(), seed=0)
        models.append(one((sample, rate), state)[0].model)
    assert one._cached._cache_size() == 1  # pyright: ignore
    assert not np.array_equal(models[0].embedding, models[1].embedding)


def test_one_program_serves_a_phase(texts: str) -> None:
    arm = arms.arm_named("mod")
    documents = read_corpus(texts, length=SIZE.length).train
    recipe = steps.Recipe()
    state = steps.begin(arm, SIZE, recipe, seed=0)
    traces = []

    def auxiliary(routings: tuple[mode.Routing, ...]) -> Float[Array, ""]:
        traces.append(1)
        return jax.numpy.zeros(())

    step = steps.make_step(dataclasses.replace(arm, auxiliary=auxiliary), recipe)
    stream = batches(documents, length=SIZE.length, batch=SIZE.batch, seed=0)
    for rate in steps.learning_rates(recipe, 3):
        state, _ = step((next(stream), rate), state)
    assert len(traces) == 1
