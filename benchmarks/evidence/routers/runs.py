"""One run of the study: a variant, trained and tested on text or on a task."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import numpy as np
from jaxtyping import Array, PRNGKeyArray
from variants import Variant

from mode.lab.commands import TASK_RECIPE
from mode.lab.data import Batch, Documents, batches, held_out_batches, read_corpus
from mode.lab.evaluate import without_updates
from mode.lab.options import Recipe, Size
from mode.lab.step import next_byte_loss
from mode.lab.tasks.arms import CONTROLS, TaskSize, build, train_and_score
from mode.lab.tasks.fit import fit
from mode.lab.tasks.sequences import task_named


def text_run(
    variant: Variant, seed: int, *, depth: int, steps: int, rate: float
) -> dict[str, float]:
    """Trains on text a model of 64 features with every other layer routed, and tests it.

    **Returns:** `bits`, the loss per byte of text that was not trained on; and `use`, how much it
    rises if the updates of the selected tokens are left out of the trained model.
    """
    size, recipe = (
        Size(depth=depth),
        dataclasses.replace(Recipe(learning_rate=rate), **variant.recipe),
    )
    train, test = split(read_corpus(None, length=size.length).train)
    stream = batches(train, length=size.length, batch=size.batch, seed=seed)
    samples = jax.tree.map(lambda *x: np.stack(x), *[next(stream) for _ in range(steps)])
    model_key, run_key = jax.random.split(jax.random.key(seed))

    sizes = {"vocab": size.vocab, "capacity": size.capacity, "repeats": size.depth // 2}
    model = build(
        variant.arm, TaskSize(size.dim, size.heads), variant.layer, **sizes, key=model_key
    )

    def objective(model: Any, sample: Any, key: PRNGKeyArray) -> Any:
        loss, routings = next_byte_loss(model, Batch.of(sample), key)
        return loss + variant.squared_cost(routings), routings

    model = fit(model, objective, samples, recipe, key=run_key)
    tests = held_out_batches(test, length=size.length, batch=size.batch, sequences=512)

    @eqx.filter_jit
    def loss(model: Any, sample: Any, key: Any) -> Array:
        return next_byte_loss(model, Batch.of(sample), key)[0]

    def mean_bits(model: Any) -> float:
        is_control = variant.arm in CONTROLS
        keys = [jax.random.fold_in(run_key, i) if is_control else None for i in range(len(tests))]
        losses = [float(loss(model, sample, key)) for sample, key in zip(tests, keys, strict=True)]
        return float(np.mean(losses)) / math.log(2)

    bits, without = mean_bits(model), mean_bits(without_updates(model))
    return {"bits": round(bits, 5), "use": round(without - bits, 5)}


def split(documents: Documents) -> tuple[Documents, Documents]:
    """Splits training documents: every tenth is to test on."""
    bounds = [*documents.starts, len(documents.tokens)]

    def some(numbers: Sequence[int]) -> Documents:
        parts = [documents.tokens[bounds[i] : bounds[i + 1]] for i in numbers]
        names = tuple(documents.names[i] for i in numbers)
        return Documents(names, np.concatenate(parts), np.cumsum([0, *map(len, parts)])[:-1])

    numbers = range(len(documents.names))
    return some([i for i in numbers if i % 10 != 9]), some([i for i in numbers if i % 10 == 9])


def task_run(name: str, variant: Variant, seed: int, steps: int | None) -> dict[str, float]:
    """Trains and tests on a task: accuracies by top-k and causally, and hit rates by class."""
    task, recipe = task_named(name), dataclasses.replace(TASK_RECIPE, **variant.recipe)
    top_k, causal = train_and_score(
        task,
        variant.arm,
        recipe,
        steps=steps or task.steps,
        seed=seed,
        make_routed=variant.layer,
        auxiliary=variant.squared_cost,
    )
    last = top_k if causal is None else causal
    return {"top-k": top_k.accuracy, "accuracy": last.accuracy, **last.hits}
