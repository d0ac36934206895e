"""Mixture-of-Depths: a block that only the tokens selected by its router take part in."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PRNGKeyArray, PyTree

from .._capacity import Capacity, check_capacity
from .._checks import check_hidden
from .._token_info import TokenInfo
from .._types import ExpertLogits, Hidden, Key
from ..routing import (
    ROUTER_STD,
    AbstractGate,
    AbstractSelector,
    ExpertChoice,
    IdentityGate,
    Router,
    SelectedSoftmaxGate,
    SoftmaxGate,
    TokenChoice,
    combine,
    dispatch,
    dispatch_info,
)
from ._buckets import bucket_sizes, run_bucketed
from ._cache import Cache
from ._contracts import AbstractLayer, Block, Caches, Routings, check_block, run_block


class MixtureOfDepths(AbstractLayer):
    r"""Routes a fixed number of tokens through a block and the rest around it.

    $x_i + r_i f(\tilde X)_i$ for the $C$ selected tokens $\tilde X$, and $x_i$, bit for bit, for
    all others, with $r = w^\top x$. The block sees the selected tokens alone, in time order, with
    their original positions and segments; a skipped token is not a key in it either.

    **Arguments:**

    - `block`: any block. `Delta` makes one of a module with its own skip connection.
    - `dim`: features of the hidden states.
    - `capacity`: fraction of each group's tokens that take part, in (0, 1].
        `token_capacity(tokens, capacity)` slots.
    - `select`: the selector. Training uses `ExpertChoice()`, which sees the future; `make_causal`
        makes the model that may be sampled from.
    - `gate`: from the router's logit to the weight $r$; by default the logit itself.
    - `predictor`: guesses the selection for causal inference; `Predictor(dim, key=key)` or `None`.
    - `router_std`: standard deviation of the router's initial weights.

    **Raises:** `ValueError` for a capacity outside (0, 1]; for a layer, which has its own residual,
    or another module that is no block; for a softmax gate: over one choice it is 1 and the router
    gets no gradient; for `TokenChoice`: of one choice, every token would select it.

    >>> import jax, jax.numpy as jnp, mode
    >>> k1, k2 = jax.random.split(jax.random.key(0))
    >>> block = mode.TransformerBlock(32, num_heads=4, key=k1)
    >>> layer = mode.MixtureOfDepths(block, 32, capacity=0.125, key=k2)
    >>> hidden, (routing,) = layer(jnp.ones((4, 64, 32)))
    >>> hidden.shape, routing.index.shape
    ((4, 64, 32), (4, 1, 8))

    *Source:* arXiv:2404.02258, section 3.4, equation 1. *Relative to the paper:* equation 1 prints
    the raw weight, section 3.5 speaks of its sigmoid; `gate` offers both and defaults to the
    equation. $f$ is the block's update, so that $r = 1$ is the dense block and no residual is
    counted twice. Equation 1 compares with a percentile and leaves ties open; here exactly $C$
    tokens are selected, of equals the earlier ones.
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
        gate: AbstractGate = IdentityGate(),
        predictor: Callable[..., ExpertLogits] | None = None,
        router_std: float = ROUTER_STD,
        key: PRNGKeyArray,
    ):
        check_capacity(capacity)
        check_block("block", block)
        _check_select(select)
        if isinstance(gate, SoftmaxGate | SelectedSoftmaxGate):
            raise ValueError(
                f"`gate` of `MixtureOfDepths` must not be a softmax, got {gate}: over its single "
                "choice it is always 1 and the router gets no gradient. Use `IdentityGate()` or "
                "`SigmoidGate()`."
            )
        self.router = Router(
            dim,
            capacity=capacity,
            select=select,
            gate=gate,
            predictor=predictor,
            std=router_std,
            key=key,
        )
        self.block = block

    @property
    def capacity(self) -> float:
        """Fraction of a group's tokens that take part."""
        return float(self.router.capacity)

    def extend(
        self, x: Hidden, info: TokenInfo, cache: Caches, *, key: Key = None
    ) -> tuple[Hidden, Routings, Cache]:
        """Returns hidden states and `(routing, *the block's)`. See `AbstractLayer`.

        The new cache holds the selected tokens alone. After earlier tokens, a sequence none of
        whose new tokens is selected is not computed.
        """
        assert isinstance(cache, Cache)
        check_hidden(x, self.router.dim)
        _check_select(self.router.select)  # it may have been swapped since
        router_key, block_key = (None, None) if key is None else jax.random.split(key)
        with jax.named_scope("mode.MixtureOfDepths"):
            cache = self._own_cache(cache)
            used = None if cache.length is None else cache.length[:, None]
            routing = self.router(x, info, slots=cache.max_tokens, used=used, key=router_key)
            slots = dispatch(x, routing)[0]
            slot_info = jax.tree.map(lambda leaf: leaf[0], dispatch_info(info, routing))

            def run(rows: Int[Array, " rows"] | None) -> tuple[Array, Routings, PyTree]:
                some = (slots, slot_info, cache)
                if rows is not None:
                    some = jax.tree.map(lambda leaf: leaf[rows], some)
                return run_block("block", self.block, some[0], some[1], some[2], block_key)

            if cache.is_empty:
                update, inner, entries = run(None)
            else:
                needed = jnp.any(routing.filled, axis=(-1, -2))
                sizes = bucket_sizes(x.shape[0], self.router.capacity)
                update, inner, entries = run_bucketed(run, needed, sizes)
                inner = tuple(routing.masked(needed) for routing in inner)
            hidden = combine(update[None], routing, onto=x)
            new = Cache.of_tokens(entries, slot_info, cache.max_tokens)
            return hidden, (routing, *inner), new

    def _own_cache(self, cache: Cache) -> Cache:
        """An empty cache comes with the tokens of the model: this layer has slots for some."""
        if cache.is_empty and cache.max_tokens is not None:
            return Cache.empty(self.router.slots(cache.max_tokens))
        return cache


def _check_select(select: AbstractSelector) -> None:
    if isinstance(select, TokenChoice):
        raise ValueError(
            f"`select` of `MixtureOfDepths` must not be `TokenChoice`, got {select}: with a single "
            "choice every token requests it, and the first ones would be selected whatever they "
            "are. Use `ExpertChoice()`, or `LogitThreshold()`, under which tokens decide for "
            "themselves."
        )
