"""Attention functions: attention over given heads, for whole sequences and after a cache."""

import abc
from collections.abc import Callable
from typing import get_args

import equinox as eqx
import jax
import jax.numpy as jnp

from .._checks import check_count
from .._token_info import TokenInfo
from .._types import KeyRows, Keys, Queries, QueryIndex, Rows, Scores
from ..parallel import map_batch
from ._cache import Cache
from ._kernels import (
    Implementation,
    Mask,
    Scoring,
    attend_after_cache,
    call,
    causal_kernels,
    info_at,
    product,
    stack_rows,
    unstack_rows,
)


class AbstractAttentionFunction(eqx.Module):
    """Attention over given heads: one object for whole sequences and for tokens after a cache.

    `Attention` also takes a plain function `(q, k, v, info) -> mixed` of whole sequences. Such a
    model can be trained and evaluated; `prefill` refuses it.
    """

    @abc.abstractmethod
    def extend(self, q: Queries, k: Keys, v: Keys, info: TokenInfo, cache: Cache) -> Queries:
        """Attends from new tokens to those in the cache and to each other.

        **Arguments:**

        - `q`, `k`, `v`: of the new tokens, in time order. Query head h reads key-value head
            `h // (heads // kv_heads)`.
        - `info`: positions and segments of the new tokens, `[batch, new]`. In a routed layer only
            selected tokens are here: distances follow from positions, not from slots.
        - `cache`: empty for whole sequences. Else `cache.entries` is `(keys, values)` of earlier
            tokens, `[batch, kv_heads, slots, head_dim]`, and `cache.info` their positions and
            segments. Segment 0 marks empty slots and padding, which no real token may see.

        For `MixtureOfQueries` and shared keys, it takes one more keyword argument, `index=None`:
        `[batch, queries]`, ascending, which of the new tokens the queries are of. The number of new
        tokens marks an empty slot, whose result is never read.
        """

    def __call__(self, q: Queries, k: Keys, v: Keys, info: TokenInfo) -> Queries:
        """Attends inside whole sequences."""
        return self.extend(q, k, v, info, Cache.empty())


# Rows of queries up to which scores are few: those of a step of decoding, or of drafted tokens.
_FEW = 16

Attend = AbstractAttentionFunction | Callable[..., Queries]


