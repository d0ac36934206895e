"""The two contracts.

- A **block** returns the residual *update*: `(x, info, *, key=None) -> (update, routings)`.
- A **layer** returns *hidden states*: `(x, info=None, *, key=None) -> (hidden, routings)`.

`Residual(block)` and `MixtureOfDepths(block, ...)` are both layers: dense becomes
Mixture-of-Depths by one word. `routings` is always a tuple, `()` where nothing was routed, and
holds one `Routing` per router in the order of the routers in the module.
"""

import abc
import inspect
from collections.abc import Callable

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from ._cache import Added, Past, extend_block
from ._info import TokenInfo, check_hidden, resolve_info
from ._routing import Routing


Routings = tuple[Routing, ...]
Block = Callable[..., tuple[Float[Array, "*groups tokens dim"], Routings]]
Layer = Callable[..., tuple[Float[Array, "*groups tokens dim"], Routings]]


class AbstractLayer(eqx.Module):
    """What adds the residual itself. The name lets a layer be refused where a block is meant: its
    residual would count twice, and no shape would tell."""

    @abc.abstractmethod
    def __call__(
        self,
        x: Float[Array, "*groups tokens dim"],
        info: TokenInfo | None = None,
        *,
        key: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, "*groups tokens dim"], Routings]:
        """`x`: `[*groups, tokens, dim]`. Returns hidden states of that shape and the routings."""


class AbstractBlock(eqx.Module):
    """What returns the update alone. The name lets a block be refused where a layer is meant: the
    model would have no residual stream, and no shape would tell."""

    @abc.abstractmethod
    def __call__(
        self,
        x: Float[Array, "*groups tokens dim"],
        info: TokenInfo,
        *,
        key: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, "*groups tokens dim"], Routings]:
        """`x`: `[*groups, tokens, dim]`. Returns an update of that shape and the routings."""


def check_layer(name: str, layer: object) -> None:
    """Refuse, where a model is built, what cannot be one of its layers."""
    if isinstance(layer, AbstractBlock):
        raise ValueError(
            f"`{name}` must build layers, which return hidden states, got a block, "
            f"`{type(layer).__name__}`, which returns the update alone. Make a layer of it by "
            "`Residual(block)` or `MixtureOfDepths(block, dim, key=key)`."
        )
    if isinstance(layer, type) or not can_be_called(layer, None, None, key=None):
        raise ValueError(
            f"`{name}` must build layers, called as `layer(x, info, key=key)` and returning "
            f"(hidden, routings), got {type_name(layer)}. `Residual` and `MixtureOfDepths` make "
            "layers of blocks."
        )


def check_block(name: str, block: object) -> None:
    """Refuse, where a layer is built, what cannot be its block."""
    if isinstance(block, AbstractLayer):
        raise ValueError(
            f"`{name}` must return the update alone, got a layer, `{type(block).__name__}`, which "
            "adds the residual itself: it would count twice. Pass the block inside it, "
            "`layer.block`."
        )
    if isinstance(block, type) or not can_be_called(block, None, None, key=None):
        raise ValueError(
            f"`{name}` must be a block, called as `block(x, info, key=key)` and returning (update, "
            f"routings), got {type_name(block)}, which cannot be called so. Make a block of a "
            "module of one sequence with its own skip connection by `Delta(module)`, of a function "
            "of one token by `PositionWise(function)`."
        )


def run_block(
    name: str,
    block: Block,
    x: Float[Array, "*groups tokens dim"],
    info: TokenInfo,
    key: PRNGKeyArray | None,
) -> tuple[Float[Array, "*groups tokens dim"], Routings]:
    """`block(x, info, key=key)`, held to the contract: (update, tuple of routings)."""
    result = block(x, info, key=key)
    if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], tuple)):
        raise ValueError(
            f"`{name}` must return (update, routings), with `()` where nothing was routed, got "
            f"{type_name(result)} from {type_name(block)}. Make a block of a module that returns "
            "hidden states by `Delta(module)`."
        )
    check_kept_shape(name, result[0].shape, x.shape)
    return result


def can_be_called(function: object, *args: object, **kwargs: object) -> bool:
    """Whether a call with these arguments fits the signature of `function`."""
    if not callable(function):
        return False
    try:
        inspect.signature(function).bind(*args, **kwargs)
    except TypeError:
        return False
    except ValueError:  # compiled functions may have no signature to look at
        return True
    return True


def type_name(value: object) -> str:
    """For an error: what was got, where its value would say too much."""
    return f"the class `{value.__name__}`" if isinstance(value, type) else type(value).__name__


def check_kept_shape(name: str, got: tuple[int, ...], given: tuple[int, ...]) -> None:
    """Refuse a module that does not map a vector or a sequence to one of the same shape."""
    if got != given:
        raise ValueError(
            f"`{name}` must keep the shape of what it is given, {given}, got {got}: its result is "
            "added to the residual stream."
        )


class Residual(AbstractLayer):
    """A block applied to every token: $x + f(x)$. The dense layer.

    Padding tokens pass by unchanged, and the block sees zeros in their place, so that no number in
    the padding can reach a real token or a gradient.

    **Arguments:**

    - `block`: any block.

    **Raises:** `ValueError` for a layer, or a module that cannot be called as a block; at the call,
    for a block whose result is not an update of the shape of `x` and a tuple.

    >>> import jax, mode
    >>> block = mode.TransformerBlock(32, num_heads=4, key=jax.random.key(0))
    >>> hidden, routings = mode.Residual(block)(jnp.ones((4, 64, 32)))
    >>> hidden.shape, routings
    ((4, 64, 32), ())
    """

    block: Block

    def __check_init__(self):
        check_block("block", self.block)

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
            update, routings = run_block("block", self.block, x, resolve_info(x, None), key)
            return x + update.astype(x.dtype), routings
        info = resolve_info(x, info)
        real = info.valid[..., None]
        update, routings = run_block("block", self.block, jnp.where(real, x, 0), info, key)
        return jnp.where(real, x + update.astype(x.dtype), x), routings

    def slots(self, max_tokens: int) -> int:
        """Tokens of a sequence that decoding keeps in this layer: all."""
        return max_tokens

    def extend(
        self, x: Float[Array, "batch new dim"], info: TokenInfo, past: Past
    ) -> tuple[Float[Array, "batch new dim"], Added]:
        """Hidden states of new tokens, and what the cache of this layer gains: see `Past`."""
        real = info.valid[..., None]
        update, left = extend_block(self.block, jnp.where(real, x, 0), info, past)
        refused = jnp.zeros(x.shape[0], jnp.int32)
        return jnp.where(real, x + update.astype(x.dtype), x), Added(left, info, refused)
