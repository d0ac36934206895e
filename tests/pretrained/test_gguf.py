"""GGUF files, written by the package `gguf` as llama.cpp's converter does, are read."""

from pathlib import Path
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf.quants import dequantize, quantize

import mode
from mode.nn import Llama3RopeScaling
from tests.helpers import assert_close, rng, run
from tests.pretrained.cases import CONFIGS, VOCAB, Tensors, head_dim, make_tensors
from tests.pretrained.oracle import logits_of


QUICK = True
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
# Sizes that blocks of 32 numbers divide.
_WIDE = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}


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


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gpt2"])
def test_families(name: str, tmp_path: Path) -> None:
    config = CONFIGS[name]
    tensors = write_gguf(tmp_path / "m.gguf", config, make_tensors(config))
    model = mode.pretrained.load(tmp_path / "m.gguf")
    ids = rng(1).integers(0, VOCAB, 20)
    assert_close(run(model, jnp.asarray(ids)), (logits_of(config, tensors, ids), ()), scale=5)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_number_formats(kind: str, tmp_path: Path) -> None:
    config = {**CONFIGS["llama"], **_WIDE}
    tensors = write_gguf(tmp_path / "m.gguf", config, make_tensors(config), kind)
    model = mode.pretrained.load(tmp_path / "m.gguf")
    ids = rng(1).integers(0, VOCAB, 12)
    assert_close(run(model, jnp.asarray(ids)), (logits_of(config, tensors, ids), ()), scale=5)


def test_the_scaling_of_llama_3_is_known_by_its_divisors(tmp_path: Path) -> None:
    rope = {**CONFIGS["llama3"]["rope_scaling"], "original_max_position_embeddings": 8192}
    config = {**CONFIGS["llama3"], "rope_scaling": rope}
    frequency = 5e5 ** -(np.arange(5) / 5)
    scaled = Llama3RopeScaling(8.0)(jnp.asarray(frequency, jnp.float32))
    divisors = (frequency / np.asarray(scaled)).astype(np.float32)
    extra = {"rope_freqs.weight": divisors}
    tensors = write_gguf(tmp_path / "m.gguf", config, make_tensors(config), extra=extra)
    model = mode.pretrained.load(tmp_path / "m.gguf")
    ids = rng(1).integers(0, VOCAB, 30)
    assert_close(run(model, jnp.asarray(ids)), (logits_of(config, tensors, ids), ()), scale=5)
    write_gguf(tmp_path / "n.gguf", config, tensors, extra={"rope_freqs.weight": 2 * divisors})
    with pytest.raises(ValueError, match="rope_freqs"):
        mode.pretrained.load(tmp_path / "n.gguf")


def test_a_mesh_of_a_quantised_file(tmp_path: Path) -> None:
    from tests.parallel.meshes import mesh_of

    config = {**CONFIGS["llama"], **_WIDE}
    write_gguf(tmp_path / "m.gguf", config, make_tensors(config), "Q8_0")
    whole = mode.pretrained.load(tmp_path / "m.gguf")
    parts = mode.pretrained.load(tmp_path / "m.gguf", mesh=mesh_of(data=4))
    jax.tree.map(np.testing.assert_array_equal, whole, parts)


def test_what_is_refused(tmp_path: Path) -> None:
    config, tensors = CONFIGS["llama"], make_tensors(CONFIGS["llama"])

    def refused(match: str, **options: Any) -> None:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.gguf"
        write_gguf(path, options.pop("config", config), tensors, **options)
        with pytest.raises(ValueError, match=match):
            mode.pretrained.load(path)

    refused("expert_count", keys={"llama.expert_count": 8})
    refused("split|several", keys={"split.count": 2})
    refused("Left over", extra={"blk.0.attn_sinks.weight": np.ones(4, np.float32)})
    refused("shape", config={**config, "intermediate_size": 44})
    refused("Missing", config={**config, "num_hidden_layers": 4})
    refused("gemma", config={**config, "model_type": "gemma"})
    good = tmp_path / "0.gguf"
    for number, content in enumerate((good.read_bytes()[:300], b"GGUF", b"PK\3\4", b"")):
        (tmp_path / f"cut{number}").write_bytes(content)
        with pytest.raises(ValueError, match="GGUF"):
            mode.pretrained.load(tmp_path / f"cut{number}")
