"""The pass of a model over new tokens of a batch, after those in its caches.

Each sequence runs only the blocks its tokens are routed to. Other sequences affect how many rows
are computed, never the result. So decoding gives the logits of the teacher-forced forward pass of
the same model on sequences of `max_tokens`, padded at the end, in pieces of any size.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from .._token_info import TokenInfo
from .._types import Sequences
from ..models import Transformer
from ..nn import Cache, Routings, map_caches
from ._checks import check_decodes, check_structure
from ._state import DecodeState, ModelStructure


NewTokens = Int[Array, "batch new"]
NewHidden = Float[Array, "batch new dim"]


def begin(
    model: Transformer, tokens: NewTokens, lengths: Sequences, max_tokens: int
) -> tuple[DecodeState, Routings]:
    """Runs the first tokens of each sequence."""
    check_decodes(model)
    caches: Any = (Cache.empty(max_tokens),) * len(model.stacks)
    length = jnp.zeros_like(lengths)
    hidden, length, caches, routings = _extend(model, length, caches, tokens, lengths)
    logits = model.unembed(last_token(hidden, lengths))
    return DecodeState(logits, length, max_tokens, ModelStructure.of(model), caches), routings


def advance(
    model: Transformer, state: DecodeState, tokens: NewTokens, lengths: Sequences
) -> tuple[DecodeState, Routings]:
    """Runs further tokens, and computes the logits after the last of each sequence.

    To be compiled into a larger program. What it refuses, it refuses when it is traced.
    """
    hidden, state, routings = advance_hidden(model, state, tokens, lengths)
    return with_logits(state, model.unembed(last_token(hidden, lengths)), lengths), routings


def advance_hidden(
    model: Transformer, state: DecodeState, tokens: NewTokens, lengths: Sequences
) -> tuple[NewHidden, DecodeState, Routings]:
    """Runs further tokens. The state keeps its logits."""
    check_decodes(model)
    check_structure(model, state.structure)
    length = eqx.error_if(
        state.length,
        state.length + lengths > state.max_tokens,
        f"a sequence is full: it has max_tokens={state.max_tokens} tokens. Prefill with a larger "
        "`max_tokens`, or leave the sequence out by `active`.",
    )
    hidden, length, caches, routings = _extend(model, length, state.caches, tokens, lengths)
    state = DecodeState(state.logits, length, state.max_tokens, state.structure, caches)
    return hidden, state, routings


def _extend(
    model: Transformer, length: Sequences, caches: Any, tokens: NewTokens, lengths: Sequences
) -> tuple[NewHidden, Sequences, Any, Routings]:
    order = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    info = TokenInfo(length[:, None] + order, (order < lengths[:, None]).astype(jnp.int32))
    hidden, routings, news = model.extend(tokens, info, caches)
    # Layers read the caches. What tokens leave is written here, once for all layers of a stack.
    # An empty cache stands for those of all layers of a stack.
    caches = jax.tree.map(
        lambda old, new: map_caches(lambda part: old.append(part, hidden), new),
        caches,
        news,
        is_leaf=lambda node: isinstance(node, Cache),
    )
    return hidden, length + lengths, caches, routings


def last_token(x: Float[Array, "batch new size"], lengths: Sequences) -> Float[Array, "batch size"]:
    """Takes the values of the last real token of each sequence."""
    index = jnp.maximum(lengths, 1)[:, None, None] - 1
    return jnp.take_along_axis(x, index, axis=1)[:, 0]


def with_logits(
    state: DecodeState, logits: Float[Array, "batch vocab"], lengths: Sequences
) -> DecodeState:
    """Puts new logits into a state, but for sequences without new tokens."""
    kept = jnp.where(lengths[:, None] > 0, logits, state.logits)
    return eqx.tree_at(lambda s: s.logits, state, kept)
