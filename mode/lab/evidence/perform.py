"""One run from its first step to its record."""

import os
import platform
import time
from collections.abc import Sequence

import jax
import numpy as np

import mode

from ..arms import Arm
from ..budget import flops_per_step, forward_flops_per_token, parameter_count, steps_for
from ..data import Corpus, Sample, held_out_batches
from ..evaluate import Evaluation, evaluate
from ..train import Progress, Saving, Watch, train
from ..versions import versions
from .records import Mark, Record, Run
from .variants import variants_named


# Evaluations on the way, the end among them; and on how many sequences those before it are made.
_MARKS, _MARK_SEQUENCES = 8, 64
# Points of a loss curve.
_POINTS = 100


def perform(run: Run, arm: Arm, corpus: Corpus, watch: Watch) -> Record:
    """Train and evaluate as `run` says.

    **Arguments:**

    - `arm`: the one that `run` names.
    - `corpus`: the one whose fingerprint it has.
    - `watch`: told of the steps taken.

    **Raises:** `ValueError` for a budget of less than two steps, `FloatingPointError` for a loss
    that is not finite.
    """
    size = run.size
    step_flops = flops_per_step(arm, size)
    steps = steps_for(arm, run.budget, step_flops)
    samples = held_out_batches(
        corpus.held_out, length=size.length, batch=size.batch, sequences=run.held_out
    )
    # Spread over the text as the whole is.
    few = samples[:: max(1, len(samples) * size.batch // _MARK_SEQUENCES)]
    key = jax.random.fold_in(jax.random.key(run.seed), 1)
    marks: list[Mark] = []
    evaluating: list[float] = []

    def judge(model: mode.Transformer, of: Sequence[Sample]) -> Evaluation:
        began = time.perf_counter()
        found = evaluate(arm, model, list(of), key=key)
        evaluating.append(time.perf_counter() - began)
        return found

    def on_the_way(now: Progress) -> None:
        if len(now.losses) < steps:
            marks.append(_mark(len(now.losses), judge(now.state.model, few)))

    trained = train(
        arm,
        size,
        run.recipe,
        corpus.train,
        steps=steps,
        seed=run.seed,
        watch=watch,
        saving=Saving(max(1, -(-steps // _MARKS)), on_the_way),
    )
    on_way = sum(evaluating)
    end = judge(trained.model, samples)
    return Record(
        run=run,
        parameters=parameter_count(trained.model),
        forward_flops=forward_flops_per_token(arm, size),
        step_flops=step_flops,
        steps=steps,
        end=_mark(steps, end),
        compute_top_k=end.routers[0].compute_top_k if end.routers else None,
        marks=tuple(marks),
        curve=_curve(trained.losses),
        seconds={
            "training": round(trained.seconds - on_way, 3),
            "waiting": round(trained.waiting_seconds, 4),
            "evaluating": round(sum(evaluating), 3),
        },
        step_seconds=trained.step_seconds,
        versions=versions("mode-jax", "jax", "equinox", "optax", "grain", "python"),
        machine=f"{platform.platform()}, {jax.default_backend()}, {os.cpu_count()} cores",
    )


def check_budget(run: Run) -> int:
    """How many steps a run takes.

    **Raises:** `ValueError` for a budget of less than two, and sizes that cannot be.
    """
    (arm,) = variants_named([run.arm])
    return steps_for(arm, run.budget, flops_per_step(arm, run.size))


def _mark(step: int, found: Evaluation) -> Mark:
    router = found.routers[0] if found.routers else None
    return Mark(
        step=step,
        bits_top_k=found.bits_top_k,
        bits_causal=found.bits_causal,
        precision=None if router is None else router.precision,
        recall=None if router is None else router.recall,
        compute=None if router is None else router.compute_causal,
    )


def _curve(losses: Sequence[float]) -> tuple[float, ...]:
    parts = np.array_split(np.asarray(losses), min(_POINTS, len(losses)))
    return tuple(round(float(part.mean()), 5) for part in parts)
