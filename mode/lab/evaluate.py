"""Held-out loss twice over: as trained, which may see the future, and as it would be sampled from.

The first number without the second is not a result: top-k over a sequence tells a token something
about later ones.
"""

import dataclasses
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

import mode

from .arms import Arm
from .data import Batch, Sample
from .devices import feed, own_rows, to_host
from .step import next_byte_loss


# Tokens of the routing map: what is readable across a page.
SNIPPET = 80


@dataclasses.dataclass(frozen=True)
class RouterReport:
    """One router of a routed layer, all layers of its kind together.

    **Attributes:**

    - `precision`, `recall`: of the causal rule against top-k at the same hidden states; `None`
        where the training selection is causal as it is.
    - `compute_top_k`, `compute_causal`: slots filled per token that reached the router.
    """

    precision: float | None
    recall: float | None
    compute_top_k: float
    compute_causal: float


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Held-out results of one arm.

    **Attributes:**

    - `bits_top_k`: bits per byte under the training selection.
    - `bits_causal`: bits per byte under the causal rule, every token that asks being taken.
    - `routers`: from the outermost to the innermost of a routed layer; none for a dense arm.
    - `bytes`: how many bytes were predicted.
    """

    bits_top_k: float
    bits_causal: float
    routers: tuple[RouterReport, ...]
    bytes: int


def causal_model(arm: Arm, model: mode.Transformer) -> mode.Transformer:
    """The model as it would be sampled from: the arm's rule, every token that asks is taken."""
    return mode.causal(model, by=arm.rule, limit=1.0)


@eqx.filter_jit
def _loss(
    model: mode.Transformer, sample: dict[str, Int[Array, "batch sample"]], key: PRNGKeyArray
) -> tuple[Float[Array, ""], Float[Array, ""], tuple[mode.Routing, ...]]:
    batch = Batch.of(sample)
    loss, routings = next_byte_loss(model, batch, key)
    return loss, jnp.sum(batch.weights), routings


def _run(
    model: mode.Transformer, samples: list[Sample], key: PRNGKeyArray, mesh: Mesh | None
) -> tuple[float, int, tuple[mode.Routing, ...]]:
    """Bits per byte, bytes, and the routings of all batches as if of one."""
    rows = [{name: x[own_rows(len(x))] for name, x in sample.items()} for sample in samples]
    results = [
        to_host(_loss(model, feed(sample, mesh), jax.random.fold_in(key, place)))
        for place, sample in enumerate(rows)
    ]
    losses = np.array([float(loss) for loss, _, _ in results])
    weights = np.array([float(weight) for _, weight, _ in results])
    bits = float(np.sum(losses * weights) / np.sum(weights) / math.log(2))

    def joined(*leaves: np.ndarray) -> np.ndarray:
        # Axis 0 is the layers that are scanned over, axis 1 the batch.
        return np.concatenate(leaves, axis=1)

    routings: PyTree = jax.tree.map(joined, *(routings for _, _, routings in results))
    return bits, int(weights.sum()), routings


def evaluate(
    arm: Arm,
    model: mode.Transformer,
    samples: list[Sample],
    *,
    key: PRNGKeyArray,
    mesh: Mesh | None = None,
) -> Evaluation:
    """Both losses, and what the causal rule does, on held-out batches.

    Precision and recall are taken at the hidden states of the top-k run: on those of the causal run
    the two rules would be asked about different things from the second routed layer on.
    """
    bits, count, routings = _run(model, samples, key, mesh)
    if not routings:
        return Evaluation(bits, bits, (), count)
    causal_bits, _, causal_routings = _run(causal_model(arm, model), samples, key, mesh)
    reports = _reports(arm.rule, model, routings, causal_routings)
    return Evaluation(bits, causal_bits, reports, count)


def _reports(
    rule: mode.AbstractRule | None,
    model: mode.Transformer,
    routings: tuple[mode.Routing, ...],
    causal_routings: tuple[mode.Routing, ...],
) -> tuple[RouterReport, ...]:
    found, compute, causal_compute = _numbers(rule, model, routings, causal_routings)
    return tuple(
        RouterReport(
            precision=None if found is None else float(found[place].precision),
            recall=None if found is None else float(found[place].recall),
            compute_top_k=float(compute[place]),
            compute_causal=float(causal_compute[place]),
        )
        for place in range(len(routings))
    )


# One program: run operation by operation, each of these would be compiled by itself.
@eqx.filter_jit
def _numbers(
    rule: mode.AbstractRule | None,
    model: mode.Transformer,
    routings: tuple[mode.Routing, ...],
    causal_routings: tuple[mode.Routing, ...],
) -> tuple[list[mode.Agreement] | None, list[Float[Array, ""]], list[Float[Array, ""]]]:
    found = None
    if rule is not None:
        asked = mode.causal_membership(model, routings, by=rule)
        found = list(map(mode.agreement, routings, asked))
    compute, causal_compute = (
        [mode.routing_metrics(routing).compute for routing in some]
        for some in (routings, causal_routings)
    )
    return found, compute, causal_compute


def routing_sample(
    arm: Arm, model: mode.Transformer, samples: list[Sample], *, key: PRNGKeyArray
) -> dict[str, np.ndarray]:
    """Who was taken in a piece of held-out text, for the routing map.

    **Returns:** `tokens`, `[tokens]`, and for a routed arm `top_k` and `causal`,
    `[layers, tokens]`: how many experts took the token under each selection. Of nested routers the
    outermost: the tokens of the others are slots, not places in the text.
    """
    place, row, first = _readable(samples)
    part = slice(first, first + SNIPPET)
    found = {"tokens": samples[place]["tokens"][row, :-1][part]}
    # The whole batch, though one sequence is shown: that program is compiled already.
    inputs = jax.tree.map(jnp.asarray, samples[place])
    for name, chosen in (("top_k", model), ("causal", causal_model(arm, model))):
        _, _, routings = _loss(chosen, inputs, key)
        if routings:
            found[name] = np.asarray(routings[0].selected)[:, row, part].sum(-1)
    return found


def _readable(samples: list[Sample]) -> tuple[int, int, int]:
    """What to show, as batch, row and first token: a line of one printable document, neither mostly
    blank nor without a word break. The very first tokens where no such line is found."""
    start = len(samples) // 3
    for place in (*range(start, len(samples)), *range(start)):
        for row in range(len(samples[place]["tokens"])):
            tokens = samples[place]["tokens"][row, :-1]
            segments = samples[place]["segment_ids"][row, :-1]
            breaks = np.flatnonzero(tokens == ord("\n")) + 1
            breaks = breaks[breaks <= len(tokens) - SNIPPET]
            if not len(breaks) or segments.min() != segments.max():
                continue
            shown = tokens[breaks[-1] : breaks[-1] + SNIPPET]
            blank = np.isin(shown, list(b" \n\t")).mean()
            if 0.1 <= blank <= 0.3 and np.all(((shown >= 32) & (shown < 127)) | (shown == 10)):
                return place, row, int(breaks[-1])
    return 0, 0, 0
