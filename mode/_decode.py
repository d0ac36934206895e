"""Decoding with caches: the causal model, one token at a time, for a batch.

A member of the batch is computed by the blocks its token wants and by no others; who else wants a
block changes how many slots run, never whether or with what result a member is computed. So
decoding token by token gives the logits of the teacher-forced forward of the same model on
sequences of `max_tokens`, padded at the end.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from ._cache import Added, Cache, Caches, Decoding, Past, extend_block
from ._capacity import check_count
from ._decode_checks import (
    check_alive,
    check_decodes,
    check_decoding,
    check_model,
    check_prompt,
    per_member,
)
from ._decoder import Stack, Transformer
from ._info import TokenInfo
from ._sharding import along_batch, gathered


def prefill(
    model: Transformer,
    tokens: Int[Array, "batch tokens"],
    lengths: Int[Array, " batch"] | None = None,
    *,
    max_tokens: int,
) -> Decoding:
    """Read the prompts of a batch.

    **Arguments:**

    - `model`: a model that decides token by token: `causal(model)`.
    - `tokens`: `[batch, tokens]`, prompts, padded at the end by anything.
    - `lengths`: `[batch]`, tokens of each prompt, at least 1; by default all are whole.
    - `max_tokens`: tokens of a member in all, prompt included: the size of the caches. A routed
        layer's has `token_capacity(max_tokens, limit)` slots, of the `limit` given to `causal`.

    **Returns:** a `Decoding`, with the logits of the first token after each prompt.

    **Raises:** `ValueError` for a model whose selectors look ahead, or with a block that has no
    `extend`; for an empty prompt, one longer than `max_tokens`, or ids outside the vocabulary.

    >>> import jax, jax.numpy as jnp, mode
    >>> model = mode.causal(mode.mod_decoder(256, 32, depth=4, num_heads=2, key=jax.random.key(0)))
    >>> decoding = mode.prefill(model, jnp.zeros((2, 8), int), max_tokens=32)
    >>> decoding = mode.step(model, decoding, jnp.argmax(decoding.logits, axis=-1))
    >>> decoding.length.tolist()
    [9, 9]
    """
    check_model(model)
    max_tokens = check_count("max_tokens", max_tokens, 1)
    tokens, lengths = check_prompt("tokens", model, tokens, lengths, max_tokens)
    return read(model, tokens, lengths, max_tokens)


def _read(
    model: Transformer,
    tokens: Int[Array, "batch tokens"],
    lengths: Int[Array, " batch"],
    max_tokens: int,
) -> Decoding:
    check_decodes(model)
    place = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    info = TokenInfo(place, (place < lengths[:, None]).astype(jnp.int32))
    x = model.embed(jnp.where(info.valid, tokens, 0))
    caches = []
    for stack in model.stacks:
        slots = [layer.slots(max_tokens) for layer in _layers(stack)]
        x, added = _extend(stack, x, info, tuple(map(Past.nothing, slots)))
        caches.append(tuple(map(Cache.of, added, slots)))
    last = jnp.take_along_axis(x, lengths[:, None, None] - 1, axis=1)[:, 0]
    return Decoding(model.unembed(last), lengths, tuple(caches), max_tokens)


# `prefill` of arguments that were checked.
read = eqx.filter_jit(_read)


def step(
    model: Transformer,
    decoding: Decoding,
    tokens: Int[Array, " batch"],
    active: Bool[Array, " batch"] | None = None,
) -> Decoding:
    """Append one token to each member. Compiled once for all steps.

    **Arguments:**

    - `model`: the one that `decoding` was made with.
    - `decoding`: its caches are **donated**: they become the result's, and it is not to be stepped
        from again.
    - `tokens`: `[batch]`, ids below the vocabulary's.
    - `active`: `[batch]`; a member for which it is false stays where it is.

    **Raises:** `ValueError` for another number of tokens than members, a `decoding` of another
    model, or one that was donated before; `equinox.EquinoxRuntimeError` when run for a member that
    already has `max_tokens` tokens. A token that is no id makes its member NaN from there on.
    """
    check_model(model)
    check_alive(decoding)
    batch = decoding.length.shape[0]
    tokens = per_member("tokens", tokens, batch, jnp.integer)
    active = jnp.ones(batch, bool) if active is None else active
    active = per_member("active", active, batch, jnp.bool_)
    kept = (model, decoding.logits, decoding.length, tokens, active, decoding.max_tokens)
    return _step(kept, decoding.caches)


@eqx.filter_jit(donate="all-except-first")
def _step(kept: tuple[Any, ...], caches: Caches) -> Decoding:
    model, logits, length, tokens, active, max_tokens = kept
    return advance(model, Decoding(logits, length, caches, max_tokens), tokens, active)


def advance(
    model: Transformer,
    decoding: Decoding,
    tokens: Int[Array, " batch"],
    active: Bool[Array, " batch"],
) -> Decoding:
    """`step`, to be compiled into a larger program. What it refuses it refuses when traced."""
    check_decodes(model)
    like = eqx.filter_eval_shape(_read, model, tokens[:, None], tokens, decoding.max_tokens)
    check_decoding(decoding, like)
    length = eqx.error_if(
        decoding.length,
        active & (decoding.length >= decoding.max_tokens),
        f"a member is full: it has max_tokens={decoding.max_tokens} tokens. Prefill with a larger "
        "`max_tokens`, or leave the member out by `active`.",
    )
    info = TokenInfo(length[:, None], active[:, None].astype(jnp.int32))
    x = model.embed(jnp.where(active, tokens, 0)[:, None])
    caches = []
    for stack, old in zip(model.stacks, decoding.caches, strict=True):
        # Caches enter the layers to be read; what a token leaves behind is written out here, once
        # for all layers of a stack.
        x, added = _extend(stack, x, info, tuple(cache.past for cache in old))
        caches.append(tuple(cache.append(new, x) for cache, new in zip(old, added, strict=True)))
    logits = jnp.where(active[:, None], model.unembed(x[:, 0]), decoding.logits)
    length = length + active.astype(jnp.int32)
    return Decoding(logits, length, tuple(caches), decoding.max_tokens)


def unrolled(model: Transformer) -> Transformer:
    """The same model, every layer by itself: the form that decodes fast.

    A scan slices each layer's parameters and caches out of the stacked ones, which at one token per
    step costs more than the layer. Compiling takes longer in proportion to the depth.
    """

    def taken_apart(stack: Stack) -> list[Stack]:
        arrays, rest = eqx.partition(stack.layers, eqx.is_array)
        one = [jax.tree.map(lambda a, r=r: a[r : r + 1], arrays) for r in range(stack.repeats)]
        return [Stack(eqx.combine(part, rest), 1, stack.remat) for part in one]

    stacks = tuple(part for stack in model.stacks for part in taken_apart(stack))
    return eqx.tree_at(lambda m: m.stacks, model, stacks)


def _layers(stack: Stack) -> PyTree:
    for layer in stack.layers:
        if not (hasattr(layer, "slots") and hasattr(layer, "extend")):
            raise ValueError(
                "`model` must be able to decode, but its layer "
                f"`{type(layer).__name__}` has no methods `slots` and `extend`. Build it from "
                "`Residual` and `MixtureOfDepths`, around blocks of your own."
            )
    return stack.layers


def _extend(
    stack: Stack, x: Float[Array, "batch new dim"], info: TokenInfo, pasts: tuple[Past, ...]
) -> tuple[Float[Array, "batch new dim"], tuple[Added, ...]]:
    """All layers of a stack in turn; what each of them adds has an axis of repeats first."""
    arrays, rest = eqx.partition(_layers(stack), eqx.is_array)

    def repeat(
        x: Float[Array, "batch new dim"], one: tuple[PyTree, tuple[Past, ...]]
    ) -> tuple[Float[Array, "batch new dim"], tuple[Added, ...]]:
        arrays, pasts = one
        gained = []
        for layer, past in zip(eqx.combine(gathered(arrays), rest), pasts, strict=True):
            x, added = extend_block(layer, x, info, past)
            gained.append(added)
        return along_batch(x), tuple(gained)

    return jax.lax.scan(repeat, x, (arrays, pasts), length=stack.repeats, unroll=stack.repeats == 1)