class CausalAttention(AbstractAttentionFunction):
    r"""Softmax attention over the same and earlier tokens of the same segment.

    Products are of the dtype of their factors and add up in float32 or wider, as the softmax does.
    Padding, segment 0, attends to padding only: finite numbers that
    nobody reads.

    **Arguments:**

    - `scale`: multiplies the products of queries and keys; by default `head_dim ** -0.5`.
    - `soft_cap`: $c \tanh(s / c)$ for each score $s$; `None` for none.
    - `window`: a token sees those less than `window` positions before it, itself included.
    - `alibi`: subtracts `slope * distance` from each score, with the slope $2^{-8 h / H}$ of head
        $h$ of $H$, counted from 1. Use it with `Attention(rope_theta=None)`.
    - `implementation`: the kernel for whole sequences: `"cudnn"`, `"splash"` or `"blockwise"`. By
        default, that of the platform which the program is compiled for, in bfloat16 and, by cuDNN,
        float16: splash attention on TPUs, cuDNN on NVIDIA GPUs; blockwise on others and where that
        cannot do it. `mode.aot` and the debug log of `mode.kernels` say which and why.
    - `block_size`: blockwise attention of more tokens than this, and that of a piece of a prompt to
        a longer cache, is computed in blocks of about this size, in memory that grows with the
        length. `None` forms all scores at once.

    **Raises:** `ValueError` for a number out of range, and for an `implementation` that cannot run:
    by the dtype, the size of a head, the other options, or the platform.

    >>> import jax, jax.numpy as jnp, mode
    >>> attend = mode.CausalAttention(window=4)
    >>> block = mode.TransformerBlock(32, num_heads=4, attend=attend, key=jax.random.key(0))
    >>> block(jnp.ones((2, 8, 32)))[0].shape
    (2, 8, 32)

    *Source:* arXiv:1706.03762, equation 1; grouped queries, arXiv:2305.13245; soft cap,
    arXiv:2408.00118, section 2; window, arXiv:2004.05150, section 3.1; ALiBi, arXiv:2108.12409,
    section 3. *Relative to the papers:* the mask follows the order of the tokens, which a gather
    keeps, and their segments; windows and ALiBi follow original positions; slopes are those of the
    formula for every number of heads.
    """

    scoring: Scoring
    block_size: int | None = eqx.field(static=True)
    implementation: Implementation | None = eqx.field(static=True)

    def __init__(
        self,
        *,
        scale: float | None = None,
        soft_cap: float | None = None,
        window: int | None = None,
        alibi: bool = False,
        implementation: Implementation | None = None,
        # XLA's CPU backend runs the products of a batch one after another and spreads a single one
        # over the cores only where it is large: smaller blocks take 1.5 times as long on two cores.
        block_size: int | None = 512,
    ):
        if implementation not in (None, *get_args(Implementation)):
            raise ValueError(
                "`implementation` must be `'blockwise'`, `'cudnn'`, `'splash'` or None, got "
                f"{implementation!r}."
            )
        self.scoring = Scoring(scale, soft_cap, window, alibi)
        self.block_size = None if block_size is None else check_count("block_size", block_size, 16)
        self.implementation = implementation

    def extend(
        self,
        q: Queries,
        k: Keys,
        v: Keys,
        info: TokenInfo,
        cache: Cache,
        *,
        index: QueryIndex | None = None,
    ) -> Queries:
        """See `AbstractAttentionFunction`."""
        if cache.is_empty:
            others = (info.positions, info.segment_ids, *(() if index is None else (index,)))
            tokens = k.shape[1]
            kernels = causal_kernels(
                self.scoring,
                (q, k, v),
                others,
                info.layout,
                block_size=self.block_size or tokens,
                implementation=self.implementation,
            )
            if not kernels.is_default or tokens > (self.block_size or tokens):
                run = lambda *arrays: call(kernels, arrays[:3], arrays[3:])  # noqa: E731
                return map_batch(run, q, k, v, *others)
        return self._without_kernel(q, k, v, info, cache, index)

    def _without_kernel(
        self, q: Queries, k: Keys, v: Keys, info: TokenInfo, cache: Cache, index: QueryIndex | None
    ) -> Queries:
        """Forms all scores, but for those of many new tokens and a long cache."""
        new = k.shape[1]
        rows = stack_rows(q, k.shape[2])
        if index is None:
            query_info, own = info, jnp.tri(new, dtype=bool)[None]
        else:
            query_info = info_at(info, index)
            own = jnp.arange(new, dtype=index.dtype)[None, None, :] <= index[:, :, None]

        def logits(keys: KeyRows, key_info: TokenInfo, earlier: Mask | None) -> Scores:
            products = _products(rows, keys.astype(rows.dtype))
            return self.scoring.logits(products, q.shape[-1], query_info, key_info, earlier)

        def mix(weights: Scores, values: KeyRows) -> Rows:
            weights, values = weights.astype(rows.dtype), values.astype(rows.dtype)
            return product("bgqk,bgkd->bgqd", weights, values)

        # A token sees itself, so that the maximum of the softmax is finite.
        own_logits = logits(k.swapaxes(1, 2), info, own)
        values = v.swapaxes(1, 2)
        slots = 0 if cache.info is None else cache.info.positions.shape[-1]
        if cache.info is None:
            mixed = mix(jax.nn.softmax(own_logits, axis=-1), values)
        elif self.block_size and rows.shape[-2] > _FEW and slots > self.block_size:
            own_part = (rows, own_logits, values, query_info)
            past = (cache.entries, cache.info)
            mixed = attend_after_cache(self.scoring, *own_part, *past, self.block_size)
        else:
            cached_keys, cached_values = cache.entries
            # One softmax over the cached and the new keys.
            both = jnp.concatenate([logits(cached_keys, cache.info, None), own_logits], axis=-1)
            before, after = jnp.split(
                jax.nn.softmax(both, axis=-1), [both.shape[-1] - new], axis=-1
            )
            mixed = mix(before, cached_values) + mix(after, values)
        return unstack_rows(mixed, q.shape[1]).astype(q.dtype)


def _products(rows: Rows, keys: KeyRows) -> Scores:
    # With few queries, keys are the left side: XLA's CPU backend would copy them first the other
    # way round, and take twice as long.
    if rows.shape[-2] > _FEW:
        return product("bgqd,bgkd->bgqk", rows, keys)
    products = product("bgkd,bgqd->bgkq", keys, rows)
    # The barrier keeps XLA from turning the product itself round, which would copy the keys again.
    return jax.lax.optimization_barrier(products).swapaxes(-1, -2)
