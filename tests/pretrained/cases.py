"""Folders of small random models, as `transformers` writes them, made without this library."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from tests.helpers import rng


Tensors = dict[str, np.ndarray]

VOCAB = 61
_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "hidden_act": "silu",
}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
# Keys of both major versions of `transformers`, each option of each family at least once.
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "rms_norm_eps": 1e-5, "rope_theta": 5e4},
    "llama3": {
        "model_type": "llama",
        "tie_word_embeddings": True,
        "attention_bias": True,
        "mlp_bias": True,
        "head_dim": 10,
        "rope_theta": 5e5,
        "rope_scaling": _LLAMA3,
    },
    "linear": {
        "model_type": "llama",
        "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e3},
    },
    "mistral": {"model_type": "mistral", "sliding_window": 5, "head_dim": None},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen2-window": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 4,
        "max_window_layers": 1,
    },
    "qwen3": {"model_type": "qwen3", "head_dim": 14, "sliding_window": None},
}
CONFIGS = {name: {**_SIZES, **config} for name, config in CONFIGS.items()}
CONFIGS["gpt2"] = {
    "model_type": "gpt2",
    "vocab_size": VOCAB,
    "n_embd": 24,
    "n_head": 3,
    "n_layer": 3,
    "n_positions": 40,
    "n_inner": None,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-4,
    "scale_attn_weights": True,
}


def make_tensors(config: dict[str, Any], seed: int = 0) -> Tensors:
    """Random tensors of a configuration, by their names in a folder."""
    shapes = _gpt2(config) if config["model_type"] == "gpt2" else _llama(config)
    random = rng(seed)
    tensors = {}
    for name, shape in shapes.items():
        scale = 0.2 if len(shape) == 1 else shape[-1] ** -0.5
        center = 1.0 if len(shape) == 1 and name.endswith("weight") else 0.0
        tensors[name] = (center + scale * random.normal(size=shape)).astype(np.float32)
    return tensors


def head_dim(config: dict[str, Any]) -> int:
    """Features of a head."""
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def _llama(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    dim, hidden, vocab = (config[k] for k in ("hidden_size", "intermediate_size", "vocab_size"))
    size, kind = head_dim(config), config["model_type"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, dim)}
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        shapes[f"{at}input_layernorm.weight"] = (dim,)
        shapes[f"{at}post_attention_layernorm.weight"] = (dim,)
        for name, count in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
            shapes[f"{at}self_attn.{name}_proj.weight"] = (count * size, dim)
            if kind == "qwen2" or config.get("attention_bias"):
                shapes[f"{at}self_attn.{name}_proj.bias"] = (count * size,)
        shapes[f"{at}self_attn.o_proj.weight"] = (dim, heads * size)
        if config.get("attention_bias"):
            shapes[f"{at}self_attn.o_proj.bias"] = (dim,)
        if kind == "qwen3":
            shapes |= {f"{at}self_attn.{name}_norm.weight": (size,) for name in "qk"}
        for name, shape in {
            "gate": (hidden, dim),
            "up": (hidden, dim),
            "down": (dim, hidden),
        }.items():
            shapes[f"{at}mlp.{name}_proj.weight"] = shape
            if config.get("mlp_bias"):
                shapes[f"{at}mlp.{name}_proj.bias"] = shape[:1]
    shapes["model.norm.weight"] = (dim,)
    if not config.get("tie_word_embeddings"):
        shapes["lm_head.weight"] = (vocab, dim)
    return shapes


def _gpt2(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    dim = config["n_embd"]
    shapes: dict[str, tuple[int, ...]] = {
        "transformer.wte.weight": (config["vocab_size"], dim),
        "transformer.wpe.weight": (config["n_positions"], dim),
    }
    products = {
        "attn.c_attn": (dim, 3 * dim),
        "attn.c_proj": (dim, dim),
        "mlp.c_fc": (dim, 4 * dim),
        "mlp.c_proj": (4 * dim, dim),
    }
    for layer in range(config["n_layer"]):
        at = f"transformer.h.{layer}."
        for name, shape in products.items():
            shapes |= {f"{at}{name}.weight": shape, f"{at}{name}.bias": shape[1:]}
        for name in ("ln_1", "ln_2"):
            shapes |= {f"{at}{name}.weight": (dim,), f"{at}{name}.bias": (dim,)}
    return shapes | {"transformer.ln_f.weight": (dim,), "transformer.ln_f.bias": (dim,)}


def write_folder(folder: Path, config: dict[str, Any], tensors: Tensors, files: int = 1) -> Path:
    """Writes a folder, its tensors in so many files."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    if files == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    names = [f"model-{number:05}-of-{files:05}.safetensors" for number in range(1, files + 1)]
    where = {name: names[place % files] for place, name in enumerate(tensors)}
    for file in names:
        save_file({n: t for n, t in tensors.items() if where[n] == file}, folder / file)
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder
