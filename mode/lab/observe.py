"""What a model did on a text under a selection: its predictions, and every router's decisions."""

import dataclasses
from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

import mode

from .data import Batch, Sequences
from .measures import expert_shares, log_probabilities, prediction_entropy


# Tokens of one forward pass: a run's own batch may have been for many devices.
_AT_ONCE = 2**14

# Weights and selection, `[*layers, batch, tokens or slots, experts]`.
_Weighed = tuple[Array, Array]


@dataclasses.dataclass(frozen=True)
class Router:
    """What one router did, in all the layers that are scanned over with it.

    **Attributes:**

    - `layers`: their numbers in the model, from 1 at the bottom.
    - `nested`: whether it is inside a routed block, so that its tokens are that block's slots.
    - `weight`: `[layers, sequences, tokens, experts]`, the gate's output, which multiplies what an
        expert returns for the tokens that it takes and nothing for the others.
    - `selected`: of the same shape, whether the expert took the token.
    - `noop`: `[layers, sequences, tokens]`, the probability of all no-ops together; `None` for a
        router without.
    - `counted`: `[layers, sequences, tokens]`, whether the token is one that counts.
    """

    layers: tuple[int, ...]
    nested: bool
    weight: Float[np.ndarray, "layers sequences tokens experts"]
    selected: Bool[np.ndarray, "layers sequences tokens experts"]
    noop: Float[np.ndarray, "layers sequences tokens"] | None
    counted: Bool[np.ndarray, "layers sequences tokens"]


@dataclasses.dataclass(frozen=True)
class Observed:
    """A model on some sequences, under one selection.

    **Attributes:**

    - `entropy`: `[sequences, tokens]`, of the next-byte prediction made at the token, in bits.
    - `loss`: `[sequences, tokens]`, bits that the byte that came cost.
    - `counted`: `[sequences, tokens]`, false for padding and where the document ends.
    - `routers`: from the bottom to the top, and of nested ones from the outermost to the innermost.
    """

    entropy: Float[np.ndarray, "sequences tokens"]
    loss: Float[np.ndarray, "sequences tokens"]
    counted: Bool[np.ndarray, "sequences tokens"]
    routers: tuple[Router, ...]

    @property
    def bits(self) -> float:
        """Bits per byte."""
        return float(self.loss[self.counted].mean())

    @property
    def layers(self) -> tuple[int, ...]:
        """The numbers of the routed layers, from the bottom to the top."""
        return tuple(
            sorted(n for router in self.routers if not router.nested for n in router.layers)
        )

    @property
    def taken(self) -> Int[np.ndarray, "layers sequences tokens"]:
        """How many experts of each routed layer took a token; of a nested layer, its block."""
        outer = [router for router in self.routers if not router.nested]
        if not outer:
            return np.zeros((0, *self.counted.shape), np.int64)
        order = np.argsort([n for router in outer for n in router.layers], kind="stable")
        return np.concatenate([router.selected.sum(-1) for router in outer])[order]

    @property
    def most(self) -> int:
        """The largest number that the layers of `taken` can add up to."""
        outer = (router for router in self.routers if not router.nested)
        return sum(len(router.layers) * router.weight.shape[-1] for router in outer)

    @property
    def rates(self) -> Float[np.ndarray, " takers"]:
        """The share of the counted tokens that each expert of each layer took."""
        outer = (router for router in self.routers if not router.nested)
        shares = [expert_shares(router.selected, router.counted).ravel() for router in outer]
        return np.concatenate([np.zeros(0), *shares])


def places_of(model: mode.Transformer) -> list[tuple[tuple[int, ...], bool]]:
    """Of each router, in the order of the routings: its layers, and whether it is nested."""
    places = []
    first = 1
    for stack in model.stacks:
        period = len(stack.layers)
        for place, layer in enumerate(stack.layers):
            layers = tuple(first + place + period * repeat for repeat in range(stack.repeats))
            inside = isinstance(layer, mode.MixtureOfDepths)
            count = len(mode.routers(layer))
            places += [(layers, inside and number > 0) for number in range(count)]
        first += period * stack.repeats
    return places


