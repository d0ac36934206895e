"""The record that travels with the tokens."""

from collections.abc import Callable
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from ._types import Ids, TokenMask


Layout = Literal["plain", "prefix", "any"]


class TokenInfo(eqx.Module):
    """The original position and the document of every token, in time order.

    It is gathered with the tokens, so that a block that sees only a few of them still rotates by
    their true distances, attends inside one document only, and knows how much each token weighs.

    **Arguments:**

    - `positions`: `[*groups, tokens]`, original positions in tokens, for rotary embeddings. They
        may restart in each document.
    - `segment_ids`: `[*groups, tokens]`, the number of the document inside the sequence, from 1.
        Segment 0 is padding: never selected, never a key, counted in no loss or metric.
    - `weight`: `[*groups, tokens]`, the routing weights that `MixtureOfDepths` gives to its block
        (`weigh_values`), by which `Attention` multiplies the values of these tokens. `None`, for
        whole sequences, leaves them as they are.
    - `layout`: what is known of every row when the program is traced, so that no mask is made for
        what needs none: `"plain"`, all tokens of one document and their positions in order;
        `"prefix"`, tokens of one document, then padding or empty slots; `"any"`, nothing. A module
        that changes a row's segments or positions gives `"any"`.

    **Raises:** `ValueError` if the shapes differ, positions or segments are not integers, or
    weights are not floating-point numbers.

    >>> info = TokenInfo.packed(jnp.array([1, 1, 1, 2, 2, 0]))
    >>> info.positions.tolist(), info.valid.tolist()
    ([0, 1, 2, 0, 1, 0], [True, True, True, True, True, False])
    """

    positions: Ids
    segment_ids: Ids
    weight: Float[Array, "*groups tokens"] | None = None
    layout: Layout = eqx.field(static=True, default="any")

    def __check_init__(self) -> None:
        if self.positions.shape != self.segment_ids.shape:
            raise ValueError(
                "`positions` and `segment_ids` must have the same shape, got "
                f"{self.positions.shape} and {self.segment_ids.shape}."
            )
        for name in ("positions", "segment_ids"):
            dtype = getattr(self, name).dtype
            if not jnp.issubdtype(dtype, jnp.integer):
                raise ValueError(f"`{name}` must be of an integer dtype, got {dtype}.")
        weight = self.weight
        if weight is not None and (
            weight.shape != self.positions.shape or not jnp.issubdtype(weight.dtype, jnp.floating)
        ):
            raise ValueError(
                f"`weight` must be floating-point numbers of the shape of `positions`, "
                f"{self.positions.shape}, got {weight.dtype} of shape {weight.shape}."
            )

    def with_weight(self, weight: Float[Array, "*groups tokens"] | None) -> "TokenInfo":
        """Returns a copy with these weights, or without any."""
        return TokenInfo(self.positions, self.segment_ids, weight, self.layout)

    def gather(self, take: Callable[[Shaped[Array, "*groups tokens"]], Array]) -> "TokenInfo":
        """Describes the tokens that `take` gathers of each array, in time order and with empty
        slots, whose segment is 0, after them."""
        positions, segment_ids, weight = jax.tree.map(
            take, (self.positions, self.segment_ids, self.weight)
        )
        layout = "any" if self.layout == "any" else "prefix"
        return TokenInfo(positions, segment_ids, weight, layout)

    @property
    def valid(self) -> TokenMask:
        """`[*groups, tokens]`: true for every token that is not padding."""
        return self.segment_ids != 0

    @staticmethod
    def plain(shape: tuple[int, ...]) -> "TokenInfo":
        """Describes whole sequences without padding: `shape` is `(*groups, tokens)`.

        >>> TokenInfo.plain((2, 3)).positions.tolist()
        [[0, 1, 2], [0, 1, 2]]
        """
        positions = jnp.broadcast_to(jnp.arange(shape[-1], dtype=jnp.int32), shape)
        return TokenInfo(positions, jnp.ones(shape, jnp.int32), layout="plain")

    @staticmethod
    def packed(segment_ids: Ids) -> "TokenInfo":
        """Describes packed documents: positions count from the start of each segment."""
        segment_ids = jnp.asarray(segment_ids)
        index = TokenInfo.plain(segment_ids.shape).positions
        starts = (segment_ids != jnp.roll(segment_ids, 1, axis=-1)) | (index == 0)
        start = jax.lax.cummax(jnp.where(starts, index, 0), axis=segment_ids.ndim - 1)
        return TokenInfo(jnp.where(segment_ids != 0, index - start, 0), segment_ids)


def resolve_info(x: Shaped[Array, "*groups tokens features"], info: TokenInfo | None) -> TokenInfo:
    """Returns `info`, checked against `x`, or `TokenInfo.plain` if `info` is `None`."""
    if info is None:
        return TokenInfo.plain(x.shape[:-1])
    if not isinstance(info, TokenInfo):
        raise ValueError(
            f"`info` must be a `TokenInfo`, got {type(info).__name__}. `TokenInfo.packed` makes "
            "one from the segment ids of packed documents."
        )
    if info.positions.shape != x.shape[:-1]:
        raise ValueError(
            f"`info` must have the shape of `x` without its last axis, {x.shape[:-1]}, got "
            f"{info.positions.shape}. `TokenInfo.plain(x.shape[:-1])` makes one that fits."
        )
    return info
