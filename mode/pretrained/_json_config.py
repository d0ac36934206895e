"""`config.json`, as `transformers` writes it: read, and written again.

Every key is used, stands for nothing that changes the function, or is refused by name.
"""

from collections.abc import Collection, Mapping
from typing import Any

from .._checks import check_count, check_positive
from ..nn import AbstractRopeScaling, LinearRopeScaling, Llama3RopeScaling
from ._config import Config


# The keys of sizes, of other families and of GPT-2.
_SIZES = (
    {
        "vocab": "vocab_size",
        "dim": "hidden_size",
        "depth": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "num_kv_heads": "num_key_value_heads",
        "head_dim": "head_dim",
        "hidden": "intermediate_size",
    },
    {
        "vocab": "vocab_size",
        "dim": "n_embd",
        "depth": "n_layer",
        "num_heads": "n_head",
        "hidden": "n_inner",
        "max_positions": "n_positions",
    },
)
_CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
}
# What `transformers` takes where a file does not say.
_LLAMA = {"rms_norm_eps": 1e-6, "tie_word_embeddings": False, "attention_bias": False}
_LLAMA |= {"mlp_bias": False}
_QWEN = {**_LLAMA, "num_key_value_heads": 32, "sliding_window": 4096, "use_sliding_window": False}
_QWEN |= {"max_window_layers": 28}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "mistral": {**_LLAMA, "num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {**_QWEN, "attention_bias": True},
    "qwen3": {**_QWEN, "head_dim": 128},
    "gpt2": {"tie_word_embeddings": True, "n_positions": 1024, "layer_norm_epsilon": 1e-5},
}
# Keys with one value that this library has; any other would be another function.
_ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "rope_interleaved": (False,),
    "partial_rotary_factor": (1, 1.0, None),
    "quantization_config": (None,),
}
# Keys that say nothing about the function of the model.
_IGNORED = {
    *("_name_or_path", "architectures", "attention_dropout", "attn_pdrop", "auto_map", "dtype"),
    *("bos_token_id", "chunk_size_feed_forward", "embd_pdrop", "eos_token_id", "id2label"),
    *(
        "gradient_checkpointing",
        "initializer_range",
        "is_decoder",
        "is_encoder_decoder",
        "label2id",
    ),
    *("is_llama_config", "max_position_embeddings", "model_type", "n_ctx", "output_attentions"),
    *("output_hidden_states", "pad_token_id", "pretraining_tp", "problem_type", "resid_pdrop"),
    *("reorder_and_upcast_attn", "return_dict", "summary_activation", "summary_first_dropout"),
    *("summary_proj_to_labels", "summary_type", "summary_use_proj", "task_specific_params"),
    *("tokenizer_class", "torch_dtype", "transformers.js_config", "transformers_version"),
    *("unsloth_fixed", "use_cache"),
}
_REQUIRED = object()


class _Values:
    """The keys of a file; remembers which were used."""

    def __init__(self, values: Mapping[str, Any], defaults: Mapping[str, Any]):
        self.values = dict(values)
        self.defaults = defaults

    def take(self, name: str, default: Any = _REQUIRED) -> Any:
        value = self.values.pop(name, self.defaults.get(name, default))
        if value is _REQUIRED:
            raise ValueError(f"`config.json` must have the key `{name}`, which it lacks.")
        return value

    def count(self, name: str) -> int:
        return check_count(name, self.take(name), 1)

    def optional(self, name: str) -> int | None:
        value = self.take(name, None)
        return None if value is None else check_count(name, value, 1)

    def number(self, name: str, default: Any = _REQUIRED) -> float:
        return check_positive(name, self.take(name, default))

    def check_all_used(self, ignored: Collection[str]) -> None:
        for name, allowed in _ONLY.items():
            value = self.values.pop(name, allowed[0])
            if value not in allowed:
                raise ValueError(
                    f"`{name}` of `config.json` must be {allowed[0]!r}, got {value!r}: this "
                    "library has no other."
                )
        left = sorted(set(self.values) - {*_IGNORED, *ignored})
        if left:
            raise ValueError(
                f"`config.json` must have known keys alone, got {', '.join(left)}, which may ask "
                "for what this library lacks. If they do not change the function of the model, "
                f"pass ignored={tuple(left)!r}."
            )


