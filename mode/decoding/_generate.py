"""Generation: a batch of prompts in, tokens out, one program for all steps."""

from collections.abc import Iterator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Int, Shaped

from .._checks import check_count, is_known
from .._types import Sequences
from ..models import Transformer
from ..nn import Routings
from ._checks import check_model, check_prompt, check_state
from ._sampler import Sampler
from ._state import DecodeState, NewTokens, advance
from ._steps import prefill


RandomKeys = Shaped[Array, "batch ..."]


class Generation(eqx.Module):
    """The result of `generate` and `continue_generation`.

    **Attributes:**

    - `tokens`: `[batch, steps]`; positions after a sequence's stop token are filled with it.
    - `lengths`: `[batch]`, new tokens of each sequence, its stop token included.
    - `done`: `[batch]`, whether a sequence came to its stop token.
    - `state`: to go on from with `continue_generation`.
    - `routings`: of the new tokens, one per router, with a leading axis of steps. A sequence that
        is done counts as padding. `routing_metrics` gives their statistics.
    """

    tokens: Int[Array, "batch steps"]
    lengths: Sequences
    done: Bool[Array, " batch"]
    state: DecodeState
    routings: Routings


def generate(
    model: Transformer,
    prompts: NewTokens,
    lengths: Sequences | None = None,
    *,
    steps: int,
    sampler: Sampler = Sampler(temperature=0),
    keys: RandomKeys | None = None,
    stop_token: int | None = None,
    max_tokens: int | None = None,
    chunk: int | None = None,
    cache_dtype: DTypeLike | None = None,
) -> Generation:
    """Continues each prompt of a batch by up to `steps` tokens.

    The text of a sequence depends on its prompt and key alone: neither on the other sequences, nor
    on the padding of the shorter prompts. (Under a `max_capacity` below 1 or `TokenChoice`, slots
    are a fraction of `max_tokens`: give the same to compare.)

    **Arguments:**

    - `model`, `prompts`, `lengths`: as `prefill` takes them; `unstack_layers(make_causal(model))`
        decodes fastest.
    - `steps`: new tokens of each sequence, at least 1.
    - `sampler`: draws a token from logits; by default the likeliest.
    - `keys`: one per sequence, such as `jax.random.split(key, batch)`; not needed at temperature 0.
    - `stop_token`: a token after which a sequence is done; when all are, so is the program.
    - `max_tokens`: size of the caches; by default what the longest prompt and `steps` need.
    - `chunk`, `cache_dtype`: as `prefill` takes them.

    **Raises:** `ValueError` for steps below 1, prompts and steps that do not fit `max_tokens`, keys
    that are missing or not one per sequence, a stop token outside the vocabulary; and as `prefill`.
    `FloatingPointError` where logits are not finite; inside a larger program, which cannot raise,
    such tokens are -1.

    >>> import jax, jax.numpy as jnp, mode
    >>> model = mode.mod_transformer(256, 32, depth=4, num_heads=2, key=jax.random.key(0))
    >>> model = mode.make_causal(model)
    >>> prompts = jnp.array([[1, 2, 3], [4, 5, 0]])
    >>> generation = mode.generate(model, prompts, jnp.array([3, 2]), steps=4)
    >>> generation.tokens.shape, generation.lengths.tolist(), generation.state.length.tolist()
    ((2, 4), [4, 4], [7, 6])
    >>> mode.routing_metrics(generation.routings[0]).drop_rate.item()
    0.0
    """
    steps = check_count("steps", steps, 1)
    state, stop_token = _begin(
        model,
        prompts,
        lengths,
        steps,
        sampler,
        keys,
        stop_token,
        max_tokens=max_tokens,
        chunk=chunk,
        cache_dtype=cache_dtype,
    )
    return continue_generation(
        model, state, steps=steps, sampler=sampler, keys=keys, stop_token=stop_token
    )


