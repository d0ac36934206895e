"""The transformer block: attention, then a feed-forward, both as updates of the residual stream."""

import jax
from jaxtyping import PRNGKeyArray, PyTree

from .._checks import check_hidden, type_name
from .._linear import MakeNorm, Norm, RMSNorm
from .._token_info import TokenInfo
from .._types import Gathered, GatheredIds, Hidden, Key
from ..parallel import role_field
from ._adapters import PositionWise, PreNorm
from ._attention import Attention
from ._attention_function import Attend, CausalAttention
from ._cache import Cache
from ._contracts import AbstractKeyedBlock, Block, BlockResult, Keys, check_block, run_block
from ._experts import SwiGLUFeedForward


class TransformerBlock(AbstractKeyedBlock):
    r"""Pre-norm attention and feed-forward as one update: $a + g(\text{norm}(x + a))$ with
    $a = \text{attention}(\text{norm}(x))$.

    The update rather than the sum: a router can weigh it without counting the residual twice, and
    it keeps its digits in bfloat16.

    **Arguments:**

    - `dim`: features of the hidden states; a multiple of `num_heads`.
    - `num_heads`, `num_kv_heads`, `rope_theta`, `attend`: of `Attention`.
    - `attention`: an `Attention` with other options, instead of those.
    - `feedforward`: any block, such as `PositionWise(GELUFeedForward(dim, key=key))` or a
        `MixtureOfExperts`; by default `PositionWise(SwiGLUFeedForward(dim, key=key))`.
    - `make_norm`: builds both norms from `dim`, such as `LayerNorm`.

    **Raises:** `ValueError` for sizes that do not divide, a feed-forward that is no block, or not
    exactly one of `num_heads` and `attention`.

    >>> import jax, jax.numpy as jnp, mode
    >>> block = mode.TransformerBlock(32, num_heads=4, num_kv_heads=2, key=jax.random.key(0))
    >>> update, routings = block(jnp.ones((4, 64, 32)))
    >>> update.shape, routings
    ((4, 64, 32), ())
    """

    attention_norm: Norm
    attention: Attention
    feedforward_norm: Norm
    feedforward: Block = role_field("feedforward")

    def __init__(
        self,
        dim: int,
        num_heads: int | None = None,
        *,
        num_kv_heads: int | None = None,
        rope_theta: float | None = 10_000.0,
        attend: Attend = CausalAttention(),
        attention: Attention | None = None,
        feedforward: Block | None = None,
        make_norm: MakeNorm = RMSNorm,
        key: PRNGKeyArray,
    ):
        attention_key, feedforward_key = jax.random.split(key)
        if attention is None and num_heads is not None:
            attention = Attention(
                dim,
                num_heads,
                num_kv_heads=num_kv_heads,
                rope_theta=rope_theta,
                attend=attend,
                key=attention_key,
            )
        elif attention is None or num_heads is not None:
            raise ValueError(
                "give exactly one of `num_heads` and `attention`, got "
                f"{'neither' if attention is None else 'both'}."
            )
        elif not isinstance(attention, Attention) or attention.qkv.weight.shape[0] != dim:
            raise ValueError(
                f"`attention` must be an `Attention` of dim={dim} features, got "
                f"{type_name(attention)}."
            )
        self.attention_norm = make_norm(dim)
        self.attention = attention
        self.feedforward_norm = make_norm(dim)
        if feedforward is None:
            feedforward = PositionWise(SwiGLUFeedForward(dim, key=feedforward_key))
        check_block("feedforward", feedforward)
        self.feedforward = feedforward

    def extend(self, x: Hidden, info: TokenInfo, cache: Cache, *, key: Key = None) -> BlockResult:
        """Returns the update and the feed-forward's routings. See `AbstractBlock`."""
        check_hidden(x, self.attention_norm.weight.shape[0])
        attended, _, keys = self.attention.extend(self.attention_norm(x), info, cache.part(0))
        update, routings, entries = self._feed_forward(x, attended, info, cache.part(1), key)
        return update, routings, (keys, entries)

    def keys(self, x: Hidden, info: TokenInfo) -> PyTree:
        """Returns keys and values of the attention. See `AbstractKeyedBlock`."""
        check_hidden(x, self.attention_norm.weight.shape[0])
        return self.attention.keys(self.attention_norm(x), info)

    def extend_queries(
        self,
        x: Gathered,
        info: TokenInfo,
        index: GatheredIds,
        keys: Keys,
        cache: Cache,
        *,
        key: Key = None,
    ) -> BlockResult:
        """Returns the update of some tokens. See `AbstractKeyedBlock`.

        The entries are those of the feed-forward.
        """
        normed = self.attention_norm(x)
        attended, _, _ = self.attention.extend_queries(normed, info, index, keys, cache)
        return self._feed_forward(x, attended, info, cache, key)

    def _feed_forward(
        self, x: Hidden, attended: Hidden, info: TokenInfo, cache: Cache, key: Key
    ) -> BlockResult:
        """Returns the update of both parts, and routings and entries of the feed-forward."""
        normed = self.feedforward_norm(x + attended)
        update, routings, entries = run_block(
            "feedforward", self.feedforward, normed, info, cache, key
        )
        return attended + update, routings, entries

    def split(self) -> tuple[PreNorm, PreNorm]:
        """Returns the attention and the feed-forward as two blocks, with the same parameters.

        `Sequential([Residual(attention), Residual(feedforward)])` computes what `Residual(self)`
        does; each can be routed by itself.

        >>> import jax, jax.numpy as jnp, mode
        >>> k1, k2 = jax.random.split(jax.random.key(0))
        >>> attention, feedforward = mode.TransformerBlock(32, num_heads=4, key=k1).split()
        >>> routed = mode.MixtureOfDepths(feedforward, 32, capacity=0.25, key=k2)
        >>> layer = mode.Sequential([mode.Residual(attention), routed])
        >>> hidden, (routing,) = layer(jnp.ones((4, 64, 32)))
        >>> hidden.shape, routing.index.shape
        ((4, 64, 32), (4, 1, 16))

        *Source:* arXiv:2506.04179, section 3, which routes both parts of a block.
        """
        return (
            PreNorm(self.attention_norm, self.attention),
            PreNorm(self.feedforward_norm, self.feedforward),
        )