def from_json(values: Mapping[str, Any], ignored: Collection[str] = ()) -> Config:
    """Returns the shape of a model.

    **Raises:** `ValueError` for another family, a key that is missing, or one that needs what this
    library lacks.
    """
    family = values.get("model_type")
    if family not in _DEFAULTS:
        raise ValueError(
            f"`model_type` of `config.json` must be one of {', '.join(_DEFAULTS)}, got {family!r}."
        )
    keys, is_gpt2 = _Values(values, _DEFAULTS[family]), family == "gpt2"
    sizes = {field: keys.optional(key) for field, key in _SIZES[is_gpt2].items()}
    for field in ("vocab", "dim", "depth", "num_heads"):
        if sizes[field] is None:
            raise ValueError(f"`config.json` must have the key `{_SIZES[is_gpt2][field]}`.")
    dim, heads, depth = (sizes[field] or 0 for field in ("dim", "num_heads", "depth"))
    sizes["num_kv_heads"] = sizes.get("num_kv_heads") or heads
    if not sizes.get("head_dim"):
        if dim % heads:
            raise ValueError(f"`config.json` must have heads that divide {dim}, got {heads}.")
        sizes["head_dim"] = dim // heads
    sizes["hidden"] = sizes["hidden"] or 4 * dim
    bias = is_gpt2 or (family != "mistral" and bool(keys.take("attention_bias")))
    theta, scaling = (None, None) if is_gpt2 else _rope(keys)
    config = Config(
        family=family,
        **sizes,  # pyright: ignore[reportArgumentType]
        eps=keys.number("layer_norm_epsilon" if is_gpt2 else "rms_norm_eps"),
        tied=bool(keys.take("tie_word_embeddings")),
        windows=_windows(keys, family, depth),
        rope_theta=theta,
        rope_scaling=scaling,
        qkv_bias=bias,
        out_bias=bias and family != "qwen2",
        feedforward_bias=is_gpt2 or (family == "llama" and bool(keys.take("mlp_bias"))),
        head_norm=family == "qwen3",
    )
    keys.check_all_used(ignored)
    return config


def _windows(keys: _Values, family: str, depth: int) -> tuple[int | None, ...]:
    """Returns the window of each layer."""
    if family in ("llama", "gpt2"):
        return (None,) * depth
    window = keys.optional("sliding_window")
    if family == "mistral":
        return (window,) * depth
    is_windowed, first = keys.take("use_sliding_window"), keys.take("max_window_layers")
    kinds = keys.take("layer_types", None)
    if kinds is None:
        kinds = ["sliding_attention" if i >= first else "full_attention" for i in range(depth)]
        kinds = kinds if is_windowed else ["full_attention"] * depth
    known = {"full_attention": None, "sliding_attention": window}
    if len(kinds) != depth or not set(kinds) <= set(known):
        raise ValueError(
            f"`layer_types` of `config.json` must say {' or '.join(known)} for each of {depth} "
            f"layers, got {kinds}."
        )
    return tuple(known[kind] for kind in kinds)


def _rope(keys: _Values) -> tuple[float, AbstractRopeScaling | None]:
    """Returns base and scaling, from the keys of the versions 4 and 5 of `transformers`."""
    given = {
        **(keys.take("rope_scaling", None) or {}),
        **(keys.take("rope_parameters", None) or {}),
    }
    rope = _Values(given, {})
    theta = keys.number("rope_theta", rope.take("rope_theta", 10_000.0))
    kind = rope.take("type", "default")
    kind = rope.take("rope_type", kind)
    scaling = None
    if kind == "linear":
        scaling = LinearRopeScaling(rope.number("factor"))
    elif kind == "llama3":
        scaling = Llama3RopeScaling(
            rope.number("factor"),
            rope.number("low_freq_factor"),
            rope.number("high_freq_factor"),
            rope.count("original_max_position_embeddings"),
        )
    elif kind != "default":
        raise ValueError(
            "`rope_type` of `config.json` must be `default`, `linear` or `llama3`, got "
            f"{kind!r}, which this library lacks."
        )
    rope.check_all_used(())
    return theta, scaling


def to_json(config: Config) -> dict[str, Any]:
    """Returns the keys of a shape, as `transformers` reads them."""
    is_gpt2 = config.family == "gpt2"
    values: dict[str, Any] = {
        "architectures": [_CLASSES[config.family]],
        "model_type": config.family,
        **{key: getattr(config, field) for field, key in _SIZES[is_gpt2].items()},
        "tie_word_embeddings": config.tied,
    }
    if is_gpt2:
        return {**values, "layer_norm_epsilon": config.eps, "activation_function": "gelu_new"}
    values |= {"rms_norm_eps": config.eps, "hidden_act": "silu", "rope_theta": config.rope_theta}
    values["rope_scaling"] = _rope_json(config.rope_scaling)
    if config.family in ("llama", "qwen3"):
        values["attention_bias"] = config.qkv_bias
    if config.family == "llama":
        return {**values, "mlp_bias": config.feedforward_bias}
    windows = [window for window in config.windows if window is not None]
    values["sliding_window"] = windows[0] if windows else None
    if config.family != "mistral":
        values["use_sliding_window"] = bool(windows)
        values["layer_types"] = [
            "full_attention" if window is None else "sliding_attention" for window in config.windows
        ]
    return values


def _rope_json(scaling: AbstractRopeScaling | None) -> dict[str, Any] | None:
    if isinstance(scaling, LinearRopeScaling):
        return {"rope_type": "linear", "factor": scaling.factor}
    if isinstance(scaling, Llama3RopeScaling):
        return {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_positions,
        }
    if scaling is not None:
        raise ValueError(
            f"`rope_scaling` must be one that other libraries know, got {type(scaling).__name__}."
        )
    return None
