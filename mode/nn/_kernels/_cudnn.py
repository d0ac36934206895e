"""Attention by cuDNN, on NVIDIA GPUs.

`jax.nn.dot_product_attention(implementation="cudnn")` runs the same kernels, but gives no access to
its backward pass, which `call` needs apart, so that derivatives that cuDNN lacks are still had.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from ..._token_info import TokenInfo
from ._blockwise import info_at
from ._call import Arrays, Kernel, import_private
from ._scoring import Scoring


# The bytes of a mask, of one number for each query and key, above which it is not made.
MASK_BYTES = 2**29


def cudnn(scoring: Scoring, x: Arrays, others: Arrays, layout: str) -> Kernel | str:
    """Returns the kernel for `call`, or why there is none. Takes arguments as `blockwise` does.

    Rows of one document need no mask: the causal one is built in, and the number of real tokens is
    all that is said of a row with padding at its end. Other rows get a mask.
    """
    q, k, _ = x
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"cuDNN needs bfloat16 or float16, got {q.dtype}"
    if q.shape[-1] % 8 or q.shape[-1] > 128:
        return f"cuDNN needs heads of a multiple of 8 up to 128, got {q.shape[-1]}"
    if scoring.soft_cap is not None or scoring.alibi:
        return "cuDNN has no soft cap and no ALiBi"
    is_plain = layout == "plain" and len(others) == 2
    is_prefix = layout in ("plain", "prefix") and len(others) == 2 and scoring.window is None
    if not (is_plain or is_prefix):
        queries, keys = q.shape[1], k.shape[1]
        size = 2 * q.shape[0] * queries * keys
        if queries % 2 or keys % 2:
            return f"cuDNN needs even lengths with a mask, got {queries} and {keys}"
        if size > MASK_BYTES:
            return f"the mask would take {size / 2**20:.0f} MiB, more than {MASK_BYTES / 2**20:.0f}"
    fused = import_private(
        "jax._src.cudnn.fused_attention_stablehlo",
        "_dot_product_attention_fwd_p_wrapper",
        "_dot_product_attention_bwd_p_wrapper",
    )
    if fused is None:
        return "this version of JAX keeps it elsewhere"
    kernel = _Cudnn(scoring, layout if is_plain or is_prefix else "masked", fused)
    return Kernel("cudnn", kernel.forward, kernel.backward)


@dataclasses.dataclass(frozen=True)
class _Cudnn:
    """The arguments of cuDNN."""

    scoring: Scoring
    mask: str  # "plain", "prefix" or "masked"
    fused: Any  # the module of JAX

    def forward(self, x: Arrays, others: Arrays) -> tuple[Array, Float[Array, "batch heads n"]]:
        rest, params = self._arguments(x, others)
        primitive = self.fused._dot_product_attention_fwd_p_wrapper
        out, log_total = primitive.bind(*x, *rest, **params, is_training=True)
        return out, log_total

    def backward(
        self, x: Arrays, others: Arrays, out: Array, log_total: Array, d_out: Array
    ) -> Arrays:
        rest, params = self._arguments(x, others)
        primitive = self.fused._dot_product_attention_bwd_p_wrapper
        return tuple(primitive.bind(*x, *rest, log_total, out, d_out, **params)[:3])

    def _arguments(self, x: Arrays, others: Arrays) -> tuple[list[Array], dict[str, Any]]:
        """What comes after queries, keys and values: a bias, lengths, and things not used here."""
        q, fused = x[0], self.fused
        none = jnp.zeros(0, q.dtype)
        bias, lengths, mask_type = none, none, fused.MaskType.CAUSAL
        if self.mask == "prefix":
            lengths = jnp.sum(others[1] != 0, axis=-1, dtype=jnp.int32)
            mask_type = fused.MaskType.PADDING_CAUSAL
        elif self.mask == "masked":
            bias, mask_type = self._bias(q, others), fused.MaskType.NO_MASK
        params = {
            "scale": self.scoring.scale_for(q.shape[-1]),
            "seed": 0,
            "dropout_rate": 0.0,
            "variadic_args": (self.mask == "masked", False),
            "mask_type": mask_type,
            "layout": fused.AttentionLayout.BTNH.value,
            "sliding_window_length": self.scoring.window if self.mask == "plain" else None,
        }
        return [bias, lengths, lengths, none, none, none, none], params

    def _bias(self, q: Array, others: Arrays) -> Float[Array, "batch one queries keys"]:
        info, index = TokenInfo(others[0], others[1]), others[2] if len(others) == 3 else None
        queries = info if index is None else info_at(info, index)
        order = jnp.arange(info.positions.shape[-1], dtype=jnp.int32)
        own = order[None] if index is None else index
        seen = self.scoring.visible(queries, info, own[:, :, None] >= order[None, None])
        lowest = 0.5 * float(jnp.finfo(q.dtype).min)  # finite: a row may see nothing
        return jnp.where(seen, 0.0, lowest).astype(q.dtype)[:, None]
