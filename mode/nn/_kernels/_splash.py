"""Attention by splash attention, JAX's kernel for TPUs."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ._call import Arrays, Kernel, import_private
from ._scoring import Scoring


_MODULE = "jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_"
_LANES = 128


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
    if len(others) == 3:
        return "splash attention needs a query for every key"
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
        info, _, settings = self._settings(x)

        def one(q: Array, k: Array, v: Array, segments: Array | None) -> tuple[Array, Array]:
            forward = self.kernel._splash_attention_forward
            ids = self._segments(segments)
            out, (log_total,) = forward(info, q, k, v, ids, None, save_residuals=True, **settings)
            return out, log_total

        q, k, v = self._heads_first(x)
        out, log_total = jax.vmap(one)(q, k, v, self._ids(others))
        return out.swapaxes(1, 2)[:, :tokens], log_total[:, :, :tokens]

    def backward(
        self, x: Arrays, others: Arrays, out: Array, log_total: Array, d_out: Array
    ) -> Arrays:
        tokens = x[0].shape[1]
        _, infos, settings = self._settings(x)

        def one(
            q: Array,
            k: Array,
            v: Array,
            segments: Array | None,
            out: Array,
            log_total: Array,
            d_out: Array,
        ) -> Arrays:
            saved = (q, k, v, self._segments(segments), None, out, log_total, *infos)
            backward = self.kernel._splash_attention_bwd
            return backward(save_residuals=False, res=saved, do=d_out, **settings)[3:6]

        out, d_out = (_pad(part).swapaxes(1, 2) for part in (out, d_out))
        log_total = jnp.pad(log_total, ((0, 0), (0, 0), (0, -tokens % _LANES)))
        q, k, v = self._heads_first(x)
        gradients = jax.vmap(one)(q, k, v, self._ids(others), out, log_total, d_out)
        d_q, d_k, d_v = (part.swapaxes(1, 2)[:, :tokens] for part in gradients)
        return self._scaled(d_q), d_k, d_v

    def _heads_first(self, x: Arrays) -> Arrays:
        q, k, v = x
        return tuple(_pad(part).swapaxes(1, 2) for part in (self._scaled(q), k, v))

    def _scaled(self, q: Array) -> Array:
        scale = self.scoring.scale_for(q.shape[-1])
        return (q.astype(jnp.float32) * scale).astype(q.dtype)

    def _ids(self, others: Arrays) -> Array | None:
        """The segments of padded rows; those of plain rows are 1 up to the padding's, which comes
        last, so that no real token sees it."""
        return None if self.layout == "plain" else _pad(others[1])

    def _segments(self, segments: Array | None) -> Any:
        return None if segments is None else self.kernel.SegmentIds(segments, segments)

    def _settings(self, x: Arrays) -> tuple[Any, tuple[Any, Any], dict[str, Any]]:
        """The masks of the forward pass and of the backward pass, and the rest of the arguments."""
        tokens, heads = x[0].shape[1] + -x[0].shape[1] % _LANES, x[0].shape[2]
        size = next(size for size in (512, 384, 256, _LANES) if tokens % size == 0)
        window, shape = self.scoring.window, (tokens, tokens)
        one = (
            self.mask.CausalMask(shape)
            if window is None
            else self.mask.LocalMask(shape, (window - 1, 0), 0)
        )
        masks = self.mask.MultiHeadMask([one] * heads)
        names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
        shards = {"head_shards": 1, "q_seq_shards": 1}
        forward, function = self.mask_info.process_mask(masks, (size, size), **shards)
        backward, _ = self.mask_info.process_mask_dkv(masks, (size, size), **shards)
        settings = {
            "mask_value": self.kernel.DEFAULT_MASK_VALUE,
            "is_mqa": False,
            "block_sizes": self.kernel.BlockSizes(**{f"block_{name}": size for name in names}),
            "residual_checkpoint_name": None,
            "mask_function": function,
            "attn_logits_soft_cap": self.scoring.soft_cap,
            "interpret": self.interpret,
        }
        return forward, (forward, backward), settings


def _pad(x: Array) -> Array:
    """Pads the tokens to whole lanes."""
    return jnp.pad(x, [(0, 0), (0, -x.shape[1] % _LANES)] + [(0, 0)] * (x.ndim - 2))
