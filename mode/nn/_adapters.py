"""Adapters: blocks made of modules that were written without this library in mind."""

from collections.abc import Callable

import equinox as eqx
import jax
from jaxtyping import Array, Float, PyTree

from .._checks import can_be_called, check_kept_shape, takes_key, type_name
from .._dtypes import cast_floating
from .._token_info import TokenInfo
from .._types import Gathered, GatheredIds, Hidden, Key, VectorMap
from ..parallel import role_field
from ._cache import Cache
from ._contracts import (
    AbstractBlock,
    AbstractKeyedBlock,
    AbstractLayer,
    Block,
    BlockResult,
    Keys,
    check_block,
    run_block,
)


def map_rows(
    function: Callable[..., Float[Array, "..."]], rows: Float[Array, "rows ..."], key: Key
) -> Float[Array, "rows ..."]:
    """Maps `function` over rows, in their dtype and with a key for each where it takes one."""
    function = cast_floating(function, rows.dtype)
    if key is None or not takes_key(function):
        return jax.vmap(function)(rows)
    keys = jax.random.split(key, rows.shape[0])
    return jax.vmap(lambda row, key: function(row, key=key))(rows, keys)


# Modules of Equinox that map one vector.
_OF_VECTORS = (eqx.nn.MLP, eqx.nn.Linear, eqx.nn.LayerNorm, eqx.nn.RMSNorm)


class Delta(AbstractBlock):
    r"""A block made of a module that has its own skip connection: $f(X) = M(X) - X$.

    The module gets neither positions nor segments: it sees the selected tokens in time order, and
    zeros at the end for empty slots. (A norm in it needs its epsilon: the gradient of a norm
    without one is NaN at 0.) What needs more, packed documents, or decoding is better written as a
    block. In bfloat16 the difference loses digits that such a block keeps.

    **Arguments:**

    - `module`: maps one sequence, `[tokens, dim]`, to `[tokens, dim]`; gets a key where it has a
        parameter `key`.

    **Raises:** `ValueError` for a layer of this library, whose block can be used as it is; at the
    call, for a module that changes the shape.

    >>> import jax.numpy as jnp, mode
    >>> block = mode.Delta(lambda tokens: tokens + jnp.cumsum(tokens, axis=0))
    >>> update, routings = block(jnp.ones((2, 8, 4)), mode.TokenInfo.plain((2, 8)))
    >>> update[0, :3, 0].tolist(), routings
    ([1.0, 2.0, 3.0], ())
    """

    module: Callable[..., Float[Array, "tokens dim"]]

    def __check_init__(self):
        if isinstance(self.module, AbstractLayer):
            raise ValueError(
                "`module` of `Delta` must map [tokens, dim] to [tokens, dim], got a layer, "
                f"`{type(self.module).__name__}`, which returns routings too. Use the block inside "
                "it, `layer.block`."
            )
        if isinstance(self.module, _OF_VECTORS):  # as many tokens as features would pass
            raise ValueError(
                "`module` of `Delta` must map [tokens, dim] to [tokens, dim], got "
                f"{type_name(self.module)}, which maps one token, [dim] to [dim]. Make a block of "
                "it by `PositionWise`."
            )
        if not can_be_called(self.module, None):
            raise ValueError(
                "`module` of `Delta` must be called with one argument, [tokens, dim], got "
                f"{type_name(self.module)}. A block, called as `block(x, info, key=key)`, needs no "
                "`Delta`."
            )

    def extend(self, x: Hidden, info: TokenInfo, cache: Cache, *, key: Key = None) -> BlockResult:
        """Maps whole sequences, `[*groups, tokens, dim]`, to their update; no routings.

        **Raises:** `ValueError` in a model that decodes: the module has no form for new tokens.
        """
        del info
        if cache.is_kept:
            raise ValueError(
                "`model` must be able to decode, but `Delta` in it wraps "
                f"{type_name(self.module)}, which maps whole sequences alone. Write it as a block "
                "with `extend(x, info, cache)`: `help(mode.Cache)` shows one."
            )
        with jax.named_scope("mode.Delta"):
            groups = x.reshape(-1, *x.shape[-2:])
            try:
                hidden = map_rows(self.module, groups, key)
            except TypeError as error:
                raise ValueError(
                    f"`module` of `Delta` must map [tokens, dim] to [tokens, dim], got "
                    f"{type_name(self.module)}, which does not map {groups.shape[1:]}: {error} A "
                    "function of one token, [dim] to [dim], is made a block by `PositionWise`."
                ) from error
            check_kept_shape("module", hidden.shape[1:], groups.shape[1:])
            return hidden.reshape(x.shape) - x, (), ()


class PositionWise(AbstractBlock):
    """A block made of a function of one token: `[dim] -> [dim]`, such as `eqx.nn.MLP`.

    **Arguments:**

    - `function`: maps one vector to one of its size; gets a key where it has a parameter `key`.

    **Raises:** `ValueError` at the call, for a function that changes the size.

    >>> import equinox as eqx, jax, jax.numpy as jnp, mode
    >>> block = mode.PositionWise(eqx.nn.MLP(8, 8, 32, 1, key=jax.random.key(0)))
    >>> block(jnp.ones((2, 4, 8)))[0].shape
    (2, 4, 8)
    """

    function: VectorMap = role_field("feedforward")

    def extend(self, x: Hidden, info: TokenInfo, cache: Cache, *, key: Key = None) -> BlockResult:
        """Maps each token by itself; no routings, no entries. See `AbstractBlock`."""
        del info, cache
        rows = x.reshape(-1, x.shape[-1])
        update = map_rows(self.function, rows, key)
        check_kept_shape("function", update.shape[1:], rows.shape[1:])
        return update.reshape(x.shape), (), ()


class PreNorm(AbstractKeyedBlock):
    r"""A block of a normed input: $f(\text{norm}(x))$.

    **Arguments:**

    - `norm`: maps hidden states to hidden states, such as `RMSNorm(dim)`.
    - `block`: any block, such as `Attention(dim, num_heads, key=key)`.

    **Raises:** `ValueError` for what is no block.

    >>> import jax, jax.numpy as jnp, mode
    >>> attention = mode.Attention(32, num_heads=4, key=jax.random.key(0))
    >>> layer = mode.Residual(mode.PreNorm(mode.RMSNorm(32), attention))
    >>> layer(jnp.ones((4, 64, 32)))[0].shape
    (4, 64, 32)
    """

    norm: Callable[[Hidden], Hidden]
    block: Block

    def __check_init__(self):
        check_block("block", self.block)

    def extend(self, x: Hidden, info: TokenInfo, cache: Cache, *, key: Key = None) -> BlockResult:
        """Runs the block on the normed tokens. See `AbstractBlock`."""
        return run_block("block", self.block, self.norm(x), info, cache, key)

    @property
    def is_keyed(self) -> bool:
        """Whether the block inside is one."""
        return getattr(self.block, "is_keyed", False)

    def keys(self, x: Hidden, info: TokenInfo) -> PyTree:
        """Returns the keys of the normed tokens. See `AbstractKeyedBlock`."""
        assert isinstance(self.block, AbstractKeyedBlock)
        return self.block.keys(self.norm(x), info)

    def extend_queries(
        self,
        x: Gathered,
        info: TokenInfo,
        index: GatheredIds,
        keys: Keys,
        cache: Cache,
        *,
        key: Key = None,
    ) -> BlockResult:
        """Runs the block on some normed tokens. See `AbstractKeyedBlock`."""
        assert isinstance(self.block, AbstractKeyedBlock)
        return self.block.extend_queries(self.norm(x), info, index, keys, cache, key=key)