@eqx.filter_jit
def _forward(
    model: mode.Transformer,
    sample: dict[str, Int[Array, "batch sample"]],
    key: PRNGKeyArray,
) -> tuple[
    Float[Array, "batch tokens vocab"],
    Float[Array, "batch tokens"],
    tuple[mode.Routing, ...],
    list[_Weighed],
]:
    batch = Batch.of(sample)
    logits, routings = model(batch.inputs, batch.info, key=key)

    def weighed(router: mode.Router, routing: mode.Routing) -> _Weighed:
        # The record has the weights of the taken alone.
        return router.gate(routing.logits, routing.selected), routing.selected

    return logits, batch.weights, routings, mode.for_each_router(weighed, model, routings)


def observe(
    model: mode.Transformer,
    source: Sequences,
    places: Sequence[int],
    *,
    batch: int,
    key: PRNGKeyArray,
) -> Observed:
    """Run the sequences of `source` at `places` through the model as it stands.

    **Arguments:**

    - `batch`: sequences at once, at most.
    - `key`: for selections that draw random numbers.

    **Raises:** `ValueError` where no target counts, or a prediction is not finite.
    """
    rows = max(1, min(batch, _AT_ONCE // source.length))
    where = places_of(model)
    parts = [
        _part(
            model, source, places[first : first + rows], rows, where, jax.random.fold_in(key, first)
        )
        for first in range(0, len(places), rows)
    ]
    routers = tuple(_joined([part.routers[n] for part in parts]) for n in range(len(where)))
    found = Observed(
        np.concatenate([part.entropy for part in parts]),
        np.concatenate([part.loss for part in parts]),
        np.concatenate([part.counted for part in parts]),
        routers,
    )
    _check(found)
    return found


def _part(
    model: mode.Transformer,
    source: Sequences,
    places: Sequence[int],
    rows: int,
    where: list[tuple[tuple[int, ...], bool]],
    key: PRNGKeyArray,
) -> Observed:
    samples = [source[int(place)] for place in places]
    # All padding behind the last sequence: one program serves every part.
    samples += [jax.tree.map(np.zeros_like, samples[0])] * (rows - len(samples))
    sample = {name: np.stack([one[name] for one in samples]) for name in samples[0]}
    found = _forward(model, jax.tree.map(jnp.asarray, sample), key)
    logits, weights, routings, weighed = jax.device_get(found)
    kept = slice(len(places))
    counted = weights[kept] > 0
    logs = log_probabilities(logits[kept])
    targets = sample["tokens"][kept, 1:, None]
    loss = -np.take_along_axis(logs, targets, axis=-1)[..., 0]
    routers = []
    inside = counted
    for (layers, nested), routing, (weight, selected) in zip(where, routings, weighed, strict=True):
        came = np.broadcast_to(counted, (len(layers), *counted.shape))
        if nested:
            came = inside
        elif routing.num_experts == 1:
            inside = _at_slots(counted, routing.index[:, kept, 0])
        noop = _noop(routing, kept)
        routers.append(Router(layers, nested, weight[:, kept], selected[:, kept], noop, came))
    return Observed(prediction_entropy(logits[kept]), loss, counted, tuple(routers))


def _at_slots(
    counted: Bool[np.ndarray, "sequences tokens"],
    index: Int[np.ndarray, "layers sequences slots"],
) -> Bool[np.ndarray, "layers sequences slots"]:
    """Whether the token in each slot counts; an empty slot's, one past the last, does not."""
    behind = np.pad(counted, ((0, 0), (0, 1)))
    return np.take_along_axis(np.broadcast_to(behind, (len(index), *behind.shape)), index, axis=-1)


def _noop(
    routing: mode.Routing, kept: slice
) -> Float[np.ndarray, "layers sequences tokens"] | None:
    experts = routing.num_experts
    logits = np.asarray(routing.logits)[:, kept]
    if logits.shape[-1] == experts:
        return None
    return np.exp2(log_probabilities(logits))[..., experts:].sum(-1)


def _joined(parts: list[Router]) -> Router:
    def along(name: str) -> np.ndarray:
        return np.concatenate([getattr(part, name) for part in parts], axis=1)

    noop = None if parts[0].noop is None else along("noop")
    return Router(
        parts[0].layers,
        parts[0].nested,
        along("weight"),
        along("selected"),
        noop,
        along("counted"),
    )


def _check(found: Observed) -> None:
    if not found.counted.any():
        raise ValueError(
            "`data` must have at least one byte that is followed by another of its file, got none "
            "in the sequences that were taken."
        )
    if not np.isfinite(found.entropy[found.counted]).all():
        raise ValueError(
            "`checkpoint` must be of a model whose predictions are finite, got one with logits "
            "that are not numbers."
        )
