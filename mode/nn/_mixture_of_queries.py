"""Mixture-of-Depths in which skipped tokens are still keys."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from .._capacity import Capacity
from .._token_info import TokenInfo
from .._types import ExpertLogits, Gathered, GatheredIds, Hidden, Key
from ..routing import AbsoluteGate, AbstractGate, AbstractSelector, ExpertChoice, Router, combine
from ._cache import Cache
from ._contracts import (
    AbstractKeyedBlock,
    Block,
    BlockResult,
    Caches,
    Keys,
    LayerResult,
    check_keyed_block,
)
from ._routed_layer import AbstractRoutedLayer, make_depth_router, run_rows


class MixtureOfQueries(AbstractRoutedLayer):
    r"""Routes a fixed number of tokens through a block, in which all tokens are keys.

    $x_i + r_i f(X, i)$ for the $C$ selected tokens, and $x_i$, bit for bit, for all others. Every
    token leaves keys and values; queries, the rest of the attention and the feed-forward are those
    of the selected tokens. So a layer costs the projection of all keys more than `MixtureOfDepths`,
    its cache holds all tokens, and no token is lost to those that read it.

    Being read does not depend on being selected, so weights multiply the update alone.

    **Arguments:**

    - `block`: an `AbstractKeyedBlock`: `TransformerBlock`, `Attention`, or a `PreNorm` of one.
    - all others: of `MixtureOfDepths`.

    **Raises:** `ValueError` as `MixtureOfDepths`, and for a block that has no keys of its own.

    >>> import jax, jax.numpy as jnp, mode
    >>> k1, k2 = jax.random.split(jax.random.key(0))
    >>> block = mode.TransformerBlock(32, num_heads=4, key=k1)
    >>> layer = mode.MixtureOfQueries(block, 32, capacity=0.125, key=k2)
    >>> hidden, (routing,) = layer(jnp.ones((4, 64, 32)))
    >>> hidden.shape, routing.index.shape
    ((4, 64, 32), (4, 1, 8))

    *Source:* arXiv:2404.02258, section 5, which leaves the routing of queries, keys and values
    apart to others; arXiv:2303.09752, section 3.1; arXiv:2503.23798, section 3.
    """

    router: Router
    block: Block

    def __init__(
        self,
        block: Block,
        dim: int,
        capacity: Capacity = 0.125,
        *,
        select: AbstractSelector = ExpertChoice(),
        gate: AbstractGate = AbsoluteGate(),
        predictor: Callable[..., ExpertLogits] | None = None,
        router_std: float | None = None,
        key: PRNGKeyArray,
    ):
        options = {"select": select, "gate": gate, "predictor": predictor, "std": router_std}
        self.router = make_depth_router(type(self).__name__, dim, capacity, **options, key=key)
        self.block = _checked(block)

    def extend(self, x: Hidden, info: TokenInfo, cache: Caches, *, key: Key = None) -> LayerResult:
        """Returns hidden states and `(routing, *the block's)`. See `AbstractLayer`.

        The new cache is a pair: that of all tokens, and that of the selected ones.
        """
        self.check(x)
        block = _checked(self.block)  # it may have been swapped since
        # Of all tokens, and of the selected ones.
        of_all, own = (cache, self.own_cache(cache)) if isinstance(cache, Cache) else cache
        router_key, block_key = (None, None) if key is None else jax.random.split(key)
        with jax.named_scope("mode.MixtureOfQueries"):
            routing, slots, slot_info = self.select_tokens(x, info, own, router_key)
            # Zeros for padding: a NaN there would reach the gradients of parameters.
            entries = block.keys(jnp.where(info.valid[..., None], x, 0), info)

            def run(
                slots: Gathered, slot_info: TokenInfo, index: GatheredIds, keys: Keys, own: Cache
            ) -> BlockResult:
                return block.extend_queries(slots, slot_info, index, keys, own, key=block_key)

            index = routing.index[..., 0, :]
            inputs = (slots, slot_info, index, Keys(of_all, entries, info), own)
            update, inner, own_entries = run_rows(run, inputs, routing, self.router.capacity)
            hidden = combine(update[None], routing, onto=x)
            new = Cache.of_tokens(entries, info, of_all.max_tokens)
            new_own = Cache.of_tokens(own_entries, slot_info, own.max_tokens)
            return hidden, (routing, *inner), (new, new_own)


def _checked(block: Block) -> AbstractKeyedBlock:
    return check_keyed_block("`MixtureOfQueries`", block, "use `MixtureOfDepths`")
