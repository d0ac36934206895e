"""Observations of a model on a text: its predictions, and every decision of its routers."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray
from scipy import special

import mode
from mode.nn import AbstractRoutedLayer

from .data import Batch, Sequences
from .measures import prediction_entropy


# Tokens in one forward pass, at most: the batch of a run may be one for many devices.
_MAX_TOKENS = 2**14


@dataclasses.dataclass(frozen=True)
class RouterPlace:
    """The layers that one router serves, by their numbers in the model, from 1 at the bottom.

    The tokens of a router that is `nested`, inside a routed block, are that block's slots.
    """

    layers: tuple[int, ...]
    nested: bool

    @property
    def name(self) -> str:
        """The name of the router in tables and pictures."""
        return name_layers(self.layers) + (", inside the block" if self.nested else "")


def name_layers(layers: Sequence[int]) -> str:
    """Names layers by their numbers.

    >>> name_layers([2]), name_layers([2, 4]), name_layers(range(1, 9))
    ('layer 2', 'layers 2, 4', 'layers 1, 2 ... 8')
    """
    numbers = [str(layer) for layer in layers]
    if len(numbers) > 6:
        return f"layers {numbers[0]}, {numbers[1]} ... {numbers[-1]}"
    return f"layer{'s' if len(numbers) > 1 else ''} {', '.join(numbers)}"


def router_places(model: mode.Transformer) -> list[RouterPlace]:
    """Finds the layers of each router, in the order of the model's routings."""
    places, below = [], 0
    for stack in model.stacks:
        period = len(stack.layers)
        for number, layer in enumerate(stack.layers, 1):
            layers = tuple(below + number + period * repeat for repeat in range(stack.repeats))
            is_depth = isinstance(layer, AbstractRoutedLayer)
            for position in range(len(mode.routers(layer))):
                places.append(RouterPlace(layers, nested=is_depth and position > 0))
        below += period * stack.repeats
    return places


class RouterObservation(eqx.Module):
    """The decisions of one router.

    `weight` is the gate's output, by which an expert's output is multiplied where it is selected,
    and `noop` the probability of all no-op experts together, `None` for a router without. Tokens
    that are not `counted` are in no number of an analysis.
    """

    weight: Float[np.ndarray, "sequences layers tokens experts"]
    selected: Bool[np.ndarray, "sequences layers tokens experts"]
    noop: Float[np.ndarray, "sequences layers tokens"] | None
    counted: Bool[np.ndarray, "sequences layers tokens"]
    place: RouterPlace = eqx.field(static=True)


class Observation(eqx.Module):
    """A model on some sequences, under one rule of selection.

    `entropy` is that of the prediction of the next byte made at the token, `loss` the surprise of
    the byte that came, both in bits. `counted` is false for padding, and where the next byte is in
    another document. `routers` go from the lowest to the highest, from the outermost to the
    innermost.
    """

    entropy: Float[np.ndarray, "sequences tokens"]
    loss: Float[np.ndarray, "sequences tokens"]
    counted: Bool[np.ndarray, "sequences tokens"]
    routers: tuple[RouterObservation, ...]

    @property
    def outer(self) -> list[RouterObservation]:
        """The routers that are not nested."""
        return [router for router in self.routers if not router.place.nested]

    @property
    def layers(self) -> tuple[int, ...]:
        """The numbers of the routed layers, from the lowest to the highest."""
        return tuple(sorted(layer for router in self.outer for layer in router.place.layers))

    @property
    def counts(self) -> Int[np.ndarray, "layers sequences tokens"]:
        """How many experts of each routed layer selected a token. A routed block is one expert;
        what it contains is not counted."""
        counts = np.zeros((len(self.layers), *self.counted.shape), int)
        for router in self.outer:
            layers = np.searchsorted(self.layers, router.place.layers)
            counts[layers] = np.moveaxis(router.selected.sum(-1), 1, 0)
        return counts

    @property
    def fractions(self) -> Float[np.ndarray, " choices"]:
        """The fraction of the counted tokens that each expert of each routed layer selected."""
        selected = (np.moveaxis(router.selected, 1, 2)[self.counted] for router in self.outer)
        return np.concatenate([np.zeros(0), *(part.mean(0).ravel() for part in selected)])


