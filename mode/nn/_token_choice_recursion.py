"""Recursion in which each token chooses its depth at the start."""

from fractions import Fraction

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PRNGKeyArray

from .._capacity import Capacity, exact_fraction
from .._checks import check_count, check_hidden
from .._token_info import TokenInfo
from .._types import Hidden, Key
from ..routing import AbstractGate, Router, Routing, SigmoidGate, TokenChoice
from ._cache import Cache
from ._contracts import AbstractLayer, Block, Caches, LayerResult, check_block
from ._rounds import check_round_block, open_caches, run_rounds, split_keys


class TokenChoiceRecursion(AbstractLayer):
    r"""Applies one block in rounds, as many to a token as it chooses at the start.

    One router, whose choices are the depths $1, \dots, R$: a token that chooses depth $d$ takes
    part in the rounds $1$ to $d$, in each of which $x_i \leftarrow x_i + w_i f(\tilde X_r)_i$. No
    token looks at a later one, so that training and sampling follow one rule. A token for which its
    depth has no slot left takes part in none. Train with `load_balance_loss`.

    **Arguments:**

    - `block`, `dim`, `share_keys`: of `Recursion`.
    - `repeats`: the largest depth.
    - `capacity_factor`: slots over all depths, per token; each has the same number.
    - `gate`: from logits to weights.
    - `router_std`: of `MixtureOfDepths`.

    **Returns**, when called: hidden states and `(routing,)`, whose experts are the depths.

    **Raises:** `ValueError` for a block with routers, `repeats` below 1, or, at the call, another
    selector than `TokenChoice(1)`.

    >>> import jax, jax.numpy as jnp, mode
    >>> k1, k2 = jax.random.split(jax.random.key(0))
    >>> block = mode.TransformerBlock(32, num_heads=4, key=k1)
    >>> layer = mode.TokenChoiceRecursion(block, 32, repeats=3, key=k2)
    >>> hidden, (routing,) = layer(jnp.ones((4, 63, 32)))
    >>> routing.index.shape  # 21 slots for each depth
    (4, 3, 21)

    *Source:* arXiv:2507.10524, section 2.2, token choice. *Relative to the paper:* the weight
    multiplies the update of every round, not that of the last one alone.
    """

    router: Router
    block: Block
    share_keys: bool = eqx.field(static=True)

    def __init__(
        self,
        block: Block,
        dim: int,
        repeats: int,
        *,
        capacity_factor: Capacity = 1.0,
        share_keys: bool = False,
        gate: AbstractGate = SigmoidGate(),
        router_std: float | None = None,
        key: PRNGKeyArray,
    ):
        check_block("block", block)
        check_round_block("TokenChoiceRecursion", block, share_keys)
        repeats = check_count("repeats", repeats, 1)
        self.router = Router(
            dim,
            repeats,
            capacity=exact_fraction("capacity_factor", capacity_factor) / repeats,
            select=TokenChoice(1),
            gate=gate,
            std=router_std,
            key=key,
        )
        self.block = block
        self.share_keys = share_keys

    def extend(self, x: Hidden, info: TokenInfo, cache: Caches, *, key: Key = None) -> LayerResult:
        """Runs all rounds. See `AbstractLayer`."""
        check_hidden(x, self.router.dim)
        self._check_select()
        repeats = self.router.num_experts
        router_keys, block_keys = split_keys(key, repeats)
        with jax.named_scope("mode.TokenChoiceRecursion"):
            caches = open_caches(cache, x.shape[-2], self._slots, self.share_keys)
            used = _used_by_depth(caches.own)
            routing = self.router(x, info, slots=caches.slots[-1], used=used, key=router_keys[0])
            capacities = [
                min(Fraction(1), self.router.capacity * (repeats - number))
                for number in range(repeats)
            ]

            def route(number: int, x: Hidden) -> Routing:
                del x  # every depth was chosen at the start
                return _at_least(routing, number)

            x, news = run_rounds(self.block, x, info, caches, route, capacities, block_keys)
            return x, (routing,), news

    def _slots(self, num_tokens: int) -> list[int]:
        """The slots of each round in a sequence of `num_tokens`."""
        repeats, slots = self.router.num_experts, self.router.slots(num_tokens)
        return [min(num_tokens, slots * (repeats - number)) for number in range(repeats)]

    def _check_select(self) -> None:
        select = self.router.select
        if not (isinstance(select, TokenChoice) and select.k == 1):
            raise ValueError(
                "`select` of `TokenChoiceRecursion` must be `TokenChoice(1)`, one depth for each "
                f"token, got {select}. `Recursion` takes other selectors."
            )


def _used_by_depth(caches: tuple[Cache, ...]) -> Int[Array, "batch depths"] | None:
    """How many earlier tokens chose each depth: those of a round that are not in the next one."""
    if caches[0].length is None:
        return None
    lengths = jnp.stack([cache.length for cache in caches if cache.length is not None], axis=-1)
    return lengths - jnp.pad(lengths[:, 1:], ((0, 0), (0, 1)))


def _at_least(routing: Routing, number: int) -> Routing:
    """The routing, with one expert, of all tokens whose depth is above `number`."""
    width = min(routing.num_tokens, routing.index.shape[-1] * (routing.index.shape[-2] - number))
    index = routing.index[..., number:, :].reshape(*routing.index.shape[:-2], 1, -1)
    weight = routing.weight[..., number:, :].reshape(index.shape)
    order = jnp.argsort(index, axis=-1)[..., :width]
    return eqx.tree_at(
        lambda r: (r.index, r.weight),
        routing,
        (jnp.take_along_axis(index, order, axis=-1), jnp.take_along_axis(weight, order, axis=-1)),
    )