def stream(
    model: Transformer,
    prompts: NewTokens,
    lengths: Sequences | None = None,
    *,
    steps: int,
    every: int = 1,
    sampler: Sampler = Sampler(temperature=0),
    keys: RandomKeys | None = None,
    stop_token: int | None = None,
    max_tokens: int | None = None,
    chunk: int | None = None,
    cache_dtype: DTypeLike | None = None,
) -> Iterator[Int[Array, "batch every"]]:
    """Yields the tokens of `generate` as they come, and ends when all sequences are done.

    **Arguments:**

    - `every`: tokens of each sequence in a piece. More take less time in all, and come later.
    - all others: as `generate` takes them; the text is the same.

    **Yields:** `[batch, every]`, fewer in the last piece. A sequence that is done repeats its stop
    token.

    **Raises:** as `generate`, at the call, before the first piece.

    >>> import jax, jax.numpy as jnp, mode
    >>> model = mode.mod_transformer(256, 32, depth=4, num_heads=2, key=jax.random.key(0))
    >>> pieces = mode.stream(mode.make_causal(model), jnp.array([[1, 2, 3]]), steps=4)
    >>> [piece.shape for piece in pieces]
    [(1, 1), (1, 1), (1, 1), (1, 1)]
    """
    steps, every = check_count("steps", steps, 1), check_count("every", every, 1)
    state, stop_token = _begin(
        model,
        prompts,
        lengths,
        steps,
        sampler,
        keys,
        stop_token,
        max_tokens=max_tokens,
        chunk=chunk,
        cache_dtype=cache_dtype,
    )

    def pieces(state: DecodeState | Generation) -> Iterator[Array]:
        for start in range(0, steps, every):
            state = continue_generation(
                model,
                state,
                steps=min(every, steps - start),
                sampler=sampler,
                keys=keys,
                stop_token=stop_token,
            )
            yield state.tokens
            if stop_token is not None and bool(jnp.all(state.done)):
                return

    return pieces(state)


def _begin(
    model: Transformer,
    prompts: NewTokens,
    lengths: Sequences | None,
    steps: int,
    sampler: Sampler,
    keys: RandomKeys | None,
    stop_token: int | None,
    *,
    max_tokens: int | None,
    **options: Any,
) -> tuple[DecodeState, int | None]:
    """Checks the arguments of `generate` and reads the prompts. Returns the stop token checked."""
    check_model(model)
    prompts, lengths = check_prompt("prompts", model, prompts, lengths)
    batch, longest = prompts.shape
    needed = longest + steps
    max_tokens = needed if max_tokens is None else check_count("max_tokens", max_tokens, 1)
    if needed > max_tokens:
        raise ValueError(
            f"`steps` and `prompts` must fit into max_tokens={max_tokens}, got {steps} steps after "
            f"{longest} tokens. Raise `max_tokens`, ask for fewer steps, or cut the prompts."
        )
    stop_token = _check_sampling(model, batch, sampler, keys, stop_token)
    state, _ = prefill(model, prompts, lengths, max_tokens=max_tokens, **options)
    return state, stop_token


def continue_generation(
    model: Transformer,
    state: DecodeState | Generation,
    *,
    steps: int,
    sampler: Sampler = Sampler(temperature=0),
    keys: RandomKeys | None = None,
    stop_token: int | None = None,
) -> Generation:
    """Continues a batch from its state by up to `steps` tokens.

    `generate` in pieces, for text that is shown as it comes. A draw is keyed by the position in the
    text: pieces of any size give the same text.

    **Arguments:**

    - `model`: the one that `state` was made with.
    - `state`: of `prefill` or `decode_step`; or an earlier `Generation`, whose sequences that came
        to their stop token are done. Its arrays are **donated**: go on from the result.
    - `steps`, `sampler`, `keys`, `stop_token`: as `generate` takes them.

    **Raises:** as `generate`; `ValueError` for a `state` of another model, one that was donated
    before, or one that has no room for `steps` tokens more.

    >>> import jax, jax.numpy as jnp, mode
    >>> model = mode.mod_transformer(256, 32, depth=4, num_heads=2, key=jax.random.key(0))
    >>> model = mode.make_causal(model)
    >>> generation, _ = mode.prefill(model, jnp.array([[1, 2, 3]]), max_tokens=16)
    >>> for piece in range(3):
    ...     generation = mode.continue_generation(model, generation, steps=4)
    >>> generation.state.length.tolist()
    [15]
    """
    check_model(model)
    steps = check_count("steps", steps, 1)
    state, done = (state.state, state.done) if isinstance(state, Generation) else (state, None)
    stop_token = _check_sampling(model, check_state(state), sampler, keys, stop_token)
    # Made of `length`, to lie where it does: elsewhere the next piece would be another program.
    done = state.length < 0 if done is None else done
    if not isinstance(state.length, Tracer):
        longest = int(jnp.max(jnp.where(done, 0, state.length)))
        if longest + steps > state.max_tokens:
            raise ValueError(
                f"`steps` must fit into max_tokens={state.max_tokens}, got {steps} steps after "
                f"{longest} tokens. Prefill with a larger `max_tokens`, or ask for fewer steps."
            )
    # What is kept comes first: the rest, the state, is donated.
    generation = _generate((model, sampler, keys, stop_token, steps, done), state)
    if is_known(generation.tokens):
        _check_drawn(generation)
    return generation


