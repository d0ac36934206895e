"""The attention block: projections, rotary embeddings and an attention function."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from .._checks import check_count, check_hidden, type_name
from .._linear import Linear
from .._token_info import TokenInfo
from .._types import Hidden, Key, Keys, Queries
from ..parallel import role_field
from ._attention_function import AbstractAttentionFunction, Attend, CausalAttention
from ._cache import Cache
from ._contracts import AbstractBlock, Routings
from ._rope import rope


class Attention(AbstractBlock):
    r"""Causal grouped-query self-attention with rotary embeddings at original positions.

    Query head $h$ reads key-value head $\lfloor h \, H_{kv} / H \rfloor$.

    **Arguments:**

    - `dim`: features of the hidden states; a multiple of `num_heads`.
    - `num_heads`: query heads; a multiple of `num_kv_heads`.
    - `num_kv_heads`: key-value heads; by default `num_heads`.
    - `rope_theta`: base of the rotary wavelengths; `None` turns nothing.
    - `attend`: an `AbstractAttentionFunction`, such as `CausalAttention(window=1024)`, or, for
        training alone, a function `(q, k, v, info) -> mixed`.

    **Raises:** `ValueError` for sizes that do not divide, an odd size of a head, or an `attend`
    that cannot be called.

    >>> import jax, jax.numpy as jnp, mode
    >>> block = mode.Attention(32, num_heads=4, num_kv_heads=2, key=jax.random.key(0))
    >>> update, routings = block(jnp.ones((4, 64, 32)))
    >>> update.shape, routings
    ((4, 64, 32), ())

    *Source:* arXiv:1706.03762; grouped queries, arXiv:2305.13245.
    """

    attend: Attend
    num_heads: int = eqx.field(static=True)
    num_kv_heads: int = eqx.field(static=True)
    rope_theta: float | None = eqx.field(static=True)
    qkv: Linear = role_field("attention")
    out: Linear = role_field("attention")

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        rope_theta: float | None = 10_000.0,
        attend: Attend = CausalAttention(),
        key: PRNGKeyArray,
    ):
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        _check_heads(dim, num_heads, num_kv_heads)
        if isinstance(attend, type) or not callable(attend):
            raise ValueError(
                "`attend` must be an attention function, such as `CausalAttention()`, got "
                f"{type_name(attend)}."
            )
        head_dim = dim // num_heads
        qkv_key, out_key = jax.random.split(key)
        # Queries, keys and values in one product: a tenth faster than three small ones.
        self.qkv = Linear(dim, (num_heads + 2 * num_kv_heads) * head_dim, key=qkv_key)
        self.out = Linear(dim, dim, key=out_key)
        self.attend = attend
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.rope_theta = rope_theta

    def extend(
        self, x: Hidden, info: TokenInfo, cache: Cache, *, key: Key = None
    ) -> tuple[Hidden, Routings, PyTree]:
        """Attends from new tokens. See `AbstractBlock`; no routings. The entries are keys and
        values, `[batch, kv_heads, new, head_dim]`."""
        del key
        check_hidden(x, self.qkv.weight.shape[0])
        with jax.named_scope("mode.Attention"):
            rows = x.reshape(-1, *x.shape[-2:])
            row_info: TokenInfo = jax.tree.map(lambda ids: ids.reshape(rows.shape[:-1]), info)
            q, k, v = self._heads(rows, row_info.positions)
            attend = self._attend(cache)
            if isinstance(attend, AbstractAttentionFunction):
                mixed = attend.extend(q, k, v, row_info, cache)
            else:
                mixed = attend(q, k, v, row_info)
            entries = (k.swapaxes(1, 2), v.swapaxes(1, 2))
            return self.out(mixed.reshape(rows.shape)).reshape(x.shape), (), entries

    def _attend(self, cache: Cache) -> Any:
        if cache.is_kept and not isinstance(self.attend, AbstractAttentionFunction):
            name = getattr(self.attend, "__name__", type(self.attend).__name__)
            raise ValueError(
                "`model` must be able to decode, but the attention function "
                f"`{name}` in it has only the form for whole sequences. Write it as an "
                "`AbstractAttentionFunction`, whose `extend` attends to a cache too, or use "
                "`CausalAttention(scale=, soft_cap=, window=, alibi=)`."
            )
        return self.attend

    def _heads(
        self, x: Float[Array, "batch tokens dim"], positions: Int[Array, "batch tokens"]
    ) -> tuple[Queries, Keys, Keys]:
        """Queries and keys, rotated to their positions, and values."""
        heads = self.qkv(x).reshape(*x.shape[:-1], -1, x.shape[-1] // self.num_heads)
        rotated, v = jnp.split(heads, [self.num_heads + self.num_kv_heads], axis=-2)
        if self.rope_theta is not None:
            rotated = rope(rotated, positions, self.rope_theta)
        q, k = jnp.split(rotated, [self.num_heads], axis=-2)
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
