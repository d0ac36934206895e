"""Text from a model: a batch of prompts in, tokens out, one program for all steps."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Bool, Int, Shaped

from ._cache import Decoding
from ._capacity import check_count
from ._decode import advance, read
from ._decode_checks import check_alive, check_model, check_prompt
from ._decoder import Transformer
from ._sample import Sampler


class Generation(eqx.Module):
    """What `generate` or `sample` made.

    **Attributes:**

    - `tokens`: `[batch, steps]`; behind a member's stop token, that token again.
    - `lengths`: `[batch]`, new tokens of each member, its stop token included.
    - `done`: `[batch]`, whether a member came to its stop token.
    - `decoding`: where the batch stands, to `sample` on from; `entered` reads from it what was
        computed.
    """

    tokens: Int[Array, "batch steps"]
    lengths: Int[Array, " batch"]
    done: Bool[Array, " batch"]
    decoding: Decoding


def generate(
    model: Transformer,
    prompts: Int[Array, "batch tokens"],
    lengths: Int[Array, " batch"] | None = None,
    *,
    steps: int,
    sampler: Sampler = Sampler(temperature=0),
    keys: Shaped[Array, "batch ..."] | None = None,
    stop: int | None = None,
    max_tokens: int | None = None,
) -> Generation:
    """Continue each prompt of a batch by up to `steps` tokens.

    A member's text depends on its prompt and key alone: not on its batch mates, nor on what the
    shorter prompts are padded with. (Where a layer has fewer slots than there are tokens, under a
    `limit` below 1 or `TokenChoice`, they are a share of `max_tokens`: give the same to compare.)

    **Arguments:**

    - `model`: a model that decides token by token, `causal(model)`; `unrolled(causal(model))`
        decodes fastest.
    - `prompts`, `lengths`: as `prefill` takes them.
    - `steps`: new tokens of each member, at least 1.
    - `sampler`: draws a token from logits; by default the likeliest.
    - `keys`: `[batch]`, one key per member, such as `jax.random.split(key, batch)`; may be left out
        at temperature 0.
    - `stop`: a token after which a member is finished; when all are, so is the program.
    - `max_tokens`: size of the caches; by default what the longest prompt and `steps` need.

    **Raises:** `ValueError` for steps below 1, prompts and steps that do not fit `max_tokens`, keys
    that are missing or not one per member, a stop token outside the vocabulary; and as `prefill`.

    >>> import jax, jax.numpy as jnp, mode
    >>> model = mode.causal(mode.mod_decoder(256, 32, depth=4, num_heads=2, key=jax.random.key(0)))
    >>> prompts = jnp.array([[1, 2, 3], [4, 5, 0]])
    >>> made = mode.generate(model, prompts, jnp.array([3, 2]), steps=4)
    >>> made.tokens.shape, made.lengths.tolist(), made.decoding.length.tolist()
    ((2, 4), [4, 4], [7, 6])
    """
    check_model(model)
    steps = check_count("steps", steps, 1)
    needed = jnp.shape(prompts)[-1] + steps if jnp.ndim(prompts) else steps
    max_tokens = needed if max_tokens is None else check_count("max_tokens", max_tokens, 1)
    prompts, lengths = check_prompt("prompts", model, prompts, lengths, max_tokens)
    if needed > max_tokens:
        raise ValueError(
            f"`steps` and `prompts` must fit into max_tokens={max_tokens}, got {steps} steps after "
            f"{prompts.shape[-1]} tokens. Raise `max_tokens`, or ask for fewer steps."
        )
    stop = _check_sampling(model, prompts.shape[0], sampler, keys, stop)
    decoding = read(model, prompts, lengths, max_tokens)
    return sample(model, decoding, steps=steps, sampler=sampler, keys=keys, stop=stop)


def sample(
    model: Transformer,
    decoding: Decoding | Generation,
    *,
    steps: int,
    sampler: Sampler = Sampler(temperature=0),
    keys: Shaped[Array, "batch ..."] | None = None,
    stop: int | None = None,
) -> Generation:
    """Continue a batch from where it stands by up to `steps` tokens: `generate` in pieces, for text
    that is shown as it comes. A draw is keyed by its place in the text: pieces of any size give the
    same text.

    **Arguments:**

    - `model`: the one that `decoding` was made with.
    - `decoding`: of `prefill` or `step`; or an earlier `Generation`, whose members that came to
        their stop token are done. Its arrays are **donated**: go on from the result.
    - `steps`, `sampler`, `keys`, `stop`: as `generate` takes them.

    **Raises:** `ValueError` as `generate`, for a `decoding` of another model, one that was donated
    before, or one that has no room for `steps` tokens more.

    >>> import jax, jax.numpy as jnp, mode
    >>> model = mode.causal(mode.mod_decoder(256, 32, depth=4, num_heads=2, key=jax.random.key(0)))
    >>> made = mode.prefill(model, jnp.array([[1, 2, 3]]), max_tokens=16)
    >>> for piece in range(3):
    ...     made = mode.sample(model, made, steps=4)
    >>> made.decoding.length.tolist()
    [15]
    """
    check_model(model)
    steps = check_count("steps", steps, 1)
    done = None
    if isinstance(decoding, Generation):
        decoding, done = decoding.decoding, decoding.done
    check_alive(decoding)
    batch = decoding.length.shape[0]
    stop = _check_sampling(model, batch, sampler, keys, stop)
    if done is None:
        # Nobody yet. Of `length`, to lie where it does: elsewhere the next piece would be another
        # program.
        done = decoding.length < 0
    if not isinstance(decoding.length, Tracer):
        longest = int(jnp.max(jnp.where(done, 0, decoding.length)))
        if longest + steps > decoding.max_tokens:
            raise ValueError(
                f"`steps` must fit into max_tokens={decoding.max_tokens}, got {steps} steps after "
                f"{longest} tokens. Prefill with a larger `max_tokens`, or take fewer steps."
            )
    # What is to be kept comes first: the rest, the decoding, is donated.
    return _sample((model, sampler, keys, stop, steps, done), decoding)


@eqx.filter_jit(donate="all-except-first")
def _sample(kept: tuple[Any, ...], decoding: Decoding) -> Generation:
    model, sampler, keys, stop, steps, done = kept
    start = decoding.length

    def draw(decoding: Decoding) -> Int[Array, " batch"]:
        if keys is None:
            return jax.vmap(sampler)(decoding.logits).astype(jnp.int32)
        # By the place in the text: the same draws however the steps are split over calls.
        now = jax.vmap(jax.random.fold_in)(keys, decoding.length)
        return jax.vmap(sampler)(decoding.logits, now).astype(jnp.int32)

    def one(
        carry: tuple[Int[Array, ""], Decoding, Bool[Array, " batch"], Int[Array, "batch steps"]],
    ) -> tuple[Int[Array, ""], Decoding, Bool[Array, " batch"], Int[Array, "batch steps"]]:
        place, decoding, done, tokens = carry
        token = draw(decoding)
        if stop is not None:
            token = jnp.where(done, stop, token)
        decoding = advance(model, decoding, token, ~done)
        if stop is not None:
            done = done | (token == stop)
        return place + 1, decoding, done, tokens.at[:, place].set(token)

    tokens = jnp.full((*start.shape, steps), 0 if stop is None else stop, jnp.int32)
    carry = (jnp.zeros((), jnp.int32), decoding, done, tokens)
    _, decoding, done, tokens = jax.lax.while_loop(
        lambda carry: (carry[0] < steps) & ~jnp.all(carry[2]), one, carry
    )
    return Generation(tokens, decoding.length - start, done, decoding)


def _check_sampling(
    model: Transformer,
    batch: int,
    sampler: Sampler,
    keys: Shaped[Array, "batch ..."] | None,
    stop: int | None,
) -> int | None:
    vocab = model.embedding.shape[0]
    if stop is not None:
        stop = check_count("stop", stop, 0)
        if stop >= vocab:
            raise ValueError(f"`stop` must be a token id from 0 to {vocab - 1}, got {stop}.")
    if not isinstance(sampler, Sampler):
        raise ValueError(f"`sampler` must be a `Sampler`, got {type(sampler).__name__}.")
    if sampler.temperature > 0 or keys is not None:
        _check_keys(keys, batch)
    return stop


def _check_keys(keys: object, batch: int) -> None:
    shape, dtype = getattr(keys, "shape", None), getattr(keys, "dtype", None)
    typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
    # Old-style keys are rows of numbers.
    if shape is None or len(shape) != (1 if typed else 2) or shape[0] != batch:
        raise ValueError(
            f"`keys` must hold one key per member, {batch} of them, where the temperature is above "
            f"0, got {type(keys).__name__ if shape is None else f'an array of shape {shape}'}. "
            "`jax.random.split(key, batch)` makes them."
        )
