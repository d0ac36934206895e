"""Blocks made of modules that were written without this library in mind."""

import inspect
from collections.abc import Callable

import jax
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from ._block import (
    AbstractBlock,
    AbstractLayer,
    Routings,
    can_be_called,
    check_kept_shape,
    type_name,
)
from ._cache import Past
from ._info import TokenInfo
from ._precision import cast_parameters


def takes_key(function: Callable) -> bool:
    """Whether `function` has a parameter `key`, as Equinox's modules have."""
    try:
        return "key" in inspect.signature(function).parameters
    except ValueError:  # compiled functions may have no signature to look at
        return False


def map_rows(
    function: Callable[..., Float[Array, "..."]],
    rows: Float[Array, "rows ..."],
    key: PRNGKeyArray | None,
) -> Float[Array, "rows ..."]:
    """`function` of every row; with a key of its own for each, where it takes one."""
    if key is None or not takes_key(function):
        return jax.vmap(function)(rows)
    keys = jax.random.split(key, rows.shape[0])
    return jax.vmap(lambda row, key: function(row, key=key))(rows, keys)


class Delta(AbstractBlock):
    """Makes a block of a module that has its own skip connection: $f(X) = M(X) - X$.

    The module maps one sequence, `[tokens, dim]`, to one of the same shape, as Equinox modules do;
    it is mapped over the groups, and given a key where it has a parameter `key`. It is told neither
    positions nor segments: it sees the tokens it is given, in time order, empty slots as zeros at
    the end (so a norm in it needs its epsilon: the gradient of a bare one at 0 is NaN). A module
    that needs more, or packed documents, is better written as a block. In bfloat16 the difference
    loses digits that a block which returns its update keeps.

    **Arguments:**

    - `module`: maps `[tokens, dim]` to `[tokens, dim]`.

    **Raises:** `ValueError` for a layer of this library, whose block is there to be used; at the
    call, for a module that changes the shape.
    """

    module: Callable[..., Float[Array, "tokens dim"]]

    def __check_init__(self):
        if isinstance(self.module, AbstractLayer):
            raise ValueError(
                "`module` of `Delta` must map [tokens, dim] to [tokens, dim], got a layer, "
                f"`{type(self.module).__name__}`, which returns routings too. Use the block inside "
                "it, `layer.block`."
            )
        if not can_be_called(self.module, None):
            raise ValueError(
                "`module` of `Delta` must be called with one argument, [tokens, dim], got "
                f"{type_name(self.module)}. A block, called as `block(x, info, key=key)`, needs no "
                "`Delta`."
            )

    def __call__(
        self,
        x: Float[Array, "*groups tokens dim"],
        info: TokenInfo,
        *,
        key: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, "*groups tokens dim"], Routings]:
        """`x`: `[*groups, tokens, dim]`. Returns the update, and no routings."""
        del info
        groups = x.reshape(-1, *x.shape[-2:])
        hidden = map_rows(cast_parameters(self.module, x.dtype), groups, key)
        check_kept_shape("module", hidden.shape[1:], groups.shape[1:])
        return hidden.reshape(x.shape) - x, ()


class PositionWise(AbstractBlock):
    """Makes a block of a function of one token: `[dim] -> [dim]`, such as `eqx.nn.MLP`.

    **Arguments:**

    - `function`: maps one vector to one of the same size. It is given a key where it has a
        parameter `key`.

    **Raises:** `ValueError` at the call, for a function that changes the size.
    """

    function: Callable[[Float[Array, " dim"]], Float[Array, " dim"]]

    def __call__(
        self,
        x: Float[Array, "*groups tokens dim"],
        info: TokenInfo,
        *,
        key: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, "*groups tokens dim"], Routings]:
        """`x`: `[*groups, tokens, dim]`. Returns the update, and no routings."""
        del info
        rows = x.reshape(-1, x.shape[-1])
        update = map_rows(cast_parameters(self.function, x.dtype), rows, key)
        check_kept_shape("function", update.shape[1:], rows.shape[1:])
        return update.reshape(x.shape), ()

    def extend(
        self, x: Float[Array, "batch new dim"], info: TokenInfo, past: Past
    ) -> tuple[Float[Array, "batch new dim"], PyTree]:
        """New tokens, each for itself: see `Past`."""
        del past
        return self(x, info)[0], ()
