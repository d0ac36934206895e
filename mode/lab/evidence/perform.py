"""Trains and evaluates one run, and makes its record."""

import time

import jax
import numpy as np

from ..arms import Arm
from ..budget import flops_per_step, forward_flops_per_token, parameter_count
from ..console import Watch
from ..data import Corpus, held_out_batches
from ..evaluate import Evaluation, evaluate
from ..train import Progress, Saving, train
from ..versions import PACKAGES, machine, versions
from .records import Mark, Run, RunRecord


# Evaluations in a run, that at the end included; and held-out sequences in each of the others.
_MARKS, _MARK_SEQUENCES = 8, 64
# Points of the loss curve.
_POINTS = 100


def perform(run: Run, arm: Arm, steps: int, corpus: Corpus, watch: Watch) -> RunRecord:
    """Trains and evaluates a run, on the arm and corpus that it names, for the steps that it pays.

    **Raises:** `FloatingPointError` for a loss that is not finite.
    """
    size, seconds = run.size, 0.0
    samples = held_out_batches(
        corpus.held_out, length=size.length, batch=size.batch, sequences=run.held_out
    )
    # Spread over the text as all the samples are.
    few = samples[:: max(1, len(samples) * size.batch // _MARK_SEQUENCES)]
    key = jax.random.fold_in(jax.random.key(run.seed), 1)
    marks: list[Mark] = []

    def add_mark(progress: Progress) -> None:
        nonlocal seconds
        start, step = time.perf_counter(), len(progress.losses)
        if step < steps:
            marks.append(_mark(step, evaluate(arm, progress.state.model, few, key=key)))
        seconds += time.perf_counter() - start

    trained = train(
        arm,
        size,
        run.recipe,
        corpus.train,
        steps=steps,
        seed=run.seed,
        watch=watch,
        saving=Saving(max(1, -(-steps // _MARKS)), add_mark),
    )
    training, start = trained.seconds - seconds, time.perf_counter()
    evaluation = evaluate(arm, trained.model, samples, key=key)
    seconds += time.perf_counter() - start
    parts = np.array_split(np.asarray(trained.losses), min(_POINTS, len(trained.losses)))
    return RunRecord(
        run=run,
        parameters=parameter_count(trained.model),
        forward_flops=forward_flops_per_token(arm, size),
        step_flops=flops_per_step(arm, size, run.recipe),
        steps=steps,
        end=_mark(steps, evaluation),
        slots_top_k=evaluation.routers[0].compute_top_k if evaluation.routers else None,
        marks=tuple(marks),
        losses=tuple(round(float(part.mean()), 5) for part in parts),
        seconds={"training": training, "waiting": trained.waiting_seconds, "evaluating": seconds},
        step_seconds=trained.step_seconds,
        versions=versions(*PACKAGES),
        machine=machine(),
    )


def _mark(step: int, evaluation: Evaluation) -> Mark:
    router = evaluation.routers[0] if evaluation.routers else None
    return Mark(
        step=step,
        top_k=evaluation.bits_top_k,
        causal=evaluation.bits_causal,
        precision=router and router.precision,
        recall=router and router.recall,
        slots=router and router.compute_causal,
        without=evaluation.bits_without,
    )