@eqx.filter_jit
def _forward(
    model: mode.Transformer, sample: dict[str, Int[Array, "batch sample"]], key: PRNGKeyArray
) -> tuple[Any, ...]:
    """The logits, their targets, which of these count, and the decisions of each router."""
    batch = Batch.of(sample)
    logits, routings = model(batch.inputs, batch.info, key=key)

    def arrays(router: mode.Router, routing: mode.Routing) -> tuple[Array, ...]:
        # The record has the weights of the selected tokens alone.
        weight = router.gate(routing.logits, routing.selected)
        return weight, routing.selected, routing.logits, routing.index

    # Sequences before layers, as in all that is observed.
    routers = mode.map_router_routings(arrays, model, routings)
    routers = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), routers)
    return logits, batch.targets, batch.weights > 0, routers


def observe(
    model: mode.Transformer,
    source: Sequences,
    rows: Sequence[int],
    *,
    batch: int,
    key: PRNGKeyArray,
) -> Observation:
    """Runs some sequences through a model as it is.

    `rows` are the numbers of the sequences in `source`, `batch` the most of them in one forward
    pass, and `key` is for selectors that draw random numbers.

    **Raises:** `ValueError` where no target counts, or a prediction is not finite.
    """
    batch = max(1, min(batch, _MAX_TOKENS // source.length))
    places, parts = router_places(model), []
    for first in range(0, len(rows), batch):
        samples = [source[int(row)] for row in rows[first : first + batch]]
        size = len(samples)
        # Padding follows the last sequence: one program runs every part.
        samples += [jax.tree.map(np.zeros_like, samples[0])] * (batch - size)
        sample = jax.tree.map(lambda *rows: jnp.asarray(np.stack(rows)), *samples)
        output = _forward(model, sample, jax.random.fold_in(key, first))
        output = jax.tree.map(lambda x, size=size: np.asarray(x)[:size], output)
        parts.append(_observation(places, *output))
    observation: Observation = jax.tree.map(lambda *x: np.concatenate(x), *parts)
    if not observation.counted.any():
        raise ValueError(
            "`data` must have at least one byte that follows another one of its file, got none in "
            "the sequences that were read."
        )
    if not np.isfinite(observation.entropy[observation.counted]).all():
        raise ValueError(
            "`checkpoint` must be of a model whose predictions are finite, got one with logits "
            "that are not numbers."
        )
    return observation


def _observation(
    places: Sequence[RouterPlace],
    logits: np.ndarray,
    targets: np.ndarray,
    counted: np.ndarray,
    decisions: Sequence[tuple[np.ndarray, ...]],
) -> Observation:
    log_probability = special.log_softmax(logits.astype(np.float64), axis=-1) / np.log(2)
    loss = -np.take_along_axis(log_probability, targets[..., None], axis=-1)[..., 0]
    counted_slots, routers = counted, []
    for place, (weight, selected, choices, index) in zip(places, decisions, strict=True):
        reached = counted_slots
        if not place.nested:
            reached = np.repeat(counted[:, None], len(place.layers), axis=1)
            # Whether the token in each slot counts. An empty slot has one index past the last.
            padded = np.pad(reached, ((0, 0), (0, 0), (0, 1)))
            counted_slots = np.take_along_axis(padded, index[:, :, 0], axis=-1)
        noop, experts = None, weight.shape[-1]
        if choices.shape[-1] > experts:
            noop = special.softmax(choices.astype(np.float64), axis=-1)[..., experts:].sum(-1)
        routers.append(RouterObservation(weight, selected, noop, reached, place))
    return Observation(prediction_entropy(logits), loss, counted, tuple(routers))
