"""What tokens leave behind for later ones: the contract of decoding, and the caches that keep it.

A block decodes by one method more, `extend`, which does for new tokens what `__call__` does for
whole sequences: `Past` says how. Everything else is the library's: how large a cache is, where a
token is written, which members of the batch run. A layer does the same with hidden states, and says
in `Added` which tokens it took.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from ._info import TokenInfo


class Past(eqx.Module):
    """What earlier tokens left behind in one block; nothing at first.

    A block that decodes has a method `extend(x, info, past) -> (update, left)`:

    - `x`, `info`: new tokens, `[batch, new, dim]`, in time order. With an empty past they are the
        first, of any number; after others there is one. Padding, behind the real tokens, has
        segment 0.
    - `update`: as `__call__` returns it, `[batch, new, dim]`.
    - `left`: a tree of arrays `[batch, ..., new, features]`: of the new tokens, what later ones
        need. `()` where no token looks at another.

    This one adds the mean of all tokens so far:

    >>> import equinox as eqx, jax, jax.numpy as jnp, mode
    >>> class Mean(eqx.Module):
    ...     def __call__(self, x, info, *, key=None):
    ...         return self.extend(x, info, mode.Past.nothing(0))[0], ()
    ...     def extend(self, x, info, past):
    ...         real = jnp.where(info.valid[..., None], x, 0)
    ...         total, count = jnp.cumsum(real, 1), jnp.cumsum(info.valid, 1)
    ...         if not past.is_empty:  # known when the program is traced
    ...             held = jnp.where(past.info.valid[..., None], past.left, 0)  # slots may be empty
    ...             total += held.sum(1, keepdims=True)
    ...             count += past.info.valid.sum(1, keepdims=True)
    ...         return total / jnp.maximum(count, 1).astype(x.dtype)[..., None], real
    >>> make = lambda key: mode.MixtureOfDepths(Mean(), 32, capacity=0.5, key=key)
    >>> model = mode.causal(mode.Transformer(256, 32, [make] * 2, key=jax.random.key(0)))
    >>> mode.testing.assert_decodes(model, vocab=256)

    **Attributes:**

    - `left`: the tree of arrays that the block returned, `[batch, ..., slots, features]`: of the
        tokens so far, in time order, and then of empty slots; `None` where the new tokens are the
        first.
    - `info`: positions and segments of those tokens, `[batch, slots]`, segment 0 where the slot is
        empty; `None` with `left`.
    - `slots`: how many tokens this block will hold in all, a Python integer.
    """

    left: PyTree
    info: TokenInfo | None
    slots: int = eqx.field(static=True)

    @staticmethod
    def nothing(slots: int) -> "Past":
        """Before the first token."""
        return Past(None, None, slots)

    @property
    def is_empty(self) -> bool:
        """Whether the new tokens are the first. Known when the program is traced."""
        return self.info is None

    def part(self, place: int) -> "Past":
        """The past of one of several blocks whose trees were returned as a tuple."""
        return self if self.is_empty else Past(self.left[place], self.info, self.slots)


class Added(eqx.Module):
    """What a layer adds to its cache.

    **Attributes:**

    - `left`: as the layer's block returned it.
    - `info`: of the tokens in it, `[batch, new]`; segment 0 for those that the layer did not take.
        Those it took come first.
    - `refused`: `[batch]`, tokens that asked for the block and found it full.
    """

    left: PyTree
    info: TokenInfo
    refused: Int[Array, " batch"]


class Cache(eqx.Module):
    """The tokens that one layer processed, of every member of a batch, and nothing else.

    **Attributes:**

    - `left`: what they left behind, `[*layers, batch, ..., slots, features]`.
    - `info`: their original positions, `[*layers, batch, slots]`, ascending; segment 0 where the
        slot is empty.
    - `length`: `[*layers, batch]`, how many there are.
    - `refused`: `[*layers, batch]`, tokens that asked and found the layer's slots full.
    """

    left: PyTree
    info: TokenInfo
    length: Int[Array, "*layers batch"]
    refused: Int[Array, "*layers batch"]

    @staticmethod
    def of(added: Added, slots: int) -> "Cache":
        """Room for `slots` tokens, the first of which are those of `added`."""

        def grown(leaf: Array, axis: int) -> Array:
            room = [(0, 0)] * leaf.ndim
            room[axis] = (0, slots - leaf.shape[axis])
            return jnp.pad(leaf, room)

        info = jax.tree.map(lambda leaf: grown(leaf, -1), added.info)
        left = jax.tree.map(lambda leaf: grown(leaf, -2), added.left)
        return Cache(left, info, _taken(added), added.refused)

    @property
    def slots(self) -> int:
        """Tokens that there is room for."""
        return self.info.positions.shape[-1]

    @property
    def past(self) -> Past:
        """The cache as a block sees it."""
        return Past(self.left, self.info, self.slots)

    def append(self, added: Added, after: Float[Array, "batch ..."]) -> "Cache":
        """One token more for each member that took one: a single write, in place where the cache is
        donated. A member that took none writes behind the end, which is nowhere.

        `after` is what was computed from the cache as it was: the write waits for it.
        """
        taken = added.info.valid[..., 0]
        place = jnp.where(taken, self.length, self.slots)
        # Always 0, which XLA cannot know. Its CPU backend orders a write behind a read only where
        # the one depends on the other, and would copy the cache twice a step to be safe (as that
        # of jax 0.8 does even so; those of 0.10 and 0.12 do not).
        rows = after.reshape(after.shape[0], -1)[:, 0]
        late = (jnp.isnan(rows) & (rows == 0)).astype(place.dtype)
        place += jnp.broadcast_to(late, place.shape)
        members = jnp.indices(place.shape, sparse=True)

        def write(leaf: Array, new: Array, axis: int) -> Array:
            free: list[Any] = [slice(None)] * (leaf.ndim - place.ndim)
            free[axis] = place
            # The places index one axis each and come first in the result, as in `value`.
            value = jnp.squeeze(new, axis=axis).astype(leaf.dtype)
            return leaf.at[(*members, *free)].set(value, mode="drop", unique_indices=True)

        return Cache(
            jax.tree.map(lambda leaf, new: write(leaf, new, -2), self.left, added.left),
            jax.tree.map(lambda leaf, new: write(leaf, new, -1), self.info, added.info),
            self.length + _taken(added),
            self.refused + added.refused,
        )


Caches = tuple[tuple[Cache, ...], ...]


class Decoding(eqx.Module):
    """Where a batch stands: all that the next step needs, the model apart.

    `step` and `sample` write its arrays in place (they are donated): go on from their results.

    **Attributes:**

    - `logits`: `[batch, vocab]`, of the next token of each member; float32 or wider.
    - `length`: `[batch]`, tokens of each member so far.
    - `caches`: one `Cache` per layer of each stack of the model, with an axis of repeats first.
    - `max_tokens`: how many tokens a member may have in all.
    """

    logits: Float[Array, "batch vocab"]
    length: Int[Array, " batch"]
    caches: Caches
    max_tokens: int = eqx.field(static=True)


def _taken(added: Added) -> Int[Array, "*layers batch"]:
    return jnp.sum(added.info.valid, axis=-1, dtype=jnp.int32)


def extend_block(
    block: Any, x: Float[Array, "batch new dim"], info: TokenInfo, past: Past
) -> tuple[Float[Array, "batch new dim"], PyTree]:
    """`block.extend(x, info, past)`, held to the contract.

    **Raises:** `ValueError` for a block, or a layer, that has no such method, or returns something
    else than an update and what the new tokens leave.
    """
    name = type(block).__name__
    if not hasattr(block, "extend"):
        raise ValueError(
            f"`model` must be able to decode, but `{name}` in it has no method "
            "`extend(x, info, past)`, which does for new tokens what `__call__` does for whole "
            "sequences. `help(mode.Past)` shows one."
        )
    result = block.extend(x, info, past)
    if not (isinstance(result, tuple) and len(result) == 2):
        raise ValueError(
            f"`{name}.extend` must return (update, left), with `()` for what is left where later "
            f"tokens look at nothing, got {type(result).__name__}."
        )
    update, left = result
    if getattr(update, "shape", None) != x.shape:
        raise ValueError(
            f"`{name}.extend` must return an update of the shape of `x`, {x.shape}, got "
            f"{getattr(update, 'shape', type(update).__name__)}."
        )
    if not isinstance(left, Added):
        _check_left(name, left, x.shape[:2], past)
    return result


def _check_left(name: str, left: PyTree, shape: tuple[int, ...], past: Past) -> None:
    batch, new = shape
    for leaf in jax.tree.leaves(left):
        got = getattr(leaf, "shape", ())
        if len(got) < 3 or (got[0], got[-2]) != (batch, new):
            raise ValueError(
                f"`{name}.extend` must leave arrays [batch, ..., new, features] of its {new} new "
                f"tokens alone, here [{batch}, ..., {new}, features], got shape {got}. Those of "
                "earlier tokens are in the cache already."
            )
    structure = jax.tree.structure(left)
    if not past.is_empty and structure != jax.tree.structure(past.left):
        raise ValueError(
            f"`{name}.extend` must leave the same tree for every token, got {structure} after "
            f"{jax.tree.structure(past.left)}."
        )
