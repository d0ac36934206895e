"""Mixture-of-Depths: a block for selected tokens."""

from collections.abc import Callable

import equinox as eqx
import jax
from jaxtyping import PRNGKeyArray

from .._capacity import Capacity
from .._token_info import TokenInfo
from .._types import ExpertLogits, Hidden, Key
from ..routing import AbsoluteGate, AbstractGate, AbstractSelector, ExpertChoice, Router, combine
from ._cache import Cache
from ._contracts import Block, BlockResult, Caches, LayerResult, check_block, run_block
from ._routed_layer import AbstractRoutedLayer, make_depth_router, run_rows


class MixtureOfDepths(AbstractRoutedLayer):
    r"""Routes a fixed number of tokens through a block and the rest around it.

    $x_i + r_i f(\tilde X, r)_i$ for the $C$ selected tokens $\tilde X$, and $x_i$, bit for bit, for
    all others, with $r = |w^\top x|$. The block sees the selected tokens alone, in time order, with
    their original positions and segments; a skipped token is not a key in it either. Its attention
    multiplies the values of the tokens by their weights.

    **Arguments:**

    - `block`: any block. `Delta` makes one of a module with its own skip connection.
    - `dim`: features of the hidden states.
    - `capacity`: fraction of each group's tokens that take part, in (0, 1]; see `token_capacity`.
    - `select`: the selector. `ExpertChoice()` is for training, as it sees the future; `make_causal`
        makes the model that may be sampled from.
    - `gate`: from the router's logit to the weight $r$; by default its absolute value.
    - `weigh_values`: whether the block gets the weights as `info.weight`, by which `Attention`
        multiplies the values of the tokens. Without it a router learns nothing of tokens that are
        of use only where others read them.
    - `predictor`: guesses the selection for causal inference; `Predictor(dim, key=key)` or `None`.
    - `router_std`: standard deviation of the router's initial weights; by default `dim ** -0.5`.

    Train with `router_l1_loss`, times a coefficient such as 0.03: without a cost of slots, a router
    hardly learns.

    **Raises:** `ValueError` for a capacity outside (0, 1]; for a layer or another module that is no
    block; for a softmax gate, which over one choice is 1 and gives the router no gradient; for
    `TokenChoice`, under which every token would select the one choice.

    >>> import jax, jax.numpy as jnp, mode
    >>> k1, k2 = jax.random.split(jax.random.key(0))
    >>> block = mode.TransformerBlock(32, num_heads=4, key=k1)
    >>> layer = mode.MixtureOfDepths(block, 32, capacity=0.125, key=k2)
    >>> hidden, (routing,) = layer(jnp.ones((4, 64, 32)))
    >>> hidden.shape, routing.index.shape
    ((4, 64, 32), (4, 1, 8))

    *Source:* arXiv:2404.02258, section 3.4, equation 1. *Relative to the paper:* equation 1 prints
    the raw weight, on the update alone, and section 3.5 speaks of its sigmoid; both are a `gate`
    away, with `weigh_values=False`. The default finds the tokens that matter where they are known
    (`mode-lab tasks`), which those do not. $f$ is the block's update, so that $r = 1$ is the dense
    block. Equation 1 leaves ties at its percentile open; here exactly $C$ tokens are selected, of
    equals the earlier ones.
    """

    router: Router
    block: Block
    weigh_values: bool = eqx.field(static=True)

    def __init__(
        self,
        block: Block,
        dim: int,
        capacity: Capacity = 0.125,
        *,
        select: AbstractSelector = ExpertChoice(),
        gate: AbstractGate = AbsoluteGate(),
        weigh_values: bool = True,
        predictor: Callable[..., ExpertLogits] | None = None,
        router_std: float | None = None,
        key: PRNGKeyArray,
    ):
        check_block("block", block)
        options = {"select": select, "gate": gate, "predictor": predictor, "std": router_std}
        self.router = make_depth_router(type(self).__name__, dim, capacity, **options, key=key)
        self.block = block
        self.weigh_values = weigh_values

    def extend(self, x: Hidden, info: TokenInfo, cache: Caches, *, key: Key = None) -> LayerResult:
        """Returns hidden states and `(routing, *the block's)`. See `AbstractLayer`.

        The new cache holds the selected tokens alone. After earlier tokens, a sequence none of
        whose new tokens is selected is not computed.
        """
        assert isinstance(cache, Cache)
        self.check(x)
        router_key, block_key = (None, None) if key is None else jax.random.split(key)
        with jax.named_scope("mode.MixtureOfDepths"):
            cache = self.own_cache(cache)
            routing, slots, slot_info = self.select_tokens(x, info, cache, router_key)
            weight = routing.weight[..., 0, :] if self.weigh_values else None
            slot_info = slot_info.with_weight(weight)

            def run(slots: Hidden, info: TokenInfo, cache: Cache) -> BlockResult:
                return run_block("block", self.block, slots, info, cache, block_key)

            inputs = (slots, slot_info, cache)
            update, inner, entries = run_rows(run, inputs, routing, self.router.capacity)
            hidden = combine(update[None], routing, onto=x)
            return hidden, (routing, *inner), Cache.of_tokens(entries, slot_info, cache.max_tokens)
