"""The transformer: token ids in, logits out, any pattern of layers in between."""

from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray

from .._checks import check_array, check_count, is_known
from .._dtypes import float32_or_wider
from .._linear import Linear, MakeNorm, Norm, RMSNorm, project
from .._token_info import TokenInfo, resolve_info
from .._types import Hidden, Ids, Key, TokenMask
from ..nn import Cache, Caches, Routings
from ..parallel import all_gather_parameters, role_field, shard_batch
from ._stack import Extended, LayerStack, Period, run_layers, stack_layers


class Transformer(eqx.Module):
    """A decoder-only language model with any pattern of layers.

    Layers that repeat are scanned over; so the routings come one per router *of the period*, with a
    leading axis of repeats. Parameters are float32; activations have `dtype`; routers and logits
    are float32.

    **Arguments:**

    - `vocab`: number of token ids.
    - `dim`: features of the hidden states.
    - `period`, `repeats`: as `stack_layers` takes them.
    - `stacks`: instead of period and repeats, a list of both from bottom to top: a schedule, such
        as the one that `interleave` returns.
    - `tied`: whether the embedding is the output projection too.
    - `embedding_scale`: multiplies embeddings on the way in; by default `dim ** 0.5`, with which
        they and tied logits start with unit variance.
    - `max_positions`: number of learned position embeddings, which are added to those of the
        tokens; `None` for none.
    - `make_norm`: builds the last norm from `dim`, such as `LayerNorm`.
    - `dtype`: of the activations, such as `jnp.bfloat16`.
    - `remat`: recompute activations in the backward pass, one period of layers at a time.

    **Raises:** `ValueError` for no layers, sizes below 1, or what builds no layer.

    >>> import jax, jax.numpy as jnp, mode
    >>> dense = lambda key: mode.Residual(mode.TransformerBlock(32, 4, key=key))
    >>> model = mode.Transformer(256, 32, [dense], repeats=6, key=jax.random.key(0))
    >>> logits, routings = model(jnp.zeros((2, 16), int))
    >>> logits.shape, routings
    ((2, 16, 256), ())
    """

    stacks: tuple[LayerStack, ...]
    norm: Norm
    dtype: jnp.dtype = eqx.field(static=True)
    embedding_scale: float = eqx.field(static=True)
    embedding: Float[Array, "vocab dim"] = role_field("embedding")
    position_embedding: Float[Array, "max_positions dim"] | None = role_field("embedding")
    head: Linear | None = role_field("head")

    def __init__(
        self,
        vocab: int,
        dim: int,
        period: Period | None = None,
        repeats: int = 1,
        *,
        stacks: Sequence[tuple[Period, int]] | None = None,
        tied: bool = True,
        embedding_scale: float | None = None,
        max_positions: int | None = None,
        make_norm: MakeNorm = RMSNorm,
        dtype: DTypeLike = jnp.float32,
        remat: bool = False,
        key: PRNGKeyArray,
    ):
        check_count("vocab", vocab, 1)
        check_count("dim", dim, 1)
        schedule = _schedule(period, repeats, stacks)
        embedding_key, head_key, *stack_keys = jax.random.split(key, 2 + len(schedule))
        self.embedding_scale = dim**0.5 if embedding_scale is None else embedding_scale
        self.embedding = dim**-0.5 * jax.random.normal(embedding_key, (vocab, dim), jnp.float32)
        self.stacks = tuple(
            stack_layers(layers, times, remat=remat, key=stack_key)
            for (layers, times), stack_key in zip(schedule, stack_keys, strict=True)
        )
        self.position_embedding = None
        if max_positions is not None:
            shape = (check_count("max_positions", max_positions, 1), dim)
            position_key = jax.random.fold_in(embedding_key, 1)
            self.position_embedding = 0.02 * jax.random.normal(position_key, shape, jnp.float32)
        self.norm = make_norm(dim)
        self.head = None if tied else Linear(dim, vocab, key=head_key)
        self.dtype = jnp.dtype(dtype)

    @property
    def depth(self) -> int:
        """Number of layers."""
        return sum(stack.depth for stack in self.stacks)

    def __call__(
        self, tokens: Ids, info: TokenInfo | None = None, *, key: Key = None
    ) -> tuple[Float[Array, "*groups tokens vocab"], Routings]:
        """Maps token ids to next-token logits in float32 or wider, and the routings.

        **Arguments:**

        - `tokens`: `[*groups, tokens]`, ids below `vocab`; anything in the padding.
        - `info`: positions and segments; plain sequences where it is left out.
        - `key`: for selectors and blocks that draw random numbers.

        **Raises:** `ValueError` for another id, or a position beyond the learned ones. Inside a
        compiled program, which cannot raise, the logits at its position are NaN, and those of the
        whole sequence once a block that attends has computed it.
        """
        check_array("tokens", tokens)
        if tokens.ndim < 1 or not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise ValueError(
                "`tokens` must be integers with the axes [*groups, tokens], got shape "
                f"{tokens.shape} and dtype {tokens.dtype}."
            )
        info = resolve_info(tokens[..., None], info)
        self.check_ids("tokens", tokens, info.valid)
        is_learned = self.position_embedding is not None
        if is_learned and is_known(info.positions) and is_known(info.valid):
            last = int(np.max(np.asarray(info.positions), where=np.asarray(info.valid), initial=0))
            self.check_length("info", last + 1)
        caches = (Cache.empty(),) * len(self.stacks)
        hidden, routings, _ = self.extend(tokens, info, caches, key=key)
        return self.unembed(hidden), routings

    def extend(
        self, tokens: Ids, info: TokenInfo, caches: tuple[Caches, ...], *, key: Key = None
    ) -> Extended:
        """Runs new tokens after those in the caches, one per stack, as layers do.

        **Returns:** the hidden states of the last layer, the routings, and the caches of the new
        tokens alone.
        """
        # Any id may stand in the padding.
        x = self.embed(jnp.where(info.valid, tokens, 0), info)
        keys = None if key is None else jax.random.split(key, len(self.stacks))
        return run_layers(self.stacks, x, info, caches, keys)

    def check_ids(self, name: str, tokens: Ids, real: TokenMask | np.ndarray) -> None:
        """Refuses `real` tokens that are no ids of the vocabulary, where they are known."""
        if not (is_known(tokens) and is_known(real)):
            return
        vocab, ids = self.embedding.shape[0], np.asarray(tokens)[np.asarray(real)]
        if ids.size and (ids.min() < 0 or ids.max() >= vocab):
            raise ValueError(
                f"`{name}` must be ids from 0 to {vocab - 1}, the model's vocabulary, got ids from "
                f"{ids.min()} to {ids.max()}."
            )

    def check_length(self, name: str, tokens: int) -> None:
        """Refuses sequences of more tokens than there are learned positions."""
        learned = self.position_embedding
        if learned is not None and tokens > learned.shape[0]:
            raise ValueError(
                f"`{name}` must have at most max_positions={learned.shape[0]} tokens in a "
                f"sequence, the learned positions of the model, got {tokens}. Generate fewer "
                "tokens, or begin with a shorter prompt."
            )

    def embed(self, tokens: Ids, info: TokenInfo | None = None) -> Hidden:
        """Maps token ids to hidden states, as the first layer takes them.

        `info` has their positions, if the model learned some; by default they are plain.
        """
        x = _rows(self.embedding, tokens).astype(self.dtype) * self.embedding_scale
        if self.position_embedding is not None:
            positions = resolve_info(tokens[..., None], info).positions
            x += _rows(self.position_embedding, positions).astype(self.dtype)
        return shard_batch(x)

    def unembed(self, x: Float[Array, "*axes dim"]) -> Float[Array, "*axes vocab"]:
        """Maps hidden states, as the last layer returns them, to logits in float32 or wider."""
        with jax.named_scope("mode.logits"):
            x = self.norm(x)
            embedding, head = all_gather_parameters((self.embedding, self.head))
            logits = project(x, embedding.T) if head is None else head(x)
            return shard_batch(logits.astype(float32_or_wider(x.dtype)))


def _rows(table: Float[Array, "rows dim"], index: Ids) -> Hidden:
    # NaN for an index that does not exist: clamping it, as indexing does, would go unnoticed.
    rows = all_gather_parameters(table).at[index]
    return rows.get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)


def _schedule(
    period: Period | None, repeats: int, stacks: Sequence[tuple[Period, int]] | None
) -> Sequence[tuple[Period, int]]:
    if period is not None and stacks is None:
        return [(period, repeats)]
    if period is not None or stacks is None:
        raise ValueError(
            "give exactly one of `period` (with `repeats`) and `stacks`, got "
            f"{'neither' if period is None else 'both'}."
        )
    if repeats != 1:
        raise ValueError(
            f"`repeats` goes with `period`, got repeats={repeats} beside `stacks`. Each stack is a "
            "pair (period, repeats)."
        )
    check_count("stacks", len(stacks), 1)
    return stacks
