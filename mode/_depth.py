"""Mixture-of-Depths: a block that only the tokens its router picks take part in."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from ._block import AbstractLayer, Block, Routings, check_block, run_block
from ._cache import Added, Past, extend_block
from ._capacity import Share, exact_fraction, is_finite
from ._demand import on_demand, slot_counts
from ._dispatch import combine, dispatch, dispatch_info
from ._gate import AbstractGate, Raw, SelectedSoftmax, Softmax
from ._info import TokenInfo, check_hidden, resolve_info
from ._router import ROUTER_STD, Predictor, Router
from ._select import AbstractSelector, ExpertChoice, TokenChoice


def check_capacity(capacity: Share) -> None:
    """Refuse a capacity that is not a share of the tokens."""
    if not (is_finite(capacity) and 0 < capacity <= 1):
        raise ValueError(
            f"`capacity` must be above 0 and at most 1, got {capacity!r}. It is the share of a "
            "group's tokens that take part in the block; the paper's best is 0.125."
        )


def _check_select(select: AbstractSelector) -> None:
    if isinstance(select, TokenChoice):
        raise ValueError(
            f"`select` of `MixtureOfDepths` must not be `TokenChoice`, got {select}: with a single "
            "choice every token asks for it, and the first ones would be taken whatever they are. "
            "Use `ExpertChoice()`, or `Threshold(ByLogit())`, under which tokens decide for "
            "themselves."
        )


class MixtureOfDepths(AbstractLayer):
    """Routes a fixed number of tokens through a block and the rest around it.

    $x_i + r_i f(\\tilde X)_i$ for the $C$ selected tokens $\\tilde X$, and $x_i$, bit for bit, for
    all others, with $r = w^\\top x$. The block sees the selected tokens alone, in time order, with
    their original positions and segments; a skipped token is not a key in it either.

    **Arguments:**

    - `block`: any block. `Delta` makes one of a module with its own skip connection.
    - `dim`: features of the hidden states.
    - `capacity`: share of each group's tokens that take part, in (0, 1].
        `token_capacity(tokens, capacity)` slots.
    - `select`: the selector. Training uses `ExpertChoice()`, which sees the future; `causal` makes
        the model that may be sampled from.
    - `gate`: from the router's logit to the weight $r$. The default is the logit itself, the
        equation's; over 9 seeds and 2 training budgets neither `Sigmoid()` (+0.003 bits per byte,
        -0.005 to +0.010) nor `Sigmoid(scale=2)` (-0.001, -0.012 to +0.010) was told from it
        (`benchmarks/EVIDENCE.md`).
    - `predictor`: guesses membership for causal inference; `Predictor(dim, key=key)` or `None`.
    - `position_bins`: running quantiles, each for some positions, that the causal rule `ByQuantile`
        compares with: how many. 1 is one for all; see `RouterState`.
    - `router_std`: standard deviation of the router's initial weights.

    **Raises:** `ValueError` for a capacity outside (0, 1]; for a layer, which has its own residual,
    or another module that is no block; for a softmax gate: over one choice it is 1 and the router
    gets no gradient; for `TokenChoice`: of one choice, every token would take it; for
    `position_bins` below 1.

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
    tokens are taken, of equals the earlier ones.
    """

    router: Router
    block: Block

    def __init__(
        self,
        block: Block,
        dim: int,
        capacity: Share = 0.125,
        *,
        select: AbstractSelector = ExpertChoice(),
        gate: AbstractGate = Raw(),
        predictor: Predictor | None = None,
        position_bins: int = 1,
        router_std: float = ROUTER_STD,
        key: PRNGKeyArray,
    ):
        check_capacity(capacity)
        check_block("block", block)
        _check_select(select)
        if isinstance(gate, Softmax | SelectedSoftmax):
            raise ValueError(
                f"`gate` of `MixtureOfDepths` must not be a softmax, got {gate}: over its single "
                "choice it is always 1 and the router gets no gradient. Use `Raw()` or `Sigmoid()`."
            )
        self.router = Router(
            dim,
            fraction=exact_fraction("capacity", capacity),
            select=select,
            gate=gate,
            predictor=predictor,
            position_bins=position_bins,
            std=router_std,
            key=key,
        )
        self.block = block

    @property
    def capacity(self) -> float:
        """Share of a group's tokens that take part."""
        return float(self.router.fraction)

    def __call__(
        self,
        x: Float[Array, "*groups tokens dim"],
        info: TokenInfo | None = None,
        *,
        key: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, "*groups tokens dim"], Routings]:
        """`x`: `[*groups, tokens, dim]`. Returns hidden states and `(routing, *the block's)`."""
        check_hidden(x, self.router.dim)
        _check_select(self.router.select)  # it may have been swapped since
        info = resolve_info(x, info)
        router_key, block_key = (None, None) if key is None else jax.random.split(key)
        with jax.named_scope("mode.MixtureOfDepths"):
            routing = self.router(x, info, key=router_key)
            slots = dispatch(x, routing)
            slot_info = jax.tree.map(lambda leaf: leaf[0], dispatch_info(info, routing))
            update, inner = run_block("block", self.block, slots[0], slot_info, block_key)
            return combine(update[None], routing, onto=x), (routing, *inner)

    def slots(self, max_tokens: int) -> int:
        """Tokens of a sequence that decoding keeps in this layer: those its selector may take."""
        return self.router.slots(max_tokens)

    def extend(
        self, x: Float[Array, "batch new dim"], info: TokenInfo, past: Past
    ) -> tuple[Float[Array, "batch new dim"], Added]:
        """Hidden states of new tokens, and what the cache of this layer gains: see `Past`.

        First tokens of any number, or one token after others. Members whose token goes around the
        block are not computed: those that want it share a static number of slots.
        """
        with jax.named_scope("mode.MixtureOfDepths"):
            return self._first(x, info, past) if past.info is None else self._next(x, info, past)

    def _first(
        self, x: Float[Array, "batch new dim"], info: TokenInfo, past: Past
    ) -> tuple[Float[Array, "batch new dim"], Added]:
        routing = self.router(x, info, slots=past.slots)
        slots = dispatch(x, routing)
        slot_info = jax.tree.map(lambda leaf: leaf[0], dispatch_info(info, routing))
        update, left = extend_block(self.block, slots[0], slot_info, past)
        return combine(update[None], routing, onto=x), Added(left, slot_info, routing.num_dropped)

    def _next(
        self, x: Float[Array, "batch new dim"], info: TokenInfo, past: Past
    ) -> tuple[Float[Array, "batch new dim"], Added]:
        assert past.info is not None
        held = jnp.sum(past.info.valid, axis=-1, dtype=jnp.int32)
        admission = self.router.admit(x, info, held[:, None], past.slots)
        taken = admission.taken[..., 0]
        took = TokenInfo(info.positions, jnp.where(taken, info.segment_ids, 0))
        members: tuple[Any, Any, Any] = (x, took, past)

        def run(index: Int[Array, " slots"] | None) -> tuple[Array, PyTree]:
            some = members if index is None else jax.tree.map(lambda leaf: leaf[index], members)
            rows, row_info, row_past = some
            return extend_block(self.block, rows, row_info, row_past)

        counts = slot_counts(x.shape[0], self.router.fraction)
        update, left = on_demand(run, taken[:, 0], counts)
        wide = admission.weight.dtype
        hidden = (x.astype(wide) + admission.weight * update.astype(wide)).astype(x.dtype)
        added = Added(left, took, jnp.sum(admission.refused, axis=(1, 2), dtype=jnp.int32))
        return jnp.where(taken[..., None], hidden, x), added
