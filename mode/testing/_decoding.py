"""Asserts that decoding gives what the forward pass gives."""

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from .._checks import type_name
from .._types import Sequences
from ..decoding import decode_step, decode_tokens, prefill
from ..models import Transformer
from ._case import Case


Tokens = Int[Array, "batch tokens"]


def assert_decodes(
    model: Transformer,
    tokens: Tokens,
    lengths: Sequences | None = None,
    *,
    tolerance: float | None = None,
) -> None:
    """Asserts that decoding gives the logits of the causal forward pass.

    Every layer and every `extend` in the model is checked in three ways: on prompts of different
    lengths, on one token after another, and on all later tokens at once.

    **Arguments:**

    - `model`: a `Transformer` that routes token by token: `make_causal(model)`.
    - `tokens`: `[batch, tokens]`, token ids, at least 2 in a sequence.
    - `lengths`: `[batch]`, those of the prompts, at least 1; by default different ones up to half.
    - `tolerance`: of the logits, relative to the largest; by default 1e-4, or 0.1 for a model with
        narrower dtypes than float32, whose rounding may turn a router's choice between two equals.
    """
    lengths = _checked_lengths(model, tokens, lengths)
    total, longest = tokens.shape[1], int(lengths.max())
    expected = np.asarray(Case(model, tokens, None, None).run()[0])
    if np.isnan(expected).any():
        raise AssertionError(
            "the forward pass gave NaN. Check that every token id is below the vocabulary."
        )
    if tolerance is None:
        tolerance = 1e-4 if jnp.finfo(model.dtype).bits >= 32 else 0.1
    bound = tolerance * float(np.abs(expected).max())

    def check(logits: Float[Array, "batch new vocab"], places: np.ndarray, after: str) -> None:
        difference = np.asarray(logits) - np.take_along_axis(expected, places[..., None], 1)
        largest = np.abs(difference).max(axis=(1, 2))
        row = int(np.argmax(largest))
        if not largest[row] <= bound:
            raise AssertionError(
                f"after {after}, the logits of sequence {row} differ by {largest[row]:.3g} from "
                "those of the forward pass. A block's `extend` must give the same update with the "
                "earlier tokens in the cache as with all tokens at once; a selector must select "
                "the same tokens, for which `inputs.positions` say where they stand: it sees the "
                "new ones alone."
            )

    last = np.asarray(lengths)[:, None] - 1
    later = last + np.arange(1, total - longest + 1)
    new = jnp.take_along_axis(tokens, jnp.asarray(later), 1)
    # Twice, because a step writes on in the caches of the state that it is given.
    state, prompt = (
        prefill(model, tokens[:, :longest], lengths, max_tokens=total)[0] for _ in range(2)
    )
    check(state.logits[:, None], last, "the prompt")
    for step in range(1, total - longest + 1):
        state, _ = decode_step(model, state, new[:, step - 1])
        check(state.logits[:, None], last + step, f"step {step} of `decode_step`")
    if total > longest:
        logits, _, _ = decode_tokens(model, prompt, new)
        check(logits, later, f"{total - longest} tokens at once by `decode_tokens`")


def _checked_lengths(model: Transformer, tokens: Tokens, lengths: Sequences | None) -> Sequences:
    """Checks all arguments and returns the lengths of the prompts."""
    if not isinstance(model, Transformer):
        raise ValueError(
            f"`model` must be a `Transformer`, which decodes, got {type_name(model)}. Build a "
            "`Transformer` of your layers; a position embedding of your own may be its first layer."
        )
    integers = eqx.is_array(tokens) and jnp.issubdtype(tokens.dtype, jnp.integer)
    if not integers or tokens.ndim != 2 or tokens.shape[1] < 2:
        raise ValueError(
            "`tokens` must be token ids with the axes [batch, tokens], at least 2 in a sequence, "
            f"got {getattr(tokens, 'dtype', type_name(tokens))} of shape "
            f"{getattr(tokens, 'shape', ())}."
        )
    batch, total = tokens.shape
    if lengths is None:
        return jnp.asarray(1 + (np.arange(batch) * 5) % (total // 2), jnp.int32)
    if lengths.shape != (batch,) or int(lengths.min()) < 1 or int(lengths.max()) > total:
        raise ValueError(
            f"`lengths` must have {batch} prompts' lengths from 1 to {total}, got "
            f"{np.asarray(lengths).tolist()}."
        )
    return lengths
