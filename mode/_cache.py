"""What tokens leave behind for later ones: the contract of decoding, and the caches that keep it.

A block decodes by one method more, which does for new tokens what `__call__` does for whole
sequences:

    extend(x, info, past) -> (update, left)

- `x`, `info`: new tokens, `[batch, new, dim]`, in time order; padding is segment 0.
- `past`: a `Past`, what earlier tokens of each member left behind in this block.
- `left`: any tree of arrays `[batch, ..., new, features]`, such as keys and values: what later
  tokens will find in their `past.left`, with all tokens so far on that last but one axis.
  `()` for a block in which no token looks at another.

Everything else is the library's: how large a cache is, where a token is written, which members of
the batch run. A layer does the same with hidden states, and says in `Added` which tokens it took.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from ._info import TokenInfo


class Past(eqx.Module):
    """What earlier tokens left behind in one block; nothing at first.

    **Attributes:**

    - `left`: the tree of arrays that the block returned, `[batch, ..., slots, features]`; `None`
        where the new tokens are the first.
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
        # the one depends on the other, and would copy the cache twice a step to be safe.
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


def _taken(added: Added) -> Int[Array, "*layers batch"]:
    return jnp.sum(added.info.valid, axis=-1, dtype=jnp.int32)


def extend_block(
    block: Any, x: Float[Array, "batch new dim"], info: TokenInfo, past: Past
) -> tuple[Float[Array, "batch new dim"], PyTree]:
    """`block.extend(x, info, past)`.

    **Raises:** `ValueError` for a block, or a layer, that has no such method.
    """
    if not hasattr(block, "extend"):
        raise ValueError(
            f"`model` must be able to decode, but `{type(block).__name__}` in it has no method "
            "`extend(x, info, past)`, which does for new tokens what `__call__` does for whole "
            "sequences. `mode.Past` says what it is given and returns."
        )
    return block.extend(x, info, past)
