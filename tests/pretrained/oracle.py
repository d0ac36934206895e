"""Forward passes of Llama, Mistral, Qwen and GPT-2 in NumPy, from the tensors of their files.

Written from the papers and model cards: RMSNorm (arXiv:1910.07467), rotary embeddings in halves
(arXiv:2104.09864), grouped queries (arXiv:2305.13245), windows (arXiv:2310.06825), the scaling of
Llama 3 (arXiv:2407.21783), and GPT-2's LayerNorm, learned positions and tanh GELU.
"""

import math
from typing import Any

import numpy as np

from tests.pretrained.cases import Tensors, head_dim


Numbers = np.ndarray


def logits_of(config: dict[str, Any], tensors: Tensors, ids: Numbers) -> Numbers:
    """Logits of one sequence, in float64."""
    wide = {name: np.asarray(tensor, np.float64) for name, tensor in tensors.items()}
    return (_gpt2 if config["model_type"] == "gpt2" else _llama)(config, wide, ids)


def _softmax_attention(q: Numbers, k: Numbers, v: Numbers, window: int | None) -> Numbers:
    """Of one head, `[tokens, features]`."""
    result = np.zeros((len(q), v.shape[-1]))
    for i in range(len(q)):
        first = 0 if window is None else max(0, i - window + 1)
        scores = k[first : i + 1] @ q[i] / math.sqrt(q.shape[-1])
        weights = np.exp(scores - scores.max())
        result[i] = weights @ v[first : i + 1] / weights.sum()
    return result


def _rms(x: Numbers, weight: Numbers, eps: float) -> Numbers:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def _frequencies(config: dict[str, Any], size: int) -> Numbers:
    rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    theta = config.get("rope_theta", rope.get("rope_theta", 10_000.0))
    result = []
    for pair in range(size // 2):
        frequency = theta ** (-2 * pair / size)
        if rope.get("rope_type") == "linear":
            frequency /= rope["factor"]
        if rope.get("rope_type") == "llama3":
            length, low, high = (
                rope[k]
                for k in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
            )
            wavelength = 2 * math.pi / frequency
            if wavelength > length / low:
                frequency /= rope["factor"]
            elif wavelength >= length / high:
                blend = (length / wavelength - low) / (high - low)
                frequency = (1 - blend) * frequency / rope["factor"] + blend * frequency
        result.append(frequency)
    return np.array(result)


def _turn(x: Numbers, frequency: Numbers) -> Numbers:
    """Of one head, `[tokens, features]`."""
    half = x.shape[-1] // 2
    angle = np.arange(len(x))[:, None] * frequency
    a, b = x[:, :half], x[:, half:]
    return np.concatenate(
        [a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], axis=-1
    )


def _llama(config: dict[str, Any], tensors: Tensors, ids: Numbers) -> Numbers:
    size, eps = head_dim(config), config.get("rms_norm_eps", 1e-6)
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    frequency = _frequencies(config, size)
    x = tensors["model.embed_tokens.weight"][ids]

    def linear(name: str, x: Numbers) -> Numbers:
        return x @ tensors[f"{name}.weight"].T + tensors.get(f"{name}.bias", 0.0)

    def split(x: Numbers, count: int) -> list[Numbers]:
        return list(x.reshape(len(x), count, size).swapaxes(0, 1))

    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        normed = _rms(x, tensors[f"{at}input_layernorm.weight"], eps)
        q, k, v = (
            split(linear(f"{at}self_attn.{name}_proj", normed), count)
            for name, count in (("q", heads), ("k", kv_heads), ("v", kv_heads))
        )
        if config["model_type"] == "qwen3":
            q = [_rms(head, tensors[f"{at}self_attn.q_norm.weight"], eps) for head in q]
            k = [_rms(head, tensors[f"{at}self_attn.k_norm.weight"], eps) for head in k]
        q, k = ([_turn(head, frequency) for head in some] for some in (q, k))
        window = _window(config, layer)
        shared = heads // kv_heads
        mixed = [
            _softmax_attention(q[h], k[h // shared], v[h // shared], window) for h in range(heads)
        ]
        x = x + linear(f"{at}self_attn.o_proj", np.concatenate(mixed, axis=-1))
        normed = _rms(x, tensors[f"{at}post_attention_layernorm.weight"], eps)
        gate = linear(f"{at}mlp.gate_proj", normed)
        inside = gate / (1 + np.exp(-gate)) * linear(f"{at}mlp.up_proj", normed)
        x = x + linear(f"{at}mlp.down_proj", inside)
    x = _rms(x, tensors["model.norm.weight"], eps)
    return x @ tensors.get("lm_head.weight", tensors["model.embed_tokens.weight"]).T


def _window(config: dict[str, Any], layer: int) -> int | None:
    if config["model_type"] == "mistral":
        return config["sliding_window"]
    is_windowed = config.get("use_sliding_window") and layer >= config["max_window_layers"]
    return config["sliding_window"] if is_windowed else None


def _gpt2(config: dict[str, Any], tensors: Tensors, ids: Numbers) -> Numbers:
    heads, eps = config["n_head"], config["layer_norm_epsilon"]
    x = tensors["transformer.wte.weight"][ids] + tensors["transformer.wpe.weight"][: len(ids)]

    def norm(name: str, x: Numbers) -> Numbers:
        centered = x - x.mean(-1, keepdims=True)
        scaled = centered / np.sqrt((centered**2).mean(-1, keepdims=True) + eps)
        return scaled * tensors[f"{name}.weight"] + tensors[f"{name}.bias"]

    def linear(name: str, x: Numbers) -> Numbers:
        return x @ tensors[f"{name}.weight"] + tensors[f"{name}.bias"]

    for layer in range(config["n_layer"]):
        at = f"transformer.h.{layer}."
        parts = np.split(linear(f"{at}attn.c_attn", norm(f"{at}ln_1", x)), 3, axis=-1)
        q, k, v = (np.split(part, heads, axis=-1) for part in parts)
        mixed = [_softmax_attention(q[h], k[h], v[h], None) for h in range(heads)]
        x = x + linear(f"{at}attn.c_proj", np.concatenate(mixed, axis=-1))
        inside = linear(f"{at}mlp.c_fc", norm(f"{at}ln_2", x))
        cubed = np.sqrt(2 / np.pi) * (inside + 0.044715 * inside**3)
        x = x + linear(f"{at}mlp.c_proj", 0.5 * inside * (1 + np.tanh(cubed)))
    return norm("transformer.ln_f", x) @ tensors["transformer.wte.weight"].T
