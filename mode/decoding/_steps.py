"""Prefill and decode steps: the prompts of a batch, then one or several tokens, and back."""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from .._checks import check_count, is_known
from .._types import Sequences
from ..models import Transformer
from ..nn import Routings, map_caches
from ._checks import check_model, check_prompt, check_range, check_state, check_tokens, per_sequence
from ._join import join_routings
from ._state import DecodeState, NewTokens, advance, advance_all, begin


def prefill(
    model: Transformer,
    tokens: NewTokens,
    lengths: Sequences | None = None,
    *,
    max_tokens: int,
    chunk: int | None = None,
    cache_dtype: DTypeLike | None = None,
) -> tuple[DecodeState, Routings]:
    """Reads the prompts of a batch.

    **Arguments:**

    - `model`: a model that decides token by token: `make_causal(model)`.
    - `tokens`: `[batch, tokens]`, prompts, padded at the end by anything.
    - `lengths`: `[batch]`, tokens of each prompt, at least 1; by default all are whole.
    - `max_tokens`: tokens of a sequence in all, prompt included: the size of the caches. That of a
        routed layer has `token_capacity(max_tokens, max_capacity)` slots, of the `max_capacity`
        given to `make_causal`.
    - `chunk`: tokens to read at once: fewer take less memory, with the same result; by default all.
    - `cache_dtype`: floating dtype of the caches, such as `jnp.bfloat16` for half of the bytes of
        float32; by default that of the activations. Keys and values are rounded to it once, so that
        what is decoded differs from the forward pass by as much. A block of yours that has no
        attention of this library casts what it reads.

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
    model.check_length("max_tokens", max_tokens)
    tokens, lengths = check_prompt("tokens", model, tokens, lengths)
    longest = tokens.shape[1]
    if longest > max_tokens:
        raise ValueError(
            f"`tokens` must fit into the cache of max_tokens={max_tokens}, got prompts of "
            f"{longest} tokens. Raise `max_tokens`, or cut the prompts."
        )
    if cache_dtype is not None and not jnp.issubdtype(cache_dtype, jnp.floating):
        raise ValueError(f"`cache_dtype` must be a floating dtype, got {cache_dtype!r}.")
    size = longest if chunk is None else check_count("chunk", chunk, 1)
    first = jnp.minimum(lengths, size)
    state, routings = _compiled_begin(model, tokens[:, :size], first, max_tokens, cache_dtype)
    pieces = [routings]
    for start in range(size, longest, size):
        piece = tokens[:, start : start + size]
        rest = jnp.clip(lengths - start, 0, piece.shape[1])
        state, routings = _pass(advance, model, state, piece, rest)
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
    that already has `max_tokens` tokens. After a token that is no id, the logits are NaN. (The
    check when run is a call to the host: to export a program, set `EQX_ON_ERROR=off`.)
    """
    check_model(model)
    batch = check_state(state)
    tokens = per_sequence("tokens", tokens, batch)
    active = per_sequence("active", active, batch, True)
    return _pass(advance, model, state, tokens[:, None], active.astype(jnp.int32))


def decode_tokens(
    model: Transformer, state: DecodeState, tokens: NewTokens, lengths: Sequences | None = None
) -> tuple[Float[Array, "batch new vocab"], DecodeState, Routings]:
    """Appends several tokens to each sequence and returns the logits after each of them.

    One pass for what would be several steps: for the tokens that a cheaper model drafted, whose
    rejected rest `rewind` removes.

    **Arguments:**

    - `model`, `state`: as `decode_step` takes them; the caches are **donated**.
    - `tokens`: `[batch, new]`.
    - `lengths`: `[batch]`, how many of them to append to each sequence, from 0; by default all.

    **Returns:** `(logits, state, routings)`: logits, `[batch, new, vocab]`, of the token after each
    new one; the state and the routings as `decode_step` returns them.

    **Raises:** as `decode_step`; `ValueError` for lengths outside 0 to `new`, ids outside the
    vocabulary, and more tokens than the caches take.

    >>> import jax, jax.numpy as jnp, mode
    >>> model = mode.mod_transformer(256, 32, depth=4, num_heads=2, key=jax.random.key(0))
    >>> model = mode.make_causal(model)
    >>> state, _ = mode.prefill(model, jnp.zeros((2, 8), int), max_tokens=32)
    >>> logits, state, _ = mode.decode_tokens(model, state, jnp.ones((2, 4), int))
    >>> state = mode.rewind(state, jnp.array([9, 12]), logits[jnp.arange(2), jnp.array([0, 3])])
    >>> logits.shape, state.length.tolist()
    ((2, 4, 256), [9, 12])

    *Source:* speculative decoding, arXiv:2211.17192, section 2.1.
    """
    check_model(model)
    batch = check_state(state)
    tokens = check_tokens("tokens", tokens)
    if tokens.shape[0] != batch:
        raise ValueError(
            f"`tokens` must have one row per sequence, {batch}, got shape {tokens.shape}."
        )
    lengths = per_sequence("lengths", lengths, batch, tokens.shape[1]).astype(jnp.int32)
    check_range("lengths", lengths, 0, tokens.shape[1])
    if is_known(lengths) and is_known(state.length):  # before the caches are donated
        model.check_ids("tokens", tokens, np.arange(tokens.shape[1]) < np.asarray(lengths)[:, None])
        longest = int(np.max(np.asarray(state.length) + np.asarray(lengths)))
        if longest > state.max_tokens:
            raise ValueError(
                f"`tokens` must fit into the cache of max_tokens={state.max_tokens}, got up to "
                f"{longest} tokens with those before. Prefill with a larger `max_tokens`."
            )
    return _pass(advance_all, model, state, tokens, lengths)


def rewind(
    state: DecodeState, lengths: Sequences, logits: Float[Array, "batch vocab"]
) -> DecodeState:
    """Removes the last tokens of each sequence, such as drafted ones that were rejected.

    **Arguments:**

    - `state`: its arrays are **donated**.
    - `lengths`: `[batch]`, how many tokens each sequence keeps, from 0 to those that it has.
    - `logits`: `[batch, vocab]`, of the token after the last one that is kept.

    **Raises:** `ValueError` for a state that was donated before, shapes of another batch, and
    lengths that are negative or above those of the state.
    """
    lengths = per_sequence("lengths", lengths, check_state(state)).astype(jnp.int32)
    check_range("lengths", lengths, 0, state.length)
    if logits.shape != state.logits.shape:
        raise ValueError(
            f"`logits` must be those of one token per sequence, {state.logits.shape}, got "
            f"{logits.shape}."
        )
    return _rewind(logits, lengths, state)


_compiled_begin = eqx.filter_jit(begin)


def _pass(run: Callable[..., Any], model: Transformer, state: DecodeState, *new: Array) -> Any:
    """Runs `advance` or `advance_all`, compiled. Of the state, the caches alone are donated."""
    return _donating_pass((run, model, dataclasses.replace(state, caches=()), new), state.caches)


@eqx.filter_jit(donate="all-except-first")
def _donating_pass(kept: tuple[Any, ...], caches: Any) -> Any:
    run, model, rest, new = kept
    return run(model, dataclasses.replace(rest, caches=caches), *new)


@eqx.filter_jit(donate="all-except-first")
def _rewind(logits: Array, lengths: Sequences, state: DecodeState) -> DecodeState:
    lengths = jnp.minimum(lengths, state.length)
    caches = map_caches(lambda cache: cache.rewind(lengths), state.caches)
    return dataclasses.replace(state, logits=logits, length=lengths, caches=caches)
