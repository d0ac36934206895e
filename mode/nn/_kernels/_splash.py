"""Attention by splash attention, JAX's kernel for TPUs."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ._call import Arrays, Kernel, import_private
from ._scoring import Scoring


_MODULE = "jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_"
_LANES = 128
_BLOCKS = (512, 384, 256, _LANES)


class _Row(NamedTuple):
    """What the mask of a row is made of; `None` for what is the same in all rows."""

    query_segments: Int[Array, "*batch queries"] | None
    key_segments: Int[Array, "*batch keys"] | None
    query_index: Int[Array, "*batch queries"] | None


def splash(
    scoring: Scoring, x: Arrays, others: Arrays, layout: str, *, interpret: bool = False
) -> Kernel | str:
    """Returns the kernel for `call`, or why there is none. Takes arguments as `blockwise` does.

    `interpret` runs it on any platform, slowly, for tests.
    """
    q = x[0]
    if q.dtype != jnp.bfloat16:  # float32 would be rounded to it
        return f"splash attention needs bfloat16, got {q.dtype}"
    if scoring.alibi:
        return "splash attention has no ALiBi"
    if jax.config.read("jax_enable_x64"):
        return "splash attention does not compile where integers have 64 bits (jax_enable_x64)"
    if scoring.window is not None and layout != "plain":
        return "its windows count tokens, and those of rows that are not plain count positions"
    passes = ("_splash_attention_forward", "_splash_attention_bwd")
    module = import_private(_MODULE + "kernel", *passes)
    mask, mask_info = (import_private(_MODULE + name) for name in ("mask", "mask_info"))
    if module is None or mask is None or mask_info is None:
        return "this version of JAX keeps it elsewhere"
    kernel = _Splash(scoring, layout, module, mask, mask_info, interpret)
    return Kernel("splash", kernel.forward, kernel.backward)


@dataclasses.dataclass(frozen=True)
class _Splash:
    """The arguments of splash attention, which has heads before tokens, and no scale."""

    scoring: Scoring
    layout: str
    kernel: Any
    mask: Any
    mask_info: Any
    interpret: bool

    def forward(self, x: Arrays, others: Arrays) -> tuple[Array, Float[Array, "batch heads n"]]:
        tokens = x[0].shape[1]
        rows, (info, _), settings = self._settings(x, others)

        def one(q: Array, k: Array, v: Array, row: _Row) -> tuple[Array, Array]:
            forward = self.kernel._splash_attention_forward
            mask, ids = self._mask(info, row), self._segments(row)
            out, (log_total,) = forward(mask, q, k, v, ids, None, save_residuals=True, **settings)
            return out, log_total

        q, k, v = self._heads_first(x)
        out, log_total = jax.vmap(one)(q, k, v, rows)
        return out.swapaxes(1, 2)[:, :tokens], log_total[:, :, :tokens]

    def backward(
        self, x: Arrays, others: Arrays, out: Array, log_total: Array, d_out: Array
    ) -> Arrays:
        tokens = x[0].shape[1]
        rows, infos, settings = self._settings(x, others)

        def one(
            q: Array, k: Array, v: Array, row: _Row, out: Array, log_total: Array, d_out: Array
        ) -> Arrays:
            masks = (self._mask(info, row) for info in infos)
            saved = (q, k, v, self._segments(row), None, out, log_total, *masks)
            backward = self.kernel._splash_attention_bwd
            return backward(save_residuals=False, res=saved, do=d_out, **settings)[3:6]

        out, d_out = (_pad(part).swapaxes(1, 2) for part in (out, d_out))
        log_total = jnp.pad(log_total, ((0, 0), (0, 0), (0, -tokens % _LANES)))
        q, k, v = self._heads_first(x)
        gradients = jax.vmap(one)(q, k, v, rows, out, log_total, d_out)
        d_q, d_k, d_v = (
            part.swapaxes(1, 2)[:, : like.shape[1]] for part, like in zip(gradients, x, strict=True)
        )
        return self._scaled(d_q), d_k, d_v

    def _heads_first(self, x: Arrays) -> Arrays:
        q, k, v = x
        return tuple(_pad(part).swapaxes(1, 2) for part in (self._scaled(q), k, v))

    def _scaled(self, q: Array) -> Array:
        scale = self.scoring.scale_for(q.shape[-1])
        return (q.astype(jnp.float32) * scale).astype(q.dtype)

    def _mask(self, info: Any, row: _Row) -> Any:
        index = row.query_index
        return info if index is None else info._replace(q_sequence=index)

    def _segments(self, row: _Row) -> Any:
        if row.key_segments is None:
            return None
        return self.kernel.SegmentIds(row.query_segments, row.key_segments)

    def _settings(self, x: Arrays, others: Arrays) -> tuple[_Row, tuple[Any, Any], dict[str, Any]]:
        """What differs by row, the masks of queries and of keys, the rest of the arguments."""
        queries, keys = (part.shape[1] + -part.shape[1] % _LANES for part in x[:2])
        block_q, block_kv = (
            next(size for size in _BLOCKS if length % size == 0) for length in (queries, keys)
        )
        # Segments of plain rows are 1 up to the padding's, which comes last: no real token sees it.
        segments = None if self.layout == "plain" else _pad(others[1])
        if len(others) == 2:
            rows = _Row(segments, segments, None)
            infos, function = self._all_tokens(queries, block_q, x[0].shape[2])
        else:
            # An empty slot stands at the last key: a query that sees no key would be NaN.
            index = jnp.minimum(_pad(others[2], value=keys), keys - 1)
            own = segments
            if segments is not None:
                own = jnp.take_along_axis(segments, index, axis=1)
            rows = _Row(own, segments, index)
            infos, function = self._some_tokens(index, keys, block_q, block_kv)
        names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
        sizes = {f"block_{name}": block_kv if name[0] == "k" else block_q for name in names}
        settings = {
            "mask_value": self.kernel.DEFAULT_MASK_VALUE,
            "is_mqa": False,
            "block_sizes": self.kernel.BlockSizes(**sizes),
            "residual_checkpoint_name": None,
            "mask_function": function,
            "attn_logits_soft_cap": self.scoring.soft_cap,
            "interpret": self.interpret,
        }
        return rows, infos, settings

    def _all_tokens(self, tokens: int, block: int, heads: int) -> tuple[tuple[Any, Any], Any]:
        """Masks where each token has a query: known when the program is compiled."""
        window, shape = self.scoring.window, (tokens, tokens)
        one = (
            self.mask.CausalMask(shape)
            if window is None
            else self.mask.LocalMask(shape, (window - 1, 0), 0)
        )
        masks = self.mask.MultiHeadMask([one] * heads)
        shards = {"head_shards": 1, "q_seq_shards": 1}
        forward, function = self.mask_info.process_mask(masks, (block, block), **shards)
        backward, _ = self.mask_info.process_mask_dkv(masks, (block, block), **shards)
        return (forward, backward), function

    def _some_tokens(
        self, index: Array, keys: int, block_q: int, block_kv: int
    ) -> tuple[tuple[Any, Any], Any]:
        """Masks where some tokens have a query: which, is known when the program runs."""
        window = self.scoring.window
        by_block = index.reshape(index.shape[0], -1, block_q)
        starts = jnp.arange(0, keys, block_kv, dtype=index.dtype)[None]
        # A block runs that some row needs: a mask of each row's own would be a call of each row.
        run = jnp.max(by_block, axis=(0, 2))[:, None] >= starts
        if window is not None:
            run &= jnp.min(by_block, axis=(0, 2))[:, None] < starts + (block_kv + window - 1)

        def visible(query: Array, key: Array) -> Array:
            earlier = query >= key
            return earlier if window is None else earlier & (query - key < window)

        def info(axis: int) -> Any:
            # Where nothing runs, the block to fetch is the one that is there.
            count = run.shape[axis]
            order = jnp.expand_dims(jnp.arange(count, dtype=jnp.int32), 1 - axis)
            first = jnp.argmax(run, axis=axis, keepdims=True).astype(jnp.int32)
            last = jnp.argmax(jnp.flip(run, axis), axis=axis, keepdims=True).astype(jnp.int32)
            fetched = jnp.clip(order, first, count - 1 - last)
            # Narrow, as they must fit into the scalar memory.
            return self.mask_info.MaskInfo(
                data_next=jnp.broadcast_to(fetched, run.shape).astype(jnp.int16)[None],
                mask_next=None,
                block_mask=run.astype(jnp.int8)[None],
                partial_mask_blocks=None,
                q_sequence=None,  # each row's own
            )

        return (info(1), info(0)), visible


def _pad(x: Array, value: int = 0) -> Array:
    """Pads the tokens to whole lanes."""
    padding = [(0, 0), (0, -x.shape[1] % _LANES)] + [(0, 0)] * (x.ndim - 2)
    return jnp.pad(x, padding, constant_values=value)
