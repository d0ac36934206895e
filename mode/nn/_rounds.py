"""One round of a recursion: which tokens it runs, and whose keys they read."""

from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .._token_info import TokenInfo
from .._types import Gathered, GatheredIds, Hidden, Ids, Key
from ..routing import Routing, combine, routers
from ._cache import Cache
from ._contracts import AbstractKeyedBlock, Block, BlockResult, Caches, Keys, run_block
from ._routed_layer import gather_slots, run_rows


class RoundCaches(NamedTuple):
    """The caches of a recursion, and the slots that each round has in a whole sequence.

    `shared` is the cache of keys that all rounds share, `None` where each has its own.
    """

    shared: Cache | None
    own: tuple[Cache, ...]
    slots: list[int]


class SharedKeys(NamedTuple):
    """The keys of the first round, and where each token stands among them."""

    keys: Keys
    rank: Ids

    @property
    def new(self) -> Cache:
        """The cache of these tokens alone."""
        return Cache.of_tokens(self.keys.entries, self.keys.info, self.keys.cache.max_tokens)


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


def share_keys(
    block: Block, x: Hidden, info: TokenInfo, routing: Routing, cache: Cache
) -> SharedKeys:
    """Makes the keys of the tokens of the first round."""
    assert isinstance(block, AbstractKeyedBlock)
    slots, slot_info = gather_slots(x, info, routing)
    rank = jnp.cumsum(routing.selected[..., 0], axis=-1, dtype=jnp.int32) - 1
    return SharedKeys(Keys(cache, block.keys(slots, slot_info), slot_info), rank)


def run_round(
    block: Block,
    x: Hidden,
    info: TokenInfo,
    routing: Routing,
    own: Cache,
    shared: SharedKeys | None,
    capacity: Fraction,
    key: Key,
) -> tuple[Hidden, Cache]:
    """Runs the block on the tokens of one round.

    **Returns:** all hidden states, and the new cache of this round.
    """
    slots, slot_info = gather_slots(x, info, routing)

    def run_alone(slots: Gathered, info: TokenInfo, own: Cache) -> BlockResult:
        return run_block("block", block, slots, info, own, key)

    def run_queries(
        slots: Gathered, info: TokenInfo, index: GatheredIds, keys: Keys, own: Cache
    ) -> BlockResult:
        assert isinstance(block, AbstractKeyedBlock)
        return block.extend_queries(slots, info, index, keys, own, key=key)

    if shared is None:
        weighed = slot_info.with_weight(routing.weight[..., 0, :])
        run: Callable[..., BlockResult] = run_alone
        inputs: tuple[Any, ...] = (slots, weighed, own)
    else:
        token = jnp.minimum(routing.index[..., 0, :], routing.num_tokens - 1)
        rank = jnp.take_along_axis(shared.rank, token, axis=-1)
        count = shared.keys.info.positions.shape[-1]
        index = jnp.where(routing.filled[..., 0, :], rank, count)
        run, inputs = run_queries, (slots, slot_info, index, shared.keys, own)
    update, _, entries = run_rows(run, inputs, routing, capacity)
    hidden = combine(update[None], routing, onto=x)
    return hidden, Cache.of_tokens(entries, slot_info, own.max_tokens)


def check_round_block(layer: str, block: Block, share_keys: bool = False) -> None:
    """Refuses a block that cannot run in rounds."""
    if routers(block):
        raise ValueError(
            f"`block` of `{layer}` must have no router of its own, which would make several "
            f"routings in one call, got {type(block).__name__} with {len(routers(block))}."
        )
    if share_keys and not (isinstance(block, AbstractKeyedBlock) and block.is_keyed):
        raise ValueError(
            f"`block` of `{layer}` with `share_keys` must have keys of its own, as "
            f"`TransformerBlock` does, got {type(block).__name__}."
        )


def split_keys(key: Key, count: int) -> tuple[Sequence[Key], Sequence[Key]]:
    """Keys for the routers and the blocks of all rounds."""
    if key is None:
        return [None] * count, [None] * count
    keys = list(jax.random.split(key, 2 * count))
    return keys[:count], keys[count:]
