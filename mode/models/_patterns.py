"""Patterns of dense and routed layers, and the paper's model."""

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import PRNGKeyArray

from .._capacity import Capacity
from .._checks import check_count
from ..nn import MixtureOfDepths, Residual, TransformerBlock
from ..routing import AbstractGate, IdentityGate, Predictor
from ._stack import MakeLayer
from ._transformer import Transformer


Period = list[MakeLayer]


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
    for name, value, least in (("depth", depth, 1), ("every", every, 1), ("offset", offset, 0)):
        check_count(name, value, least)
    count = len(range(offset, depth, every))
    schedule = list(routed) if isinstance(routed, Sequence) else [routed] * count
    if len(schedule) != count:
        raise ValueError(
            f"`routed` must have one layer per routed layer, {count}, got {len(schedule)}."
        )
    # The first dense layers that belong to no period, whole periods, and the dense rest.
    start = min(offset // every * every, depth)
    inside = offset - start
    stacks: list[tuple[Period, int]] = [([dense], start)]
    repeats = (depth - start) // every
    for make, same in itertools.groupby(schedule[:repeats]):
        period = [make if index == inside else dense for index in range(every)]
        stacks.append((period, len(list(same))))
    rest = schedule[repeats:]
    tail = [rest[0] if index == inside else dense for index in range((depth - start) % every)]
    stacks.append((tail, 1))
    return [(period, times) for period, times in stacks if period and times]


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
    gate: AbstractGate = IdentityGate(),
    predictor: bool = False,
    tied: bool = True,
    dtype: DTypeLike = jnp.float32,
    remat: bool = False,
    key: PRNGKeyArray,
) -> Transformer:
    """Builds the paper's model: a `Transformer` with Mixture-of-Depths around every other block.

    **Arguments:**

    - `vocab`, `dim`, `tied`, `dtype`, `remat`: of `Transformer`.
    - `depth`: number of layers.
    - `num_heads`, `num_kv_heads`: of `TransformerBlock`.
    - `capacity`: of each routed layer; a sequence is a schedule, one number per routed layer from
        bottom to top. Neighbours of one capacity share a scan.
    - `every`, `offset`: which layers are routed, see `interleave`.
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
            return MixtureOfDepths(
                block(block_key),
                dim,
                capacity,
                gate=gate,
                predictor=Predictor(dim, key=predictor_key) if predictor else None,
                key=router_key,
            )

        return make

    if isinstance(capacity, Sequence):
        count = len(range(offset, depth, every))
        if len(capacity) != count:
            raise ValueError(
                f"`capacity` must have one number per routed layer, {count}, got {len(capacity)}."
            )
        # One function per run of equal capacities: those that are the same share a scan.
        makes = [
            make
            for value, same in itertools.groupby(capacity)
            for make in [routed(value)] * len(list(same))
        ]
        stacks = interleave(dense, makes, depth, every=every, offset=offset)
    else:
        stacks = interleave(dense, routed(capacity), depth, every=every, offset=offset)
    return Transformer(vocab, dim, stacks=stacks, tied=tied, dtype=dtype, remat=remat, key=key)
