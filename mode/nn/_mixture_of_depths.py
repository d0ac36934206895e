"""The layers: dense, a block for every token, and Mixture-of-Depths, one for selected tokens."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PRNGKeyArray, PyTree

from .._capacity import Capacity, check_capacity
from .._checks import check_hidden
from .._token_info import TokenInfo
from .._types import ExpertLogits, Hidden, Key
from ..routing import (
    AbsoluteGate,
    AbstractGate,
    AbstractSelector,
    ExpertChoice,
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
from ._contracts import AbstractLayer, Block, Caches, LayerResult, check_block, run_block


class Residual(AbstractLayer):
    r"""A block applied to every token: $x + f(x)$. The dense layer.

    Padding passes by unchanged, and the block sees zeros in its place, so that no number in the
    padding can reach a real token or a gradient.

    **Arguments:**

    - `block`: any block.

    **Raises:** `ValueError` for what is no block; at the call, for one whose result is not an
    update of the shape of `x` and a tuple of routings.

    >>> import jax, jax.numpy as jnp, mode
    >>> block = mode.TransformerBlock(32, num_heads=4, key=jax.random.key(0))
    >>> hidden, routings = mode.Residual(block)(jnp.ones((4, 64, 32)))
    >>> hidden.shape, routings
    ((4, 64, 32), ())
    """

    block: Block

    def __check_init__(self):
        check_block("block", self.block)

    def extend(self, x: Hidden, info: TokenInfo, cache: Caches, *, key: Key = None) -> LayerResult:
        """Maps hidden states, `[*groups, tokens, dim]`, to hidden states. See `AbstractLayer`."""
        assert isinstance(cache, Cache)
        with jax.named_scope("mode.Residual"):
            real = info.valid[..., None]
            inputs = jnp.where(real, x, 0)
            update, routings, entries = run_block("block", self.block, inputs, info, cache, key)
            hidden = jnp.where(real, x + update.astype(x.dtype), x)
            return hidden, routings, Cache.of_tokens(entries, info, cache.max_tokens)


class MixtureOfDepths(AbstractLayer):
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
        check_capacity(capacity)
        check_block("block", block)
        _check_select(select)
        if isinstance(gate, SoftmaxGate | SelectedSoftmaxGate):
            raise ValueError(
                f"`gate` of `MixtureOfDepths` must not be a softmax, got {gate}: over its single "
                "choice it is always 1 and the router gets no gradient. Use `AbsoluteGate()` or "
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
        self.weigh_values = weigh_values

    @property
    def capacity(self) -> float:
        """Fraction of a group's tokens that take part."""
        return float(self.router.capacity)

    def extend(self, x: Hidden, info: TokenInfo, cache: Caches, *, key: Key = None) -> LayerResult:
        """Returns hidden states and `(routing, *the block's)`. See `AbstractLayer`.

        The new cache holds the selected tokens alone. After earlier tokens, a sequence none of
        whose new tokens is selected is not computed.
        """
        assert isinstance(cache, Cache)
        check_hidden(x, self.router.dim)
        _check_select(self.router.select)  # it and the capacity may have been swapped since
        check_capacity(self.router.capacity)
        router_key, block_key = (None, None) if key is None else jax.random.split(key)
        with jax.named_scope("mode.MixtureOfDepths"):
            if cache.is_empty and cache.max_tokens is not None:
                # It comes with the number of the model's tokens: this layer has slots for some.
                cache = Cache.empty(self.router.slots(cache.max_tokens))
            used = None if cache.length is None else cache.length[:, None]
            routing = self.router(x, info, slots=cache.max_tokens, used=used, key=router_key)
            slots = dispatch(x, routing)[0]
            slot_info = jax.tree.map(lambda leaf: leaf[0], dispatch_info(info, routing))
            weight = routing.weight[..., 0, :] if self.weigh_values else None
            slot_info = slot_info.with_weight(weight)

            def run(rows: Int[Array, " rows"] | None) -> PyTree:
                some: tuple[Array, TokenInfo, Cache] = (slots, slot_info, cache)
                if rows is not None:
                    some = jax.tree.map(lambda leaf: leaf[rows], some)
                return run_block("block", self.block, *some, block_key)

            if cache.is_empty:
                update, inner, entries = run(None)
            else:
                needed = jnp.any(routing.filled, axis=(-1, -2))
                sizes = bucket_sizes(x.shape[0], self.router.capacity)
                update, inner, entries = run_bucketed(run, needed, sizes)
                inner = tuple(routing.masked(needed) for routing in inner)
            hidden = combine(update[None], routing, onto=x)
            return hidden, (routing, *inner), Cache.of_tokens(entries, slot_info, cache.max_tokens)


def _check_select(select: AbstractSelector) -> None:
    if isinstance(select, TokenChoice):
        raise ValueError(
            f"`select` of `MixtureOfDepths` must not be `TokenChoice`, got {select}: every token "
            "would request the single choice, and the first ones get it. Use `ExpertChoice()`, or "
            "`LogitThreshold()`, under which tokens decide for themselves."
        )
