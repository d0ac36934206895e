"""What a decoder-only model is made of, and the model of that shape."""

import dataclasses
import itertools

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import PRNGKeyArray

from .._checks import type_name
from .._linear import LayerNorm, MakeNorm, RMSNorm
from ..models import MakeLayer, Transformer
from ..nn import (
    AbstractRopeScaling,
    Attention,
    CausalAttention,
    GELUFeedForward,
    PositionWise,
    Residual,
    SwiGLUFeedForward,
    TransformerBlock,
)


@dataclasses.dataclass(frozen=True)
class Config:
    """The shape of a pretrained model, whatever file it comes from.

    **Attributes:**

    - `family`: `"llama"`, `"mistral"`, `"qwen2"`, `"qwen3"` or `"gpt2"`, as `config.json` calls it.
    - `vocab`, `dim`, `depth`, `num_heads`, `num_kv_heads`, `head_dim`: sizes.
    - `hidden`: features inside the feed-forward.
    - `eps`: of all norms.
    - `tied`: whether the embedding is the output projection too.
    - `rope_theta`, `rope_scaling`: of `Attention`; `None` for learned positions.
    - `max_positions`: number of learned positions, or `None`.
    - `windows`: the window of each layer's attention, or `None`.
    - `qkv_bias`, `out_bias`, `feedforward_bias`: which maps have biases.
    - `head_norm`: whether queries and keys are normed.
    """

    family: str
    vocab: int
    dim: int
    depth: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden: int
    eps: float
    tied: bool
    windows: tuple[int | None, ...]
    rope_theta: float | None = None
    rope_scaling: AbstractRopeScaling | None = None
    max_positions: int | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    feedforward_bias: bool = False
    head_norm: bool = False

    def norm(self, features: int) -> RMSNorm | LayerNorm:
        """Builds a norm of so many features."""
        kind = LayerNorm if self.family == "gpt2" else RMSNorm
        return kind(features, self.eps)


def build(config: Config, dtype: DTypeLike, remat: bool, key: PRNGKeyArray) -> Transformer:
    """Builds an untrained model. Neighbours of one window have one scan."""
    stacks = [
        ([_make_layer(config, window)], len(list(same)))
        for window, same in itertools.groupby(config.windows)
    ]
    return Transformer(
        config.vocab,
        config.dim,
        stacks=stacks,
        tied=config.tied,
        embedding_scale=1.0,
        max_positions=config.max_positions,
        make_norm=config.norm,
        dtype=jnp.dtype(dtype),
        remat=remat,
        key=key,
    )


def _make_layer(config: Config, window: int | None) -> MakeLayer:
    feedforward = GELUFeedForward if config.family == "gpt2" else SwiGLUFeedForward
    head_norm: MakeNorm | None = config.norm if config.head_norm else None

    def make(key: PRNGKeyArray) -> Residual:
        attention = Attention(
            config.dim,
            config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            qkv_bias=config.qkv_bias,
            out_bias=config.out_bias,
            head_norm=head_norm,
            rope_theta=config.rope_theta,
            rope_scaling=config.rope_scaling,
            attend=CausalAttention(window=window),
            key=key,
        )
        mlp = feedforward(config.dim, config.hidden, use_bias=config.feedforward_bias, key=key)
        block = TransformerBlock(
            config.dim,
            attention=attention,
            feedforward=PositionWise(mlp),
            make_norm=config.norm,
            key=key,
        )
        return Residual(block)

    return make


def config_of(model: Transformer) -> Config:
    """Returns the shape of a model, whether a file can hold all of it or not.

    **Raises:** `ValueError` for a layer that is not a `TransformerBlock` for every token, with one
    of the feed-forwards and attention functions that files know.
    """
    blocks: list[TransformerBlock] = []
    functions: list[GELUFeedForward | SwiGLUFeedForward] = []
    windows: list[int | None] = []
    for layer in (layer for stack in model.stacks for layer in stack.layers * stack.repeats):
        block = layer.block if isinstance(layer, Residual) else None
        if not isinstance(block, TransformerBlock):
            raise ValueError(
                "`model` must have dense transformer blocks alone, which other libraries know, got "
                f"`{type(layer).__name__}`. Save a routed model by `equinox.tree_serialise_leaves` "
                "and load it into what `convert` makes of the dense one."
            )
        blocks.append(block)
        attend, function = block.attention.attend, getattr(block.feedforward, "function", None)
        if not isinstance(function, GELUFeedForward | SwiGLUFeedForward):
            raise ValueError(
                "`model` must have feed-forwards that other libraries know, `SwiGLUFeedForward` or "
                f"`GELUFeedForward`, got {type_name(function or block.feedforward)}."
            )
        functions.append(function)
        scoring = getattr(attend, "scoring", None)
        if scoring is None or scoring != CausalAttention(window=scoring.window).scoring:
            raise ValueError(
                "`model` must have attention that other libraries know, `CausalAttention` with no "
                f"option but `window`, got {attend}."
            )
        windows.append(scoring.window)
    first, learned = blocks[0], model.position_embedding
    attention, function = first.attention, functions[0]
    if isinstance(function, GELUFeedForward):
        family = "gpt2"
    elif attention.query_norm is not None:
        family = "qwen3"
    elif attention.qkv.bias is not None and attention.out.bias is None:
        family = "qwen2"
    else:
        family = "llama" if set(windows) == {None} else "mistral"
    return Config(
        family=family,
        vocab=model.embedding.shape[0],
        dim=model.embedding.shape[1],
        depth=len(blocks),
        num_heads=attention.num_heads,
        num_kv_heads=attention.num_kv_heads,
        head_dim=attention.head_dim,
        hidden=function.up.weight.shape[-1],
        eps=first.attention_norm.eps,
        tied=model.head is None,
        windows=tuple(windows),
        rope_theta=attention.rope_theta,
        rope_scaling=attention.rope_scaling,
        max_positions=None if learned is None else learned.shape[0],
        qkv_bias=attention.qkv.bias is not None,
        out_bias=attention.out.bias is not None,
        feedforward_bias=function.up.bias is not None,
        head_norm=attention.query_norm is not None,
    )
