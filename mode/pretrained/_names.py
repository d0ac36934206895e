"""Names of tensors: which ones of a file make which array of the model.

Tables from the path of a module, in the model or in one of its blocks, to its names in the file.
Several names are parts of one product, joined along their outputs.
"""

from typing import NamedTuple


class Names(NamedTuple):
    """The names of one file format.

    **Attributes:**

    - `model`: of modules outside the layers.
    - `layer`: prefix of the names in a layer, with its number.
    - `block`: of modules inside a block.
    - `transposed`: whether matrices are stored as `[out, in]`.
    - `ignored`: ends of names that hold no parameters.
    - `prefix`: that a file may leave out of every name.
    """

    model: dict[str, str]
    layer: str
    block: dict[str, tuple[str, ...]]
    transposed: bool = True
    ignored: tuple[str, ...] = ()
    prefix: str = ""


LLAMA = Names(
    model={"embedding": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"},
    layer="model.layers.{}.",
    block={
        "attention_norm": ("input_layernorm",),
        "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "attention.out": ("self_attn.o_proj",),
        "attention.query_norm": ("self_attn.q_norm",),
        "attention.key_norm": ("self_attn.k_norm",),
        "feedforward_norm": ("post_attention_layernorm",),
        "feedforward.function.gate": ("mlp.gate_proj",),
        "feedforward.function.up": ("mlp.up_proj",),
        "feedforward.function.down": ("mlp.down_proj",),
    },
    ignored=("rotary_emb.inv_freq",),
    prefix="model.",
)

GPT2 = Names(
    model={
        "embedding": "transformer.wte",
        "position_embedding": "transformer.wpe",
        "norm": "transformer.ln_f",
    },
    layer="transformer.h.{}.",
    block={
        "attention_norm": ("ln_1",),
        "attention.qkv": ("attn.c_attn",),
        "attention.out": ("attn.c_proj",),
        "feedforward_norm": ("ln_2",),
        "feedforward.function.up": ("mlp.c_fc",),
        "feedforward.function.down": ("mlp.c_proj",),
    },
    transposed=False,
    ignored=(".attn.bias", ".attn.masked_bias"),
    prefix="transformer.",
)

GGUF = Names(
    model={
        "embedding": "token_embd",
        "position_embedding": "position_embd",
        "norm": "output_norm",
        "head": "output",
    },
    layer="blk.{}.",
    block={
        "attention_norm": ("attn_norm",),
        "attention.qkv": ("attn_q", "attn_k", "attn_v"),
        "attention.out": ("attn_output",),
        "attention.query_norm": ("attn_q_norm",),
        "attention.key_norm": ("attn_k_norm",),
        "feedforward_norm": ("ffn_norm",),
        "feedforward.function.gate": ("ffn_gate",),
        "feedforward.function.up": ("ffn_up",),
        "feedforward.function.down": ("ffn_down",),
    },
    ignored=("rope_freqs.weight",),  # read with the configuration
)

GGUF_GPT2 = GGUF._replace(block={**GGUF.block, "attention.qkv": ("attn_qkv",)})
