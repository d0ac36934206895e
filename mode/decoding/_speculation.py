"""Several new tokens at once, and back: what speculative decoding needs."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._types import Sequences
from ..models import Transformer
from ..nn import Routings, map_caches
from ._advance import NewTokens, advance_hidden, last_token, with_logits
from ._checks import check_model, check_state, check_tokens, per_sequence
from ._state import DecodeState
from ._steps import join_caches, split_caches


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

    **Raises:** as `decode_step`.

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
    batch = check_state(state).length.shape[0]
    tokens = check_tokens("tokens", model, tokens)
    if tokens.shape[0] != batch:
        raise ValueError(
            f"`tokens` must have one row per sequence, {batch}, got shape {tokens.shape}."
        )
    lengths = jnp.full(batch, tokens.shape[1]) if lengths is None else lengths
    lengths = per_sequence("lengths", lengths, batch, jnp.integer).astype(jnp.int32)
    rest, caches = split_caches(state)
    return _donating_pass((model, rest, tokens, lengths), caches)


def rewind(
    state: DecodeState, lengths: Sequences, logits: Float[Array, "batch vocab"]
) -> DecodeState:
    """Removes the last tokens of each sequence, such as drafted ones that were rejected.

    **Arguments:**

    - `state`: its arrays are **donated**.
    - `lengths`: `[batch]`, how many tokens each sequence keeps, at most those that it has.
    - `logits`: `[batch, vocab]`, of the token after the last one that is kept.

    **Raises:** `ValueError` for a state that was donated before, or shapes of another batch.
    """
    batch = check_state(state).length.shape[0]
    lengths = per_sequence("lengths", lengths, batch, jnp.integer).astype(jnp.int32)
    if logits.shape != state.logits.shape:
        raise ValueError(
            f"`logits` must be those of one token per sequence, {state.logits.shape}, got "
            f"{logits.shape}."
        )
    return _rewind(logits, lengths, state)


@eqx.filter_jit(donate="all-except-first")
def _donating_pass(kept: tuple[Any, ...], caches: Any) -> tuple[Array, DecodeState, Routings]:
    model, rest, tokens, lengths = kept
    state = join_caches(rest, caches)
    hidden, state, routings = advance_hidden(model, state, tokens, lengths)
    logits = model.unembed(hidden)
    return logits, with_logits(state, last_token(logits, lengths), lengths), routings


@eqx.filter_jit(donate="all-except-first")
def _rewind(logits: Array, lengths: Sequences, state: DecodeState) -> DecodeState:
    lengths = jnp.minimum(lengths, state.length)
    caches = map_caches(lambda cache: cache.rewind(lengths), state.caches)
    return DecodeState(logits, lengths, state.max_tokens, state.structure, caches)
