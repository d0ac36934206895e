"""GGUF files, written by the package `gguf` as llama.cpp's converter does."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.quants import dequantize, quantize

from tests.pretrained.cases import Tensors, head_dim


_LLAMA = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers": "blk",
}
_GPT2 = {
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
    "ln_1": "attn_norm",
    "ln_2": "ffn_norm",
    "transformer.wte": "token_embd",
    "transformer.wpe": "position_embd",
    "transformer.ln_f": "output_norm",
    "transformer.h": "blk",
}


def _llama_order(weight: np.ndarray, heads: int) -> np.ndarray:
    """The order of rows that llama.cpp turns: neighbours instead of halves."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def write_gguf(
    path: Path,
    config: dict[str, Any],
    tensors: Tensors,
    kind: str = "F32",
    extra: dict[str, np.ndarray] | None = None,
    keys: dict[str, Any] | None = None,
    prepare: Callable[[gguf.GGUFWriter], object] | None = None,
) -> Tensors:
    """Writes a file, matrices in a number format; returns the tensors as that format has them."""
    family = config["model_type"]
    is_gpt2 = family == "gpt2"
    writer = gguf.GGUFWriter(path, family)
    depth = config["n_layer" if is_gpt2 else "num_hidden_layers"]
    writer.add_block_count(depth)
    writer.add_context_length(128)
    if is_gpt2:
        writer.add_embedding_length(config["n_embd"])
        writer.add_feed_forward_length(4 * config["n_embd"])
        writer.add_head_count(config["n_head"])
        writer.add_layer_norm_eps(config["layer_norm_epsilon"])
    else:
        writer.add_embedding_length(config["hidden_size"])
        writer.add_feed_forward_length(config["intermediate_size"])
        writer.add_head_count(config["num_attention_heads"])
        writer.add_head_count_kv(config["num_key_value_heads"])
        writer.add_layer_norm_rms_eps(config.get("rms_norm_eps", 1e-6))
        writer.add_rope_freq_base(config.get("rope_theta", 10_000.0))
        writer.add_key_length(head_dim(config))
        writer.add_value_length(head_dim(config))
    for name, value in (keys or {}).items():
        writer.add_uint32(name, value)
    if prepare is not None:
        prepare(writer)
    stored = {}
    for name, tensor in tensors.items():
        new = name
        for old, short in (_GPT2 if is_gpt2 else _LLAMA).items():
            new = new.replace(old, short)
        matrix = tensor.T if is_gpt2 and tensor.ndim == 2 and ".h." in name else tensor
        quantization = gguf.GGMLQuantizationType["F32" if tensor.ndim == 1 else kind]
        data = quantize(np.ascontiguousarray(matrix), quantization)
        kept = dequantize(data, quantization)
        stored[name] = kept.T if matrix is not tensor else kept
        if family == "llama" and ("q_proj" in name or "k_proj" in name):
            heads = config["num_attention_heads" if "q_proj" in name else "num_key_value_heads"]
            data = _llama_order(data, heads)
        writer.add_tensor(new, data, raw_dtype=quantization)
    for name, tensor in (extra or {}).items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stored
