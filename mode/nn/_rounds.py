"""The rounds of a recursion: which tokens each one runs, and whose keys they read."""

from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .._token_info import TokenInfo
from .._types import Gathered, GatheredIds, Hidden, Key
from ..routing import Routing, combine, routers
from ._cache import Cache
from ._contracts import (
    AbstractKeyedBlock,
    Block,
    BlockResult,
    Caches,
    Keys,
    check_keyed_block,
    run_block,
)
from ._routed_layer import gather_slots, run_rows


class RoundCaches(NamedTuple):
    """The caches of a recursion, and the slots that each round has in a whole sequence.

    `shared` is the cache of keys that all rounds share, `None` where each has its own.
    """

    shared: Cache | None
    own: tuple[Cache, ...]
    slots: list[int]


def open_caches(
    cache: Caches, num_tokens: int, slots: Callable[[int], list[int]], share_keys: bool
) -> RoundCaches:
    """Takes the caches of a recursion apart. `slots` says how many each round has in a sequence."""
    if not isinstance(cache, Cache):
        shared, own = (cache[0], cache[1:]) if share_keys else (None, cache)
        return RoundCaches(shared, own, [one.max_tokens for one in own])
    counts = slots(num_tokens if cache.max_tokens is None else cache.max_tokens)
    own = tuple(Cache.empty(count if cache.is_kept else None) for count in counts)
    return RoundCaches(own[0] if share_keys else None, own, counts)


def run_rounds(
    block: Block,
    x: Hidden,
    info: TokenInfo,
    caches: RoundCaches,
    route: Callable[[int, Hidden], Routing],
    capacities: Sequence[Fraction],
    keys: Sequence[Key],
) -> tuple[Hidden, tuple[Cache, ...]]:
    """Runs the block in rounds.

    **Arguments:**

    - `route`: returns the routing, of one choice, of the round with this number, from the hidden
        states before it.
    - `capacities`, `keys`: for each round, the usual fraction of tokens in it, and a key.

    **Returns:** hidden states, and the new caches: first that of the shared keys, if there is one.
    """

    def run_alone(key: Key, slots: Gathered, info: TokenInfo, own: Cache) -> BlockResult:
        return run_block("block", block, slots, info, own, key)

    def run_queries(
        key: Key, slots: Gathered, info: TokenInfo, index: GatheredIds, shared: Keys, own: Cache
    ) -> BlockResult:
        assert isinstance(block, AbstractKeyedBlock)
        return block.extend_queries(slots, info, index, shared, own, key=key)

    news: tuple[Cache, ...] = ()
    shared, rank = None, None  # the keys of the first round, and where each token stands among them
    for number, own in enumerate(caches.own):
        routing = route(number, x)
        slots, slot_info = gather_slots(x, info, routing)
        if number == 0 and caches.shared is not None:
            assert isinstance(block, AbstractKeyedBlock)
            shared = Keys(caches.shared, block.keys(slots, slot_info), slot_info)
            rank = jnp.cumsum(routing.selected[..., 0], axis=-1, dtype=jnp.int32) - 1
            news += (Cache.of_tokens(shared.entries, slot_info, caches.shared.max_tokens),)
        if shared is None:
            weighed = slot_info.with_weight(routing.weight[..., 0, :])
            run: Callable[..., BlockResult] = run_alone
            inputs: tuple[Any, ...] = (slots, weighed, own)
        else:
            assert rank is not None
            token = jnp.minimum(routing.index[..., 0, :], routing.num_tokens - 1)
            count = shared.info.positions.shape[-1]
            index = jnp.where(
                routing.filled[..., 0, :], jnp.take_along_axis(rank, token, axis=-1), count
            )
            run, inputs = run_queries, (slots, slot_info, index, shared, own)
        run = partial(run, keys[number])
        update, _, entries = run_rows(run, inputs, routing, capacities[number])
        x = combine(update[None], routing, onto=x)
        news += (Cache.of_tokens(entries, slot_info, own.max_tokens),)
    return x, news


def check_round_block(layer: str, block: Block, share_keys: bool = False) -> None:
    """Refuses a block that cannot run in rounds."""
    if routers(block):
        raise ValueError(
            f"`block` of `{layer}` must have no router of its own, which would make several "
            f"routings in one call, got {type(block).__name__} with {len(routers(block))}."
        )
    if share_keys:
        check_keyed_block(f"`{layer}` with `share_keys`", block, "leave `share_keys` out")


def split_keys(key: Key, count: int) -> tuple[Sequence[Key], Sequence[Key]]:
    """Keys for the routers and the blocks of all rounds."""
    if key is None:
        return [None] * count, [None] * count
    keys = list(jax.random.split(key, 2 * count))
    return keys[:count], keys[count:]
