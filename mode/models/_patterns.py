"""Patterns of dense and routed layers, and the paper's model."""

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import PRNGKeyArray

from .._capacity import Capacity
from .._checks import check_count
from ..nn import MixtureOfDepths, Residual, TransformerBlock
from ..routing import AbsoluteGate, AbstractGate, Predictor
from ._stack import MakeLayer, Period
from ._transformer import Transformer


def interleave(
    dense: MakeLayer,
    routed: MakeLayer | Sequence[MakeLayer],
    depth: int,
    *,
    every: int = 2,
    offset: int = 1,
) -> list[tuple[Period, int]]:
    """Returns the stacks of a `Transformer` in which every few layers are routed.

    Layers `offset`, `offset + every`, ... are routed, all others dense.

    **Arguments:**

    - `dense`, `routed`: build a layer from a key. A sequence for `routed` is a schedule, one
        function per routed layer from bottom to top; neighbours that are the same function share a
        scan.
    - `depth`: number of layers.
    - `every`: period of the routed layers; 1 routes all of them from `offset` on.
    - `offset`: the first routed layer, counted from 0.

    **Returns:** a list of `(period, repeats)`, as `Transformer(..., stacks=)` takes it.

    **Raises:** `ValueError` for `depth` or `every` below 1, a negative `offset`, or a schedule of
    another length than the number of routed layers.

    >>> import mode
    >>> dense, routed = (lambda key: ...), (lambda key: ...)
    >>> [(len(period), repeats) for period, repeats in mode.interleave(dense, routed, 7)]
    [(2, 3), (1, 1)]

    *Source:* arXiv:2404.02258, section 4.1: routing every other block is crucial. *Relative to the
    paper:* it does not say whether the first block is routed; here it is dense.
    """
    schedule = _schedule("routed", "layer", routed, depth, every, offset)
    layers = [dense] * depth
    layers[offset::every] = schedule
    # The first dense layers that belong to no period, whole periods, and what is left of one.
    start = min(offset // every * every, depth)
    stacks: list[tuple[Period, int]] = [([dense], start)] if start else []
    periods = [layers[bottom : bottom + every] for bottom in range(start, depth, every)]
    stacks += [(period, len(list(same))) for period, same in itertools.groupby(periods)]
    return stacks


def mod_transformer(
    vocab: int,
    dim: int,
    depth: int,
    num_heads: int,
    *,
    capacity: Capacity | Sequence[Capacity] = 0.125,
    every: int = 2,
    offset: int = 1,
    num_kv_heads: int | None = None,
    gate: AbstractGate = AbsoluteGate(),
    predictor: bool = False,
    tied: bool = True,
    dtype: DTypeLike = jnp.float32,
    remat: bool = False,
    key: PRNGKeyArray,
) -> Transformer:
    """Builds the paper's model: a `Transformer` with Mixture-of-Depths around every other block.

    **Arguments:**

    - `vocab`, `dim`, `tied`, `dtype`, `remat`: of `Transformer`.
    - `depth`, `every`, `offset`: number of layers, and which are routed: of `interleave`.
    - `num_heads`, `num_kv_heads`: of `TransformerBlock`.
    - `capacity`: of each routed layer; a sequence is a schedule, one number per routed layer from
        bottom to top. Neighbours of one capacity share a scan.
    - `gate`: of `MixtureOfDepths`.
    - `predictor`: whether each router has a `Predictor`.

    **Raises:** `ValueError` for a schedule of another length than the number of routed layers.

    >>> import jax, jax.numpy as jnp, mode
    >>> model = mode.mod_transformer(256, 32, depth=12, num_heads=4, key=jax.random.key(0))
    >>> logits, (routing,) = model(jnp.zeros((2, 64), int))
    >>> logits.shape, routing.index.shape  # six routed layers, one scan
    ((2, 64, 256), (6, 2, 1, 8))

    *Source:* arXiv:2404.02258, sections 3.4 and 4.1.
    """

    def block(key: PRNGKeyArray) -> TransformerBlock:
        return TransformerBlock(dim, num_heads, num_kv_heads=num_kv_heads, key=key)

    def dense(key: PRNGKeyArray) -> Residual:
        return Residual(block(key))

    def routed(capacity: Capacity) -> MakeLayer:
        def make(key: PRNGKeyArray) -> MixtureOfDepths:
            block_key, router_key, predictor_key = jax.random.split(key, 3)
            guess = Predictor(dim, key=predictor_key) if predictor else None
            return MixtureOfDepths(
                block(block_key), dim, capacity, gate=gate, predictor=guess, key=router_key
            )

        return make

    capacities = _schedule("capacity", "number", capacity, depth, every, offset)
    makes: list[MakeLayer] = []
    for value, same in itertools.groupby(capacities):
        makes += [routed(value)] * len(list(same))  # the same function: they share a scan
    stacks = interleave(dense, makes, depth, every=every, offset=offset)
    return Transformer(vocab, dim, stacks=stacks, tied=tied, dtype=dtype, remat=remat, key=key)


def _schedule(name: str, kind: str, value: Any, depth: int, every: int, offset: int) -> list[Any]:
    """Returns one value per routed layer, from a sequence of them or one for all."""
    check_count("depth", depth, 1)
    check_count("every", every, 1)
    check_count("offset", offset, 0)
    count = len(range(offset, depth, every))
    schedule = list(value) if isinstance(value, Sequence) else [value] * count
    if len(schedule) != count:
        raise ValueError(
            f"`{name}` must have one {kind} per routed layer, {count}, got {len(schedule)}."
        )
    return schedule
