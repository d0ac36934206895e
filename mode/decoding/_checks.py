"""The checks of decoding: models, states, prompts and arrays with one value per sequence."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Int

from .._types import Sequences
from ..models import Transformer
from ..routing import AbstractTokenSelector, routers
from ._state import DecodeState, ModelStructure


def check_model(model: object) -> None:
    """Refuses what is no model."""
    if not isinstance(model, Transformer):
        raise ValueError(
            f"`model` must be a `Transformer`, got {type(model).__name__}. "
            "`mode.Transformer(vocab, dim, period, key=key)` makes one of layers."
        )


def check_decodes(model: Transformer) -> None:
    """Refuses a model whose routers look at more than a token and its past."""
    for router in routers(model):
        if not router.select.is_causal:
            raise ValueError(
                "`model` must decide token by token, but it has a router with "
                f"`{type(router.select).__name__}`, which looks at later tokens. Decode "
                "`mode.make_causal(model)`."
            )
        if not isinstance(router.select, AbstractTokenSelector):
            raise ValueError(
                "`model` must decide token by token, but it has a router with "
                f"`{type(router.select).__name__}`, which assigns whole sequences. Replace it by "
                "a `QuantileThreshold` with `mode.map_routers`."
            )


def check_state(state: object) -> DecodeState:
    """Refuses what is no state, and one whose arrays were donated to an earlier call."""
    if not isinstance(state, DecodeState):
        raise ValueError(
            f"`state` must be a `DecodeState`, as `prefill` returns it, got {type(state).__name__}."
        )
    leaves = jax.tree.leaves(state)
    if any(not isinstance(leaf, Tracer) and leaf.is_deleted() for leaf in (leaves[0], leaves[-1])):
        raise ValueError(
            "`state` was given to an earlier `decode_step` or `continue_generation`, which wrote "
            "on in its caches (they are donated). Go on from what that call returned."
        )
    return state


def check_structure(model: Transformer, made_by: ModelStructure) -> None:
    """Refuses a state that `prefill` made with another model."""
    structure = ModelStructure.of(model)
    if structure != made_by:
        raise ValueError(
            "`state` must have been made by `prefill` with the same model, got one made with "
            f"another: {_difference(structure, made_by)} A model under another `max_capacity`, or "
            "`unstack_layers`, has other caches."
        )


def _difference(expected: ModelStructure, got: ModelStructure) -> str:
    ours, theirs = dict(expected.shapes), dict(got.shapes)
    for path in ours | theirs:
        if ours.get(path) != theirs.get(path):
            return f"expected `model{path}` of shape {ours.get(path)}, got {theirs.get(path)}."
    return "it has the same arrays, and other selectors, gates or sizes."


def check_prompt(
    name: str, model: Transformer, tokens: Any, lengths: Any, max_tokens: int
) -> tuple[Int[Array, "batch tokens"], Sequences]:
    """Returns prompts and their lengths as arrays, or says what is wrong with them."""
    tokens = check_tokens(name, model, tokens)
    batch, longest = tokens.shape
    if longest > max_tokens:
        raise ValueError(
            f"`{name}` must fit into the cache of max_tokens={max_tokens}, got prompts of "
            f"{longest} tokens. Raise `max_tokens`, or cut the prompts."
        )
    lengths = jnp.full(batch, longest) if lengths is None else lengths
    lengths = per_sequence("lengths", lengths, batch, jnp.integer).astype(jnp.int32)
    if isinstance(tokens, Tracer) or isinstance(lengths, Tracer):
        return tokens, lengths  # their numbers are not known yet
    whole = np.asarray(lengths)
    if whole.min() < 1 or whole.max() > longest:
        raise ValueError(
            f"`lengths` must be from 1 to the {longest} tokens of `{name}`, got {whole.tolist()}. "
            "Start an empty prompt with a token that begins documents."
        )
    ids = np.asarray(tokens)[np.arange(longest) < whole[:, None]]
    vocab = model.embedding.shape[0]
    if ids.min() < 0 or ids.max() >= vocab:
        raise ValueError(
            f"`{name}` must be ids from 0 to {vocab - 1}, the model's vocabulary, got ids from "
            f"{ids.min()} to {ids.max()}."
        )
    return tokens, lengths


def check_tokens(name: str, model: Transformer, tokens: Any) -> Int[Array, "batch tokens"]:
    """Returns token ids as an array, or says what is wrong with its shape or dtype."""
    tokens = jnp.asarray(tokens)
    if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(
            f"`{name}` must be integers, [batch, tokens], got shape {tokens.shape} and dtype "
            f"{tokens.dtype}. One sequence is a batch of one: `{name}[None]`."
        )
    if 0 in tokens.shape:
        raise ValueError(
            f"`{name}` must hold at least one token of one sequence, got shape {tokens.shape}. "
            "Start an empty prompt with a token that begins documents."
        )
    return tokens


def per_sequence(name: str, values: Any, batch: int, kind: Any) -> Array:
    """Returns one value per sequence as an array, or says what is wrong with it."""
    values = jnp.asarray(values)
    fits = values.dtype == kind if kind is jnp.bool_ else jnp.issubdtype(values.dtype, kind)
    if values.shape != (batch,) or not fits:
        raise ValueError(
            f"`{name}` must hold one {'flag' if kind is jnp.bool_ else 'integer'} per sequence, "
            f"{(batch,)}, got shape {values.shape} and dtype {values.dtype}."
        )
    return values
