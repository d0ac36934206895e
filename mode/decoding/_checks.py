"""The checks of decoding: models, states, prompts and arrays with one value per sequence."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array

from .._checks import is_known, type_name
from .._types import Sequences
from ..models import Transformer
from ._state import DecodeState, NewTokens


def check_model(model: object) -> None:
    """Refuses what is no model."""
    if not isinstance(model, Transformer):
        raise ValueError(
            f"`model` must be a `Transformer`, got {type(model).__name__}. "
            "`mode.Transformer(vocab, dim, period, key=key)` makes one of layers."
        )


def check_state(state: object) -> int:
    """Returns the number of sequences of a state whose arrays were not donated before."""
    if not isinstance(state, DecodeState):
        raise ValueError(
            f"`state` must be a `DecodeState`, as `prefill` returns it, got {type(state).__name__}."
        )
    leaves = jax.tree.leaves(state)
    if any(not isinstance(leaf, Tracer) and leaf.is_deleted() for leaf in (leaves[0], leaves[-1])):
        raise ValueError(
            "`state` was given to an earlier call, such as `decode_step`, which wrote on in its "
            "arrays (they are donated). Go on from what that call returned."
        )
    return state.length.shape[0]


def check_prompt(
    name: str, model: Transformer, tokens: Any, lengths: Any
) -> tuple[NewTokens, Sequences]:
    """Returns prompts and their lengths as arrays, or says what is wrong with them."""
    tokens = check_tokens(name, tokens)
    batch, longest = tokens.shape
    lengths = per_sequence("lengths", lengths, batch, longest).astype(jnp.int32)
    if not (is_known(tokens) and is_known(lengths)):
        return tokens, lengths  # their numbers are not known yet
    whole = np.asarray(lengths)
    if whole.min() < 1 or whole.max() > longest:
        raise ValueError(
            f"`lengths` must be from 1 to the {longest} tokens of `{name}`, got {whole.tolist()}. "
            "Start an empty prompt with a token that begins documents."
        )
    model.check_ids(name, tokens, np.arange(longest) < whole[:, None])
    return tokens, lengths


def check_tokens(name: str, tokens: Any) -> NewTokens:
    """Returns token ids as an array, or says what is wrong with its shape or dtype."""
    try:
        tokens = jnp.asarray(tokens)
    except (TypeError, ValueError):
        raise ValueError(
            f"`{name}` must be an array of integers, [batch, tokens], got {type_name(tokens)} that "
            "makes none. Pad shorter sequences at the end and give their `lengths`."
        ) from None
    if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
        fix = f"One sequence is a batch of one: `{name}[None]`." if tokens.ndim == 1 else ""
        raise ValueError(
            f"`{name}` must be integers, [batch, tokens], got shape {tokens.shape} and dtype "
            f"{tokens.dtype}. {fix}".rstrip()
        )
    if 0 in tokens.shape:
        raise ValueError(
            f"`{name}` must hold at least one token of one sequence, got shape {tokens.shape}. "
            "Start an empty prompt with a token that begins documents."
        )
    return tokens


def check_range(name: str, values: Array, least: int, most: Array | int) -> None:
    """Refuses integers outside a range, where they are known."""
    if not (is_known(values) and is_known(most)):
        return
    known, upper = np.asarray(values), np.asarray(most)
    if np.any(known < least) or np.any(known > upper):
        raise ValueError(
            f"`{name}` must be from {least} to {upper.tolist()}, got {known.tolist()}."
        )


def per_sequence(name: str, values: Any, batch: int, default: Any = None) -> Array:
    """Returns one integer per sequence as an array, or one flag if `default` is a flag."""
    values = jnp.full(batch, default) if values is None else jnp.asarray(values)
    kind, word = (jnp.bool_, "flag") if isinstance(default, bool) else (jnp.integer, "integer")
    if values.shape != (batch,) or not jnp.issubdtype(values.dtype, kind):
        raise ValueError(
            f"`{name}` must hold one {word} per sequence, {(batch,)}, got shape {values.shape} and "
            f"dtype {values.dtype}."
        )
    return values
