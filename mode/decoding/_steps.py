"""Prefill and decode steps: the prompts of a batch, then one token after the other."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from .._checks import check_count
from .._types import Sequences
from ..models import Transformer
from ..nn import Routings
from ._advance import NewTokens, advance, begin
from ._checks import check_model, check_prompt, check_state, per_sequence
from ._join import join_routings
from ._state import DecodeState


def prefill(
    model: Transformer,
    tokens: Int[Array, "batch tokens"],
    lengths: Sequences | None = None,
    *,
    max_tokens: int,
    chunk: int | None = None,
) -> tuple[DecodeState, Routings]:
    """Reads the prompts of a batch.

    **Arguments:**

    - `model`: a model that decides token by token: `make_causal(model)`.
    - `tokens`: `[batch, tokens]`, prompts, padded at the end by anything.
    - `lengths`: `[batch]`, tokens of each prompt, at least 1; by default all are whole.
    - `max_tokens`: tokens of a sequence in all, prompt included: the size of the caches. That of a
        routed layer has `token_capacity(max_tokens, max_capacity)` slots, of the `max_capacity`
        given to `make_causal`.
    - `chunk`: reads the prompts in pieces of so many tokens, which takes less memory and gives the
        same result; by default in one.

    **Returns:** `(state, routings)`: a `DecodeState` with the logits of the first token after each
    prompt, and the routings as the forward pass returns them.

    **Raises:** `ValueError` for a model whose selectors look ahead, or with a block that has no
    `extend`; for an empty prompt, one longer than `max_tokens`, or ids outside the vocabulary.

    >>> import jax, jax.numpy as jnp, mode
    >>> model = mode.mod_transformer(256, 32, depth=4, num_heads=2, key=jax.random.key(0))
    >>> model = mode.make_causal(model)
    >>> state, routings = mode.prefill(model, jnp.zeros((2, 8), int), max_tokens=32)
    >>> state, routings = mode.decode_step(model, state, jnp.argmax(state.logits, axis=-1))
    >>> state.length.tolist()
    [9, 9]
    """
    check_model(model)
    max_tokens = check_count("max_tokens", max_tokens, 1)
    tokens, lengths = check_prompt("tokens", model, tokens, lengths, max_tokens)
    size = tokens.shape[1] if chunk is None else check_count("chunk", chunk, 1)
    return read_prompts(model, tokens, lengths, max_tokens, size)


def read_prompts(
    model: Transformer, tokens: NewTokens, lengths: Sequences, max_tokens: int, size: int
) -> tuple[DecodeState, Routings]:
    """Runs `prefill` with arguments that were checked."""
    first = jnp.minimum(lengths, size)
    state, routings = _compiled_begin(model, tokens[:, :size], first, max_tokens)
    pieces = [routings]
    for start in range(size, tokens.shape[1], size):
        piece = tokens[:, start : start + size]
        state, routings = _step(model, state, piece, jnp.clip(lengths - start, 0, piece.shape[1]))
        pieces.append(routings)
    return state, join_routings(model, pieces)


def decode_step(
    model: Transformer,
    state: DecodeState,
    tokens: Sequences,
    active: Bool[Array, " batch"] | None = None,
) -> tuple[DecodeState, Routings]:
    """Appends one token to each sequence. Compiled once for all steps.

    **Arguments:**

    - `model`: the one that `state` was made with.
    - `state`: its caches are **donated**: they become the result's, and it is not to be used again.
    - `tokens`: `[batch]`, ids below the vocabulary's.
    - `active`: `[batch]`; a sequence for which it is false stays as it is.

    **Returns:** `(state, routings)`. The routings are those of the new tokens, as the forward pass
    returns them for one token; a sequence that is not active counts as padding.

    **Raises:** `ValueError` for another number of tokens than sequences, a `state` of another
    model, or one that was donated before; `equinox.EquinoxRuntimeError` when run for a sequence
    that already has `max_tokens` tokens. A token that is no id makes its sequence NaN.
    """
    check_model(model)
    batch = check_state(state).length.shape[0]
    tokens = per_sequence("tokens", tokens, batch, jnp.integer)
    active = jnp.ones(batch, bool) if active is None else active
    active = per_sequence("active", active, batch, jnp.bool_)
    return _step(model, state, tokens[:, None], active.astype(jnp.int32))


_compiled_begin = eqx.filter_jit(begin)


def _step(
    model: Transformer, state: DecodeState, tokens: NewTokens, lengths: Sequences
) -> tuple[DecodeState, Routings]:
    rest, caches = split_caches(state)
    return _donating_step((model, rest, tokens, lengths), caches)


@eqx.filter_jit(donate="all-except-first")
def _donating_step(kept: tuple[Any, ...], caches: Any) -> tuple[DecodeState, Routings]:
    model, rest, tokens, lengths = kept
    return advance(model, join_caches(rest, caches), tokens, lengths)


def split_caches(state: DecodeState) -> tuple[tuple[Any, ...], Any]:
    """Takes the caches, which are donated, out of a state."""
    return (state.logits, state.length, state.max_tokens, state.structure), state.caches


def join_caches(rest: tuple[Any, ...], caches: Any) -> DecodeState:
    """Puts the caches back."""
    logits, length, max_tokens, structure = rest
    return DecodeState(logits, length, max_tokens, structure, caches)
