"""The state of a generation, and the pass of a model over new tokens that moves it.

Each sequence runs only the blocks its tokens are routed to. Other sequences affect how many rows
are computed, never the result. So decoding gives the logits of the teacher-forced forward pass of
the same model on sequences of `max_tokens`, padded at the end, in pieces of any size.
"""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PyTree

from .._token_info import TokenInfo
from .._types import Sequences
from ..models import Transformer
from ..nn import Cache, Routings, map_caches
from ..parallel import role_field
from ..routing import AbstractTokenSelector, routers


NewTokens = Int[Array, "batch new"]
NewHidden = Float[Array, "batch new dim"]


@dataclasses.dataclass(frozen=True)
class ModelStructure:
    """The structure and shapes that two models must share to go on from each other's caches.

    Kept in a state, so that a step knows without another trace whether its model fits.
    """

    tree: Any
    shapes: tuple[tuple[str, tuple[int, ...]], ...]

    @staticmethod
    def of(model: PyTree) -> "ModelStructure":
        """The structure of a model."""
        arrays = jax.tree_util.tree_leaves_with_path(eqx.filter(model, eqx.is_array))
        shapes = tuple((jax.tree_util.keystr(path), leaf.shape) for path, leaf in arrays)
        return ModelStructure(jax.tree.structure(model), shapes)


class DecodeState(eqx.Module):
    """The state of a generation, for a batch of sequences.

    What goes on from it, such as `decode_step` and `rewind`, writes its arrays in place (they are
    donated): go on from the result.

    **Attributes:**

    - `logits`: `[batch, vocab]`, of the next token of each sequence; float32 or wider.
    - `length`: `[batch]`, tokens of each sequence so far.
    - `caches`: for each stack of the model, one `Cache` per layer of its period, with a leading
        axis of repeats.
    - `max_tokens`: how many tokens a sequence may have in all.
    - `structure`: of the model that it belongs to.
    """

    logits: Float[Array, "batch vocab"]
    length: Sequences
    max_tokens: int = eqx.field(static=True)
    structure: ModelStructure = eqx.field(static=True)
    caches: tuple[Any, ...] = role_field("caches", stacked=True)


def begin(
    model: Transformer,
    tokens: NewTokens,
    lengths: Sequences,
    max_tokens: int,
    cache_dtype: DTypeLike | None = None,
) -> tuple[DecodeState, Routings]:
    """Runs the first tokens of each sequence."""
    _check_decodes(model)
    caches: Any = (Cache.empty(max_tokens, cache_dtype),) * len(model.stacks)
    length = jnp.zeros_like(lengths)
    hidden, length, caches, routings = _extend(model, length, caches, tokens, lengths)
    logits = model.unembed(_last(hidden, lengths))
    return DecodeState(logits, length, max_tokens, ModelStructure.of(model), caches), routings


def advance(
    model: Transformer, state: DecodeState, tokens: NewTokens, lengths: Sequences
) -> tuple[DecodeState, Routings]:
    """Runs further tokens, and computes the logits after the last of each sequence.

    To be compiled into a larger program. What it refuses, it refuses when it is traced.
    """
    hidden, state, routings = _advance_hidden(model, state, tokens, lengths)
    return _with_logits(state, model.unembed(_last(hidden, lengths)), lengths), routings


def advance_all(
    model: Transformer, state: DecodeState, tokens: NewTokens, lengths: Sequences
) -> tuple[Float[Array, "batch new vocab"], DecodeState, Routings]:
    """Runs further tokens as `advance` does, and returns the logits after each of them, too."""
    hidden, state, routings = _advance_hidden(model, state, tokens, lengths)
    logits = model.unembed(hidden)
    return logits, _with_logits(state, _last(logits, lengths), lengths), routings


def _advance_hidden(
    model: Transformer, state: DecodeState, tokens: NewTokens, lengths: Sequences
) -> tuple[NewHidden, DecodeState, Routings]:
    """Runs further tokens. The state keeps its logits."""
    _check_decodes(model)
    _check_structure(model, state.structure)
    length = eqx.error_if(
        state.length,
        state.length + lengths > state.max_tokens,
        f"a sequence is full: it has max_tokens={state.max_tokens} tokens. Prefill with a larger "
        "`max_tokens`, or leave the sequence out by `active`.",
    )
    hidden, length, caches, routings = _extend(model, length, state.caches, tokens, lengths)
    return hidden, dataclasses.replace(state, length=length, caches=caches), routings


def _extend(
    model: Transformer, length: Sequences, caches: Any, tokens: NewTokens, lengths: Sequences
) -> tuple[NewHidden, Sequences, Any, Routings]:
    order = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    segment_ids = (order < lengths[:, None]).astype(jnp.int32)
    info = TokenInfo(length[:, None] + order, segment_ids, layout="prefix")
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


def _last(x: Float[Array, "batch new size"], lengths: Sequences) -> Float[Array, "batch size"]:
    """Takes the values of the last real token of each sequence."""
    index = jnp.maximum(lengths, 1)[:, None, None] - 1
    return jnp.take_along_axis(x, index, axis=1)[:, 0]


def _with_logits(
    state: DecodeState, logits: Float[Array, "batch vocab"], lengths: Sequences
) -> DecodeState:
    """Puts new logits into a state, but for sequences without new tokens."""
    kept = jnp.where(lengths[:, None] > 0, logits, state.logits)
    return dataclasses.replace(state, logits=kept)


def _check_decodes(model: Transformer) -> None:
    """Refuses a model whose routers look at more than a token and its past."""
    for router in routers(model):
        if not router.select.is_causal:
            why = "looks at later tokens. Decode `mode.make_causal(model)`."
        elif not isinstance(router.select, AbstractTokenSelector):
            why = (
                "assigns whole sequences. Replace it by a `QuantileThreshold` with "
                "`mode.map_routers`."
            )
        else:
            continue
        raise ValueError(
            "`model` must decide token by token, but it has a router with "
            f"`{type(router.select).__name__}`, which {why}"
        )


def _check_structure(model: Transformer, made_by: ModelStructure) -> None:
    """Refuses a state that `prefill` made with another model."""
    structure = ModelStructure.of(model)
    if structure == made_by:
        return
    expected, got = dict(structure.shapes), dict(made_by.shapes)
    paths = [path for path in expected | got if expected.get(path) != got.get(path)]
    difference = (
        f"expected `model{paths[0]}` of shape {expected.get(paths[0])}, got {got.get(paths[0])}."
        if paths
        else "it has the same arrays, and other selectors, gates or sizes."
    )
    raise ValueError(
        "`state` must have been made by `prefill` with the same model, got one made with "
        f"another: {difference} A model under another `max_capacity`, or `unstack_layers`, has "
        "other caches."
    )
