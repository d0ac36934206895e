"""The attention block: projections, rotary embeddings and an attention function."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from .._checks import can_be_called, check_count, check_hidden, is_finite, type_name
from .._linear import Linear, MakeNorm, Norm, project
from .._token_info import TokenInfo
from .._types import Gathered, GatheredIds, Hidden, Key, Keys as KeyHeads, Queries, QueryIndex
from ..parallel import role_field
from ._attention_function import AbstractAttentionFunction, Attend, CausalAttention
from ._cache import Cache
from ._contracts import AbstractKeyedBlock, BlockResult, Keys
from ._rope import AbstractRopeScaling, rope


_HiddenRows = Float[Array, "batch tokens dim"]


class Attention(AbstractKeyedBlock):
    """Causal grouped-query self-attention with rotary embeddings at original positions.

    Values are multiplied by `info.weight`, if there is one, so that a router learns from what other
    tokens read too; see `MixtureOfDepths`.

    **Arguments:**

    - `dim`: features of the hidden states; a multiple of `num_heads` unless `head_dim` is given.
    - `num_heads`: query heads; a multiple of `num_kv_heads`.
    - `num_kv_heads`: key-value heads; by default `num_heads`.
    - `head_dim`: features of a head, an even number unless `rope_theta` is `None`; by default
        `dim // num_heads`.
    - `qkv_bias`, `out_bias`: whether the projections have biases.
    - `head_norm`: builds norms of `head_dim` features for queries and keys, before they are
        turned, such as `RMSNorm`; `None` for none.
    - `rope_theta`: base of the rotary wavelengths; `None` turns nothing.
    - `rope_scaling`: changes these wavelengths.
    - `attend`: an `AbstractAttentionFunction`, such as `CausalAttention(window=1024)`, or, for
        training alone, a function `(q, k, v, info) -> mixed`.

    **Raises:** `ValueError` for sizes that do not divide, an odd size of a head that is turned, or
    an `attend` that cannot be called.

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
    head_dim: int = eqx.field(static=True)
    rope_theta: float | None = eqx.field(static=True)
    rope_scaling: AbstractRopeScaling | None
    query_norm: Norm | None
    key_norm: Norm | None
    qkv: Linear = role_field("attention")
    out: Linear = role_field("attention")

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        qkv_bias: bool = False,
        out_bias: bool = False,
        head_norm: MakeNorm | None = None,
        rope_theta: float | None = 10_000.0,
        rope_scaling: AbstractRopeScaling | None = None,
        attend: Attend = CausalAttention(),
        key: PRNGKeyArray,
    ):
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        check_count("dim", dim, 1)
        check_count("num_heads", num_heads, 1)
        check_count("num_kv_heads", num_kv_heads, 1)
        pair = 1 if rope_theta is None else 2
        if head_dim is not None:
            if check_count("head_dim", head_dim, 1) % pair:
                raise ValueError(
                    "`head_dim` must be even, as rotary embeddings turn pairs, got "
                    f"head_dim={head_dim}."
                )
        elif dim % (pair * num_heads):
            times = "an even number, as rotary embeddings turn pairs" if pair == 2 else "a number"
            raise ValueError(
                f"`dim` must be `num_heads` times {times}, got dim={dim} and "
                f"num_heads={num_heads}. The next that fits is "
                f"{-(-dim // (pair * num_heads)) * pair * num_heads}."
            )
        if num_heads % num_kv_heads:
            raise ValueError(
                f"`num_heads` must be divisible by `num_kv_heads`, got {num_heads} and "
                f"{num_kv_heads}. Each key-value head serves the same number of query heads."
            )
        if rope_theta is not None and not (is_finite(rope_theta) and rope_theta > 0):
            raise ValueError(
                f"`rope_theta` must be a finite number above 0, or None, got {rope_theta!r}."
            )
        if isinstance(attend, type) or not callable(attend):
            raise ValueError(
                "`attend` must be an attention function, such as `CausalAttention()`, got "
                f"{type_name(attend)}."
            )
        qkv_key, out_key = jax.random.split(key)
        self.head_dim = dim // num_heads if head_dim is None else head_dim
        # Queries, keys and values in one product: a tenth faster than three small ones.
        qkv_dim = (num_heads + 2 * num_kv_heads) * self.head_dim
        self.qkv = Linear(dim, qkv_dim, use_bias=qkv_bias, key=qkv_key)
        self.out = Linear(num_heads * self.head_dim, dim, use_bias=out_bias, key=out_key)
        self.query_norm = None if head_norm is None else head_norm(self.head_dim)
        self.key_norm = None if head_norm is None else head_norm(self.head_dim)
        self.attend = attend
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.rope_theta = rope_theta
        self.rope_scaling = rope_scaling

    def extend(self, x: Hidden, info: TokenInfo, cache: Cache, *, key: Key = None) -> BlockResult:
        """Attends from new tokens. See `AbstractBlock`; no routings. The entries are keys and
        values, `[batch, kv_heads, new, head_dim]`."""
        del key
        check_hidden(x, self.qkv.weight.shape[0])
        with jax.named_scope("mode.Attention"):
            rows, row_info = _to_rows(x, info)
            heads = self._heads(rows, slice(None))
            turned, v = jnp.split(heads, [self.num_heads + self.num_kv_heads], axis=-2)
            turned = self._turn(turned, row_info, self.num_heads)
            q, k = jnp.split(turned, [self.num_heads], axis=-2)
            v = _weigh(v, row_info)
            mixed = self._attend(q, k, v, row_info, cache)
            return self._out(mixed, x), (), (k.swapaxes(1, 2), v.swapaxes(1, 2))

    def keys(self, x: Hidden, info: TokenInfo) -> PyTree:
        """Returns the entries of `extend`: keys and values. See `AbstractKeyedBlock`."""
        check_hidden(x, self.qkv.weight.shape[0])
        with jax.named_scope("mode.Attention"):
            rows, row_info = _to_rows(x, info)
            heads = self._heads(rows, slice(self.num_heads, None))
            k, v = jnp.split(heads, [self.num_kv_heads], axis=-2)
            k, v = self._turn(k, row_info, 0), _weigh(v, row_info)
            return k.swapaxes(1, 2), v.swapaxes(1, 2)

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
        """Attends from the tokens at `index`. See `AbstractKeyedBlock`; no entries of its own."""
        del cache, key
        with jax.named_scope("mode.Attention"):
            rows, row_info = _to_rows(x, info)
            q = self._heads(rows, slice(self.num_heads))
            q = self._turn(q, row_info, self.num_heads)
            k, v = (entry.swapaxes(1, 2) for entry in keys.entries)
            row_index = index.reshape(rows.shape[:-1])
            mixed = self._attend(q, k, v, _info_rows(keys.info), keys.cache, row_index)
            return self._out(mixed, x), (), ()

    def _heads(self, rows: _HiddenRows, some: slice) -> Float[Array, "batch tokens heads head_dim"]:
        """Projects to some of the heads, of which the queries' come first, then the keys'."""
        dim, size = rows.shape[-1], self.head_dim
        weight = self.qkv.weight.reshape(dim, -1, size)[:, some].reshape(dim, -1)
        bias = self.qkv.bias
        bias = None if bias is None else bias.reshape(-1, size)[some].reshape(-1)
        return project(rows, weight, bias).reshape(*rows.shape[:-1], -1, size)

    def _out(self, mixed: Queries, like: Hidden) -> Hidden:
        return self.out(mixed.reshape(*mixed.shape[:-2], -1)).reshape(like.shape)

    def _turn(self, heads: Queries, info: TokenInfo, num_queries: int) -> Queries:
        """Norms and turns heads: queries, so many, then keys."""
        if self.query_norm is not None and self.key_norm is not None:
            q, k = jnp.split(heads, [num_queries], axis=-2)
            heads = jnp.concatenate([self.query_norm(q), self.key_norm(k)], axis=-2)
        if self.rope_theta is None:
            return heads
        return rope(heads, info.positions, self.rope_theta, self.rope_scaling)

    def _attend(
        self,
        q: Queries,
        k: KeyHeads,
        v: KeyHeads,
        info: TokenInfo,
        cache: Cache,
        index: QueryIndex | None = None,
    ) -> Queries:
        info = info.with_weight(None)  # the values have it
        name = getattr(self.attend, "__name__", type(self.attend).__name__)
        extend: Any = getattr(self.attend, "extend", None)
        if index is not None:
            if can_be_called(extend, q, k, v, info, cache, index=index):
                return extend(q, k, v, info, cache, index=index)
            raise ValueError(
                f"`attend` must take queries of some of the tokens, but `{name}` has no argument "
                "`index`. Write `AbstractAttentionFunction.extend(..., index=None)`, or use "
                "`CausalAttention` or `MixtureOfDepths`."
            )
        if isinstance(self.attend, AbstractAttentionFunction):
            return self.attend.extend(q, k, v, info, cache)
        if cache.is_kept:
            raise ValueError(
                f"`model` must be able to decode, but the attention function `{name}` in it has "
                "only the form for whole sequences. Write it as an `AbstractAttentionFunction`, "
                "whose `extend` attends to a cache too, or use `CausalAttention(scale=, soft_cap=, "
                "window=, alibi=)`."
            )
        return self.attend(q, k, v, info)


def _to_rows(x: Hidden, info: TokenInfo) -> tuple[_HiddenRows, TokenInfo]:
    """Makes one axis of all group axes."""
    return x.reshape(-1, *x.shape[-2:]), _info_rows(info)


def _info_rows(info: TokenInfo) -> TokenInfo:
    tokens = info.positions.shape[-1]
    return jax.tree.map(lambda leaf: leaf.reshape(-1, tokens), info)


def _weigh(v: KeyHeads, info: TokenInfo) -> KeyHeads:
    """Multiplies values by the routing weights of their tokens, where there are such."""
    if info.weight is None:
        return v
    weight = info.weight[..., None, None]
    return (weight * v.astype(weight.dtype)).astype(v.dtype)
