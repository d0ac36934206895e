"""Held-out loss twice over: as trained, which may see the future, and as text is sampled.

The first without the second is no result: top-k over a sequence tells a token about later ones.
"""

import dataclasses
import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Int, PRNGKeyArray

import mode
from mode._types import ExpertLogits, ExpertMask, Logits, Scalar
from mode.routing import Routings, selected_mask

from .arms import Arm
from .data import Batch, Sample
from .devices import feed, own_rows, to_host
from .step import next_byte_loss


# Tokens of the routing map: what is readable across a page.
SNIPPET = 80


@dataclasses.dataclass(frozen=True)
class RouterReport:
    """One router of a routed layer, all layers of its kind together.

    Precision and recall are of the causal rule against top-k at the same hidden states; `None`
    where the training selection is causal already. Compute is slots filled per token that reached
    the router.
    """

    precision: float | None
    recall: float | None
    compute_top_k: float
    compute_causal: float


@dataclasses.dataclass(frozen=True)
class Snippet:
    """A piece of held-out text, and by how many experts of each routed layer, `[layers][tokens]`,
    each token was selected. Of nested routers that is the outermost: the tokens of the others are
    slots, not positions in the text."""

    tokens: tuple[int, ...]
    top_k: tuple[tuple[int, ...], ...]
    causal: tuple[tuple[int, ...], ...]


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Held-out results of one arm: bits per byte, of how many bytes, and what its routers did.

    `bits_causal` has a slot for every token that the causal rule selects. `bits_without` is the
    same with every routing weight 0 (`without_updates`); arms of which no recovery is computed have
    none. Routers come from the outermost to the innermost of a routed layer; a dense arm has none,
    and no snippet.
    """

    bits_top_k: float
    bits_causal: float
    bytes: int
    routers: tuple[RouterReport, ...] = ()
    snippet: Snippet | None = None
    bits_without: float | None = None


class _NoWeight(mode.AbstractGate):
    def scores(self, logits: Logits) -> Logits:
        return logits

    def __call__(self, logits: Logits, selected: ExpertMask) -> ExpertLogits:
        return jnp.zeros_like(logits[..., : selected.shape[-1]])


def without_updates(model: mode.Transformer) -> mode.Transformer:
    """The trained model with every routing weight 0: all tokens pass by the routed blocks.

    If it predicts as well as before, the model has learned to do without them, whatever its loss
    is beside that of other arms.
    """
    return mode.map_routers(lambda r: eqx.tree_at(lambda r: r.gate, r, _NoWeight()), model)


@eqx.filter_jit
def _loss(
    model: mode.Transformer, sample: dict[str, Int[Array, "batch sample"]], key: PRNGKeyArray
) -> tuple[Scalar, Scalar, Routings]:
    batch = Batch.of(sample)
    loss, routings = next_byte_loss(model, batch, key)
    return loss, jnp.sum(batch.weights), routings


def held_out_loss(
    model: mode.Transformer, samples: list[Sample], key: PRNGKeyArray, mesh: Mesh | None = None
) -> tuple[float, int, Routings]:
    """Nats per token, tokens, and the routings of all batches as if of one."""
    results = []
    for number, sample in enumerate(samples):
        rows = feed({name: x[own_rows(len(x))] for name, x in sample.items()}, mesh)
        results.append(to_host(_loss(model, rows, jax.random.fold_in(key, number))))
    losses, weights = np.array([numbers for *numbers, _ in results], float).T
    loss = float(np.sum(losses * weights) / np.sum(weights))
    # Axis 0 is the layers that are scanned over, axis 1 the batch.
    parts = (routings for *_, routings in results)
    routings = jax.tree.map(lambda *leaves: np.concatenate(leaves, axis=1), *parts)
    return loss, int(weights.sum()), routings


def evaluate(
    arm: Arm,
    model: mode.Transformer,
    samples: list[Sample],
    *,
    key: PRNGKeyArray,
    mesh: Mesh | None = None,
) -> Evaluation:
    """Computes both losses, and how the causal rule agrees with top-k, on held-out batches.

    Precision and recall are computed at the hidden states of the top-k run. At those of the causal
    run the two rules would decide about different tokens from the second routed layer on.
    """
    nats, count, routings = held_out_loss(model, samples, key, mesh)
    bits = nats / math.log(2)
    if not routings:
        return Evaluation(bits, bits, count)
    causal_model, without = arm.causal(model), None
    causal_nats, _, causal_routings = held_out_loss(causal_model, samples, key, mesh)
    if arm.recovers:
        nats, *_ = held_out_loss(without_updates(causal_model), samples, key, mesh)
        without = nats / math.log(2)
    numbers = jax.tree.map(float, _compare(arm.rule, model, routings, causal_routings))
    reports = tuple(RouterReport(*row) for row in numbers)
    snippet = _snippet(samples, routings[0], causal_routings[0])
    causal_bits = causal_nats / math.log(2)
    return Evaluation(bits, causal_bits, count, reports, snippet, without)


# One program: run operation by operation, each of these would be compiled by itself.
@eqx.filter_jit
def _compare(
    rule: mode.AbstractThreshold | None,
    model: mode.Transformer,
    routings: Routings,
    causal: Routings,
) -> list[tuple[Any, ...]]:
    """Of each router, the numbers of its `RouterReport`."""
    accuracy = [(None, None)] * len(routings)
    if rule is not None:
        masks = mode.causal_selection(model, routings, threshold=rule)
        pairs = map(mode.selection_accuracy, routings, masks)
        accuracy = [(pair.precision, pair.recall) for pair in pairs]
    return [
        (*pair, *(mode.routing_metrics(routing).compute for routing in both))
        for pair, *both in zip(accuracy, routings, causal, strict=True)
    ]


def _snippet(samples: list[Sample], top_k: mode.Routing, causal: mode.Routing) -> Snippet:
    tokens, segments = (
        np.concatenate([sample[name][:, :-1] for sample in samples])
        for name in ("tokens", "segment_ids")
    )
    row, first = _readable(tokens, segments)
    part = slice(first, first + SNIPPET)

    def counts(routing: mode.Routing) -> tuple[tuple[int, ...], ...]:
        selected = selected_mask(jnp.asarray(routing.index[:, row]), routing.num_tokens)
        return tuple(map(tuple, np.asarray(selected)[:, part].sum(-1).tolist()))

    return Snippet(tuple(tokens[row, part].tolist()), counts(top_k), counts(causal))


def _readable(
    tokens: Int[np.ndarray, "rows tokens"], segments: Int[np.ndarray, "rows tokens"]
) -> tuple[int, int]:
    """The row and first token of a line of one printable document, neither mostly blank nor without
    a word break. The very first tokens where there is no such line."""
    for row in np.roll(np.arange(len(tokens)), -(len(tokens) // 3)):
        breaks = np.flatnonzero(tokens[row] == ord("\n")) + 1
        breaks = breaks[breaks <= tokens.shape[1] - SNIPPET]
        if not len(breaks) or segments[row].min() != segments[row].max():
            continue
        shown = tokens[row, breaks[-1] : breaks[-1] + SNIPPET]
        blank = np.isin(shown, list(b" \n\t")).mean()
        if 0.1 <= blank <= 0.3 and np.all(((shown >= 32) & (shown < 127)) | (shown == 10)):
            return int(row), int(breaks[-1])
    return 0, 0