@eqx.filter_jit(donate="all-except-first")
def _generate(kept: tuple[Any, ...], state: DecodeState) -> Generation:
    model, sampler, keys, stop_token, steps, done = kept
    start = state.length

    def one(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        step, state, done, tokens, routings = carry
        # By the position in the text: the same draws however the steps are split over calls.
        step_keys = None if keys is None else jax.vmap(jax.random.fold_in)(keys, state.length)
        token = jax.vmap(sampler)(state.logits, step_keys).astype(jnp.int32)
        if stop_token is not None:
            token = jnp.where(done, stop_token, token)
        state, routed = advance(model, state, token[:, None], (~done).astype(jnp.int32))
        if stop_token is not None:
            done = done | (token == stop_token)
        routings = jax.tree.map(lambda all, new: all.at[step].set(new), routings, routed)
        return step + 1, state, done, tokens.at[:, step].set(token), routings

    # Of steps that never run, because all sequences are done: groups of padding.
    like = jax.eval_shape(lambda: advance(model, state, start[:, None], start)[1])
    routings = jax.tree.map(lambda leaf: jnp.zeros((steps, *leaf.shape), leaf.dtype), like)
    routings = tuple(routing.masked(jnp.zeros_like(routing.valid[..., 0])) for routing in routings)
    tokens = jnp.full((*start.shape, steps), 0 if stop_token is None else stop_token, jnp.int32)
    carry = (jnp.zeros((), jnp.int32), state, done, tokens, routings)
    _, state, done, tokens, routings = jax.lax.while_loop(
        lambda carry: (carry[0] < steps) & ~jnp.all(carry[2]), one, carry
    )
    return Generation(tokens, state.length - start, done, state, routings)


def _check_drawn(generation: Generation) -> None:
    tokens = np.asarray(generation.tokens)
    if (tokens < 0).any():
        row, step = np.argwhere(tokens < 0)[0]
        raise FloatingPointError(
            f"the logits of sequence {row} are not finite at new token {step}: NaN, or an overflow "
            "of a narrow dtype. Prefill again with a model whose parameters and activations are "
            "finite."
        )


def _check_sampling(
    model: Transformer, batch: int, sampler: Sampler, keys: Any, stop_token: int | None
) -> int | None:
    vocab = model.embedding.shape[0]
    if stop_token is not None:
        stop_token = check_count("stop_token", stop_token, 0)
        if stop_token >= vocab:
            raise ValueError(
                f"`stop_token` must be a token id from 0 to {vocab - 1}, got {stop_token}."
            )
    if not isinstance(sampler, Sampler):
        raise ValueError(f"`sampler` must be a `Sampler`, got {type(sampler).__name__}.")
    if sampler.temperature is None and keys is None:
        return stop_token
    shape, dtype = getattr(keys, "shape", None), getattr(keys, "dtype", None)
    typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
    # Old-style keys are rows of numbers.
    if shape is None or len(shape) != (1 if typed else 2) or shape[0] != batch:
        raise ValueError(
            f"`keys` must hold one key per sequence, {batch} of them, where the temperature is "
            f"above 0, got {type(keys).__name__ if shape is None else f'an array of shape {shape}'}"
            ". `jax.random.split(key, batch)` makes them."
        )
    return stop_token
