"""What travels with the tokens: where each stood, and to which document it belongs."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped


class TokenInfo(eqx.Module):
    """The original position and the document of every token.

    It is gathered together with the tokens, so that a block which sees only a few of them still
    rotates by true distances and attends inside one document only.

    Tokens stand in time order along their axis; nothing in this library reorders them. Positions
    may restart in each document of a packed sequence.

    **Arguments:**

    - `positions`: `[*groups, tokens]`, original positions in tokens, for rotary embeddings.
    - `segment_ids`: `[*groups, tokens]`, the number of the document inside the sequence, from 1.
        Segment 0 is padding: never selected, never a key, counted in no loss or metric.

    **Raises:** `ValueError` where the two shapes differ or a dtype is not an integer one.

    >>> info = TokenInfo.packed(jnp.array([1, 1, 1, 2, 2, 0]))
    >>> info.positions.tolist(), info.valid.tolist()
    ([0, 1, 2, 0, 1, 0], [True, True, True, True, True, False])
    """

    positions: Int[Array, "*groups tokens"]
    segment_ids: Int[Array, "*groups tokens"]

    def __check_init__(self):
        if self.positions.shape != self.segment_ids.shape:
            raise ValueError(
                "`positions` and `segment_ids` must have the same shape, got "
                f"{self.positions.shape} and {self.segment_ids.shape}."
            )
        for name in ("positions", "segment_ids"):
            dtype = getattr(self, name).dtype
            if not jnp.issubdtype(dtype, jnp.integer):
                raise ValueError(f"`{name}` must be of an integer dtype, got {dtype}.")

    @property
    def valid(self) -> Bool[Array, "*groups tokens"]:
        """`[*groups, tokens]`: true for every token that is not padding."""
        return self.segment_ids != 0

    @staticmethod
    def plain(shape: tuple[int, ...]) -> "TokenInfo":
        """Whole sequences without padding: `shape` is `(*groups, tokens)`.

        >>> TokenInfo.plain((2, 3)).positions.tolist()
        [[0, 1, 2], [0, 1, 2]]
        """
        positions = jnp.broadcast_to(jnp.arange(shape[-1], dtype=jnp.int32), shape)
        return TokenInfo(positions, jnp.ones(shape, jnp.int32))

    @staticmethod
    def packed(segment_ids: Int[Array, "*groups tokens"]) -> "TokenInfo":
        """Packed documents: positions count from the start of each segment, 0 in padding."""
        segment_ids = jnp.asarray(segment_ids)
        index = jnp.arange(segment_ids.shape[-1], dtype=jnp.int32)
        previous = jnp.roll(segment_ids, 1, axis=-1)
        index = jnp.broadcast_to(index, segment_ids.shape)
        starts = (segment_ids != previous) | (index == 0)
        start = jax.lax.cummax(jnp.where(starts, index, 0), axis=segment_ids.ndim - 1)
        return TokenInfo(jnp.where(segment_ids != 0, index - start, 0), segment_ids)


def check_hidden(x: Float[Array, "*groups tokens dim"], dim: int | None = None) -> None:
    """Refuse hidden states that no layer could take, in words that say what to do."""
    if x.ndim < 2:
        raise ValueError(
            f"`x` must have the axes [*groups, tokens, dim], got shape {x.shape}. "
            "One sequence is [tokens, dim]; a batch of them is [batch, tokens, dim]."
        )
    if 0 in x.shape[:-1]:
        raise ValueError(f"`x` must hold at least one token, got shape {x.shape}.")
    if dim is not None and x.shape[-1] != dim:
        raise ValueError(
            f"`x` must have {dim} features on its last axis, as this layer was built with "
            f"`dim={dim}`, got shape {x.shape}."
        )
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(
            f"`x` must be of a floating dtype, got {x.dtype}. Token ids are embedded first."
        )


def resolve_info(x: Shaped[Array, "*groups tokens features"], info: TokenInfo | None) -> TokenInfo:
    """`info`, checked against `x`; plain sequences where the caller left it out."""
    if info is None:
        return TokenInfo.plain(x.shape[:-1])
    if not isinstance(info, TokenInfo):
        raise ValueError(
            f"`info` must be a `TokenInfo`, got {type(info).__name__}. `TokenInfo.packed` makes "
            "one of the segment ids of packed documents."
        )
    if info.positions.shape != x.shape[:-1]:
        raise ValueError(
            f"`info` must have the shape of `x` without its last axis, {x.shape[:-1]}, got "
            f"{info.positions.shape}. `TokenInfo.plain(x.shape[:-1])` makes one that fits."
        )
    return info
