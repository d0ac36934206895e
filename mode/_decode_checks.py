"""What decoding refuses, in words that say what to do."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Int

from ._cache import Decoding
from ._decoder import Transformer
from ._select import AbstractTokenwise
from ._state import routers


def check_model(model: object) -> None:
    """Refuse what is no model."""
    if not isinstance(model, Transformer):
        raise ValueError(
            f"`model` must be a `Transformer`, got {type(model).__name__}. "
            "`mode.Transformer(vocab, dim, layers, key=key)` makes one of layers."
        )


def check_decodes(model: Transformer) -> None:
    """Refuse a model whose routers look at more than a token and its past."""
    for router in routers(model):
        if router.select.looks_ahead:
            raise ValueError(
                "`model` must decide token by token, but it has a router with "
                f"`{type(router.select).__name__}`, which looks at later tokens. Decode "
                "`mode.causal(model)`."
            )
        if not isinstance(router.select, AbstractTokenwise):
            raise ValueError(
                "`model` must decide token by token, but it has a router with "
                f"`{type(router.select).__name__}`, which assigns whole sequences. Put a "
                "`Threshold` in its place by `mode.map_routers`."
            )


def check_alive(decoding: object) -> None:
    """Refuse what is no decoding, and one whose arrays an earlier call was given."""
    if not isinstance(decoding, Decoding):
        raise ValueError(
            f"`decoding` must be a `Decoding`, as `prefill` returns it, got "
            f"{type(decoding).__name__}."
        )
    leaves = jax.tree.leaves(decoding)
    if any(not isinstance(leaf, Tracer) and leaf.is_deleted() for leaf in (leaves[0], leaves[-1])):
        raise ValueError(
            "`decoding` was given to an earlier `step` or `sample`, which wrote on in its caches "
            "(they are donated). Go on from what that call returned."
        )


def check_decoding(decoding: Decoding, like: Any) -> None:
    """Refuse a decoding that another model made: `like` has the shapes of this one's."""
    needed, got = (
        {jax.tree_util.keystr(path): leaf.shape for path, leaf in jax.tree.leaves_with_path(tree)}
        for tree in (like, decoding)
    )
    for path in needed | got:
        if needed.get(path) != got.get(path):
            raise ValueError(
                "`decoding` must have been made by `prefill` with the same model: expected "
                f"`decoding{path}` of shape {needed.get(path)}, got {got.get(path)}. A model under "
                "another `limit`, or `unrolled`, has other caches."
            )


def check_prompt(
    name: str, model: Transformer, tokens: Any, lengths: Any, max_tokens: int
) -> tuple[Int[Array, "batch tokens"], Int[Array, " batch"]]:
    """Prompts and their lengths as arrays, or what is wrong with them."""
    tokens = jnp.asarray(tokens)
    if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(
            f"`{name}` must be integers, [batch, tokens], got shape {tokens.shape} and dtype "
            f"{tokens.dtype}. One prompt is a batch of one: `{name}[None]`."
        )
    if 0 in tokens.shape:
        raise ValueError(
            f"`{name}` must hold at least one token of one member, got shape {tokens.shape}. Start "
            "an empty prompt with a token that begins documents."
        )
    batch, longest = tokens.shape
    if longest > max_tokens:
        raise ValueError(
            f"`{name}` must fit into the cache of max_tokens={max_tokens}, got prompts of "
            f"{longest} tokens. Raise `max_tokens`, or cut the prompts."
        )
    lengths = jnp.full(batch, longest) if lengths is None else lengths
    lengths = per_member("lengths", lengths, batch, jnp.integer).astype(jnp.int32)
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


def per_member(name: str, values: Any, batch: int, kind: Any) -> Array:
    """One value per member as an array, or what is wrong with it."""
    values = jnp.asarray(values)
    fits = values.dtype == kind if kind is jnp.bool_ else jnp.issubdtype(values.dtype, kind)
    if values.shape != (batch,) or not fits:
        raise ValueError(
            f"`{name}` must hold one {'flag' if kind is jnp.bool_ else 'integer'} per member, "
            f"{(batch,)}, got shape {values.shape} and dtype {values.dtype}."
        )
    return values
