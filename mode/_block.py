"""The two contracts, and the adapters between them and everything else.

- A **block** returns the residual *update*: `(x, info, *, key=None) -> (update, routings)`.
- A **layer** returns *hidden states*: `(x, info=None, *, key=None) -> (hidden, routings)`.

`Residual(block)` and `MixtureOfDepths(block, ...)` are both layers: dense becomes
Mixture-of-Depths by one word. `routings` is always a tuple, `()` where nothing was routed, and
holds one `Routing` per router in the order of the routers in the module.
"""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from ._info import TokenInfo, check_hidden, resolve_info
from ._precision import cast_parameters
from ._routing import Routing


Routings = tuple[Routing, ...]
Block = Callable[..., tuple[Float[Array, "*groups tokens dim"], Routings]]
Layer = Callable[..., tuple[Float[Array, "*groups tokens dim"], Routings]]


def check_kept_shape(name: str, result: Float[Array, "..."], x: Float[Array, "..."]) -> None:
    """Refuse a module that does not map a vector or a sequence to one of the same shape."""
    if result.shape != x.shape:
        raise ValueError(
            f"`{name}` must keep the shape of what it is given, {x.shape[1:]}, got "
            f"{result.shape[1:]}: its result is added to the residual stream."
        )


class Residual(eqx.Module):
    """A block applied to every token: $x + f(x)$. The dense layer.

    Padding tokens pass by unchanged, and the block sees zeros in their place, so that no number in
    the padding can reach a real token or a gradient.

    **Arguments:**

    - `block`: any block.

    >>> import jax, mode
    >>> block = mode.TransformerBlock(32, num_heads=4, key=jax.random.key(0))
    >>> hidden, routings = mode.Residual(block)(jnp.ones((4, 64, 32)))
    >>> hidden.shape, routings
    ((4, 64, 32), ())
    """

    block: Block

    def __call__(
        self,
        x: Float[Array, "*groups tokens dim"],
        info: TokenInfo | None = None,
        *,
        key: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, "*groups tokens dim"], Routings]:
        """`x`: `[*groups, tokens, dim]`. Returns hidden states of that shape and the routings."""
        check_hidden(x)
        if info is None:
            update, routings = self.block(x, resolve_info(x, None), key=key)
            return x + update, routings
        info = resolve_info(x, info)
        real = info.valid[..., None]
        update, routings = self.block(jnp.where(real, x, 0), info, key=key)
        return jnp.where(real, x + update, x), routings


class Delta(eqx.Module):
    """Makes a block of a module that has its own skip connection: $f(X) = M(X) - X$.

    The module maps one sequence, `[tokens, dim]`, to one of the same shape, as Equinox modules do;
    it is mapped over the groups. It is told neither positions nor segments: it sees the tokens it
    is given, in time order, empty slots as zeros at the end. A module that needs more, or packed
    documents, is better written as a block. In bfloat16 the difference loses digits that a
    block which returns its update keeps.

    **Arguments:**

    - `module`: maps `[tokens, dim]` to `[tokens, dim]`.
    - `takes_key`: whether the module is called with `key=`, as one with dropout is.
    """

    module: Callable[..., Float[Array, "tokens dim"]]
    takes_key: bool = eqx.field(static=True, default=False)

    def __call__(
        self,
        x: Float[Array, "*groups tokens dim"],
        info: TokenInfo,
        *,
        key: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, "*groups tokens dim"], Routings]:
        """`x`: `[*groups, tokens, dim]`. Returns the update, and no routings."""
        del info
        module = cast_parameters(self.module, x.dtype)
        groups = x.reshape(-1, *x.shape[-2:])
        if self.takes_key and key is not None:
            keys = jax.random.split(key, groups.shape[0])
            hidden = jax.vmap(lambda group, k: module(group, key=k))(groups, keys)
        else:
            hidden = jax.vmap(module)(groups)
        check_kept_shape("module", hidden, groups)
        return hidden.reshape(x.shape) - x, ()


class PositionWise(eqx.Module):
    """Makes a block of a function of one token: `[dim] -> [dim]`, such as `eqx.nn.MLP`.

    **Arguments:**

    - `function`: maps one vector to one of the same size, or acts on `[..., dim]` at once, as
        `SwiGLU` and `GELU` do.
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
        del info, key
        function = cast_parameters(self.function, x.dtype)
        rows = x.reshape(-1, x.shape[-1])
        update = jax.vmap(function)(rows)
        check_kept_shape("function", update, rows)
        return update.reshape(x.shape), ()
