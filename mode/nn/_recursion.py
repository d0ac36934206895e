"""Recursion: one block applied in several rounds, to fewer tokens in each."""

import itertools
from collections.abc import Sequence
from fractions import Fraction

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from .._capacity import Capacity, exact_fraction
from .._checks import check_hidden
from .._dtypes import float32_or_wider
from .._token_info import TokenInfo
from .._types import Hidden, Key
from ..routing import AbstractGate, AbstractSelector, ExpertChoice, Router, Routing, SigmoidGate
from ._contracts import AbstractLayer, Block, Caches, LayerResult, check_block
from ._rounds import check_round_block, open_caches, run_rounds, split_keys
from ._routed_layer import check_select, make_depth_router


class Recursion(AbstractLayer):
    r"""Applies one block in rounds, to fewer tokens in each: expert choice of the depth.

    In round $r$ a router of its own selects tokens among those of the round before, and
    $x_i \leftarrow x_i + w_{ri} f(\tilde X_r)_i$ for them. A token that is not selected leaves for
    good, bit for bit as it is. In each round, the block sees the selected tokens alone and
    multiplies their values by their weights, as in `MixtureOfDepths`.

    **Arguments:**

    - `block`: any block without routers of its own.
    - `dim`: features of the hidden states.
    - `capacities`: for each round, the fraction of a group's tokens that take part; none is larger
        than the one before. Three rounds of the paper are `(1, 2 / 3, 1 / 3)`.
    - `share_keys`: whether later rounds read keys and values of the first round, so that there is
        one cache, and no weight on values; needs an `AbstractKeyedBlock`. Otherwise each round has
        its own, of its tokens.
    - `select`, `gate`: of the router of each round, as `MixtureOfDepths` takes them, or
        `UpdateThreshold`: early exit by the size of the update. The weight is bounded by default:
        one that grows with the hidden states would grow from round to round.
    - `router_std`: of `MixtureOfDepths`.

    **Returns**, when called: hidden states, and one routing for each round. A token that left is
    not `valid` in the rounds after.

    **Raises:** `ValueError` for a block with routers; for capacities outside (0, 1], or that grow;
    as `MixtureOfDepths`.

    >>> import jax, jax.numpy as jnp, mode
    >>> k1, k2 = jax.random.split(jax.random.key(0))
    >>> block = mode.TransformerBlock(32, num_heads=4, key=k1)
    >>> layer = mode.Recursion(block, 32, (1, 0.5, 0.25), key=k2)
    >>> hidden, routings = layer(jnp.ones((4, 64, 32)))
    >>> [routing.index.shape for routing in routings]
    [(4, 1, 64), (4, 1, 32), (4, 1, 16)]

    *Source:* arXiv:2507.10524, section 2.2, expert choice with hierarchical filtering, and keys by
    recursion or shared. *Relative to the paper:* the weights multiply values too.
    """

    routers: tuple[Router, ...]
    block: Block
    share_keys: bool = eqx.field(static=True)

    def __init__(
        self,
        block: Block,
        dim: int,
        capacities: Sequence[Capacity],
        *,
        share_keys: bool = False,
        select: AbstractSelector = ExpertChoice(),
        gate: AbstractGate = SigmoidGate(),
        router_std: float | None = None,
        key: PRNGKeyArray,
    ):
        check_block("block", block)
        check_round_block("Recursion", block, share_keys)
        exact = _check_capacities(capacities)
        options = {"select": select, "gate": gate, "std": router_std}
        self.routers = tuple(
            make_depth_router("Recursion", dim, capacity, among=before, **options, key=router_key)
            for before, capacity, router_key in zip(
                (1, *exact), exact, jax.random.split(key, len(exact)), strict=False
            )
        )
        self.block = block
        self.share_keys = share_keys

    @property
    def capacities(self) -> list[float]:
        """For each round, the fraction of a group's tokens that take part."""
        return [float(router.capacity) for router in self.routers]

    def extend(self, x: Hidden, info: TokenInfo, cache: Caches, *, key: Key = None) -> LayerResult:
        """Runs all rounds. See `AbstractLayer`."""
        check_hidden(x, self.routers[0].dim)
        for router in self.routers:
            check_select("Recursion", router.select)
        router_keys, block_keys = split_keys(key, len(self.routers))
        with jax.named_scope("mode.Recursion"):
            caches = open_caches(cache, x.shape[-2], self._slots, self.share_keys)
            routings: list[Routing] = []
            states: list[Hidden] = []  # before each round

            def route(number: int, x: Hidden) -> Routing:
                inside, change = info, jnp.full(info.positions.shape, jnp.inf)
                if routings:  # those that left are as padding to the router
                    selected = routings[-1].selected[..., 0]
                    inside = TokenInfo(info.positions, jnp.where(selected, info.segment_ids, 0))
                    change = _relative_change(states[-1], x)
                states.append(x)
                length, slots = caches.own[number].length, caches.slots[number]
                used = None if length is None else length[:, None]
                key = router_keys[number]
                routings.append(
                    self.routers[number](x, inside, slots=slots, used=used, change=change, key=key)
                )
                return routings[-1]

            capacities = [router.capacity for router in self.routers]
            x, news = run_rounds(self.block, x, info, caches, route, capacities, block_keys)
            return x, tuple(routings), news

    def _slots(self, num_tokens: int) -> list[int]:
        """The slots of each round in a sequence of `num_tokens`."""
        slots = [router.slots(num_tokens) for router in self.routers]
        return list(itertools.accumulate(slots, min))


def _relative_change(before: Hidden, after: Hidden) -> Float[Array, "*groups tokens"]:
    """The size of the last update of each token, relative to the token before it."""
    before, after = (
        jax.lax.stop_gradient(x).astype(float32_or_wider(x.dtype)) for x in (before, after)
    )
    size = jnp.linalg.norm(before, axis=-1)
    return jnp.linalg.norm(after - before, axis=-1) / jnp.where(size == 0, 1, size)


def _check_capacities(capacities: Sequence[Capacity]) -> list[Fraction]:
    """Checks the capacities of the rounds, and makes them exact."""
    if not (isinstance(capacities, Sequence) and capacities):
        raise ValueError(
            f"`capacities` must be a list of one fraction for each round, got {capacities!r}."
        )
    exact = [Fraction(1), *(exact_fraction("capacities", capacity) for capacity in capacities)]
    if any(after > before or after <= 0 for before, after in itertools.pairwise(exact)):
        raise ValueError(
            "`capacities` must be above 0, at most 1, and none larger than the one before, as a "
            f"round selects among the tokens of the one before, got {list(capacities)}."
        )
    return exact[1:]
