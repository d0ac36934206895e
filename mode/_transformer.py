"""The transformer block: attention, then a feed-forward, both as updates of the residual stream."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from ._adapt import PositionWise
from ._attention import Attend, causal_attention, extend_attention, rope
from ._block import AbstractBlock, Block, Routings, check_block, run_block
from ._cache import Past, extend_block
from ._capacity import check_count
from ._info import TokenInfo, check_hidden, resolve_info
from ._linear import Linear, RMSNorm, SwiGLU


class Attention(AbstractBlock):
    """Causal grouped-query self-attention with rotary embeddings at original positions. A block.

    Query head $h$ reads key-value head $\\lfloor h \\, H_{kv} / H \\rfloor$.

    **Arguments:**

    - `dim`: features of the hidden states; a multiple of `num_heads`.
    - `num_heads`: query heads; a multiple of `num_kv_heads`.
    - `num_kv_heads`: key-value heads; by default `num_heads`.
    - `rope_theta`: base of the rotary wavelengths.
    - `attend`: computes attention from `q`, `k`, `v` and segment ids; replaced to use a kernel of
        one's own.

    **Raises:** `ValueError` for sizes that do not divide, or an odd size of a head.

    *Source:* arXiv:1706.03762; grouped queries, arXiv:2305.13245.
    """

    qkv: Linear
    out: Linear
    num_heads: int = eqx.field(static=True)
    num_kv_heads: int = eqx.field(static=True)
    rope_theta: float = eqx.field(static=True)
    attend: Attend

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        rope_theta: float = 10_000.0,
        attend: Attend = causal_attention,
        key: PRNGKeyArray,
    ):
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        _check_heads(dim, num_heads, num_kv_heads)
        head_dim = dim // num_heads
        qkv_key, out_key = jax.random.split(key)
        # Queries, keys and values in one product: a tenth faster than three small ones.
        self.qkv = Linear(dim, (num_heads + 2 * num_kv_heads) * head_dim, key=qkv_key)
        self.out = Linear(dim, dim, key=out_key)
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.rope_theta = rope_theta
        self.attend = attend

    def __call__(
        self,
        x: Float[Array, "*groups tokens dim"],
        info: TokenInfo,
        *,
        key: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, "*groups tokens dim"], Routings]:
        """`x`: `[*groups, tokens, dim]`. Returns the update, and no routings."""
        del key
        check_hidden(x, self.qkv.weight.shape[0])
        info = resolve_info(x, info)
        with jax.named_scope("mode.Attention"):
            rows = x.reshape(-1, *x.shape[-2:])
            q, k, v = self._heads(rows, info.positions.reshape(rows.shape[:-1]))
            mixed = self.attend(q, k, v, info.segment_ids.reshape(rows.shape[:-1]))
            return self.out(mixed.reshape(rows.shape)).reshape(x.shape), ()

    def extend(
        self, x: Float[Array, "batch new dim"], info: TokenInfo, past: Past
    ) -> tuple[Float[Array, "batch new dim"], PyTree]:
        """New tokens, each of which sees the past and those before it: see `Past`. Leaves behind
        keys and values, `[batch, kv_heads, new, head_dim]`."""
        with jax.named_scope("mode.Attention"):
            q, k, v = self._heads(x, info.positions)
            left = (k.swapaxes(1, 2), v.swapaxes(1, 2))
            if past.info is None:
                mixed = self.attend(q, k, v, info.segment_ids)
            else:
                earlier = past.info.segment_ids
                mixed = extend_attention(q, left, info.segment_ids, past.left, earlier)
            return self.out(mixed.reshape(x.shape)), left

    def _heads(
        self, x: Float[Array, "batch tokens dim"], positions: Int[Array, "batch tokens"]
    ) -> tuple[
        Float[Array, "batch tokens heads head_dim"],
        Float[Array, "batch tokens kv_heads head_dim"],
        Float[Array, "batch tokens kv_heads head_dim"],
    ]:
        """Queries and keys, turned to their positions, and values."""
        heads = self.qkv(x).reshape(*x.shape[:-1], -1, x.shape[-1] // self.num_heads)
        turned, v = jnp.split(heads, [self.num_heads + self.num_kv_heads], axis=-2)
        turned = rope(turned, positions, self.rope_theta)
        q, k = jnp.split(turned, [self.num_heads], axis=-2)
        return q, k, v


def _check_heads(dim: int, num_heads: int, num_kv_heads: int) -> None:
    check_count("num_heads", num_heads, 1)
    check_count("num_kv_heads", num_kv_heads, 1)
    if dim % num_heads or (dim // num_heads) % 2:
        raise ValueError(
            f"`dim` must be `num_heads` times an even number, as rotary embeddings turn pairs, got "
            f"dim={dim} and num_heads={num_heads}. The next that fits is "
            f"{-(-dim // (2 * num_heads)) * 2 * num_heads}."
        )
    if num_heads % num_kv_heads:
        raise ValueError(
            f"`num_heads` must be divisible by `num_kv_heads`, got {num_heads} and {num_kv_heads}. "
            "Each key-value head serves the same number of query heads."
        )


class TransformerBlock(AbstractBlock):
    """Pre-norm attention and feed-forward, as one update: $a + g(\\text{norm}(x + a))$ with
    $a = \\text{attention}(\\text{norm}(x))$. A block.

    Returning the update rather than the sum is what lets a router weigh it without counting the
    residual twice, and keeps its digits in bfloat16.

    **Arguments:**

    - `dim`: features of the hidden states; a multiple of `num_heads`.
    - `num_heads`, `num_kv_heads`, `rope_theta`, `attend`: of `Attention`.
    - `feedforward`: any block: `PositionWise(GELU(dim, key=key))`, a `MixtureOfExperts`; by
        default `PositionWise(SwiGLU(dim))`.

    **Raises:** `ValueError` for sizes that do not divide, or a feed-forward that is no block.

    >>> import jax, jax.numpy as jnp, mode
    >>> block = mode.TransformerBlock(32, num_heads=4, num_kv_heads=2, key=jax.random.key(0))
    >>> update, routings = block(jnp.ones((4, 64, 32)), mode.TokenInfo.plain((4, 64)))
    >>> update.shape
    (4, 64, 32)
    """

    attention_norm: RMSNorm
    attention: Attention
    feedforward_norm: RMSNorm
    feedforward: Block

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        feedforward: Block | None = None,
        rope_theta: float = 10_000.0,
        attend: Attend = causal_attention,
        key: PRNGKeyArray,
    ):
        if feedforward is not None:
            check_block("feedforward", feedforward)
        attention_key, feedforward_key = jax.random.split(key)
        self.attention_norm = RMSNorm(dim)
        self.attention = Attention(
            dim,
            num_heads,
            num_kv_heads=num_kv_heads,
            rope_theta=rope_theta,
            attend=attend,
            key=attention_key,
        )
        self.feedforward_norm = RMSNorm(dim)
        self.feedforward = (
            PositionWise(SwiGLU(dim, key=feedforward_key)) if feedforward is None else feedforward
        )

    def __call__(
        self,
        x: Float[Array, "*groups tokens dim"],
        info: TokenInfo,
        *,
        key: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, "*groups tokens dim"], Routings]:
        """`x`: `[*groups, tokens, dim]`. Returns the update and the feed-forward's routings."""
        check_hidden(x, self.attention_norm.weight.shape[0])
        attended, _ = self.attention(self.attention_norm(x), info)
        normed = self.feedforward_norm(x + attended)
        update, routings = run_block("feedforward", self.feedforward, normed, info, key)
        return attended + update, routings

    def extend(
        self, x: Float[Array, "batch new dim"], info: TokenInfo, past: Past
    ) -> tuple[Float[Array, "batch new dim"], PyTree]:
        """New tokens: see `Past`. Leaves behind what attention and feed-forward do."""
        attended, keys = self.attention.extend(self.attention_norm(x), info, past.part(0))
        normed = self.feedforward_norm(x + attended)
        update, left = extend_block(self.feedforward, normed, info, past.part(1))
        return attended + update, (keys, left)
