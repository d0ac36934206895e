"""What layers that route tokens to one block have in common."""

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray, PyTree

from .._capacity import Capacity, check_capacity
from .._checks import check_hidden
from .._token_info import TokenInfo
from .._types import Gathered, Hidden, Key
from ..routing import (
    AbstractSelector,
    Router,
    Routing,
    SelectedSoftmaxGate,
    SoftmaxGate,
    TokenChoice,
    dispatch,
    dispatch_info,
)
from ._buckets import bucket_sizes, run_bucketed
from ._cache import Cache
from ._contracts import AbstractLayer, Block, BlockResult


class AbstractRoutedLayer(AbstractLayer):
    """A layer in which one router selects the tokens that a block computes."""

    router: eqx.AbstractVar[Router]
    block: eqx.AbstractVar[Block]

    @property
    def capacity(self) -> float:
        """Fraction of a group's tokens that take part."""
        return float(self.router.capacity)

    def check(self, x: Hidden) -> None:
        """Checks the input, and what may have been swapped since the layer was built."""
        check_hidden(x, self.router.dim)
        check_select(type(self).__name__, self.router.select)
        check_capacity(self.router.capacity)

    def own_cache(self, cache: Cache) -> Cache:
        """Gives an empty cache, which comes with the number of the model's tokens, the slots that
        this layer has for some of them."""
        if cache.is_empty and cache.max_tokens is not None:
            return Cache.empty(self.router.slots(cache.max_tokens))
        return cache

    def select_tokens(
        self, x: Hidden, info: TokenInfo, cache: Cache, key: Key
    ) -> tuple[Routing, Gathered, TokenInfo]:
        """Routes new tokens after the selected ones in the cache, and gathers those of each slot,
        `[*groups, slots, dim]`."""
        used = None if cache.length is None else cache.length[:, None]
        routing = self.router(x, info, slots=cache.max_tokens, used=used, key=key)
        return routing, *gather_slots(x, info, routing)


def gather_slots(x: Hidden, info: TokenInfo, routing: Routing) -> tuple[Gathered, TokenInfo]:
    """Gathers the tokens of a router with one choice, `[*groups, slots, dim]`."""
    slot_info = dispatch_info(info, routing)
    return dispatch(x, routing)[0], jax.tree.map(lambda leaf: leaf[0], slot_info)


def run_rows(
    run: Callable[..., BlockResult], inputs: tuple[Any, ...], routing: Routing, capacity: Fraction
) -> BlockResult:
    """Runs a block on the slots of all sequences; after earlier tokens, on about those of the
    sequences with a selected token.

    **Arguments:**

    - `run`, `inputs`: the block and its inputs, of which the last one is its cache.
    - `routing`: of one choice.
    - `capacity`: the usual fraction of sequences with a selected token.
    """
    if inputs[-1].is_empty:
        return run(*inputs)

    def run_some(rows: PyTree) -> BlockResult:
        some = inputs if rows is None else jax.tree.map(lambda leaf: leaf[rows], inputs)
        return run(*some)

    needed = jnp.any(routing.filled, axis=(-1, -2))
    count = needed.shape[0]
    # Gathering the caches of more than half of the rows takes longer than running all of them.
    sizes = tuple(
        size for size in bucket_sizes(count, capacity) if 2 * size <= count or size == count
    )
    update, inner, entries = run_bucketed(run_some, needed, sizes)
    return update, tuple(routing.masked(needed) for routing in inner), entries


def make_depth_router(
    layer: str, dim: int, capacity: Capacity, *, key: PRNGKeyArray, **options: Any
) -> Router:
    """Builds the router of one choice. The options are those of `Router`; `layer` is for errors."""
    check_capacity(capacity)
    check_select(layer, options["select"])
    if isinstance(options["gate"], SoftmaxGate | SelectedSoftmaxGate):
        raise ValueError(
            f"`gate` of `{layer}` must not be a softmax, got {options['gate']}: over its single "
            "choice it is always 1 and the router gets no gradient. Use `AbsoluteGate()` or "
            "`SigmoidGate()`."
        )
    return Router(dim, capacity=capacity, key=key, **options)


def check_select(layer: str, select: AbstractSelector) -> None:
    """Refuses a selector that means nothing for a router of one choice."""
    if isinstance(select, TokenChoice):
        raise ValueError(
            f"`select` of `{layer}` must not be `TokenChoice`, got {select}: every token would "
            "request the single choice, and the first ones get it. Use `ExpertChoice()`, or "
            "`LogitThreshold()`, under which tokens decide for themselves."
        )
