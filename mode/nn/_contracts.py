"""The two contracts of this library, blocks and layers.

A **block** returns the *update* of the residual stream; a **layer** adds it and returns *hidden
states*. `Residual(block)` and `MixtureOfDepths(block, ...)` are both layers: dense becomes
Mixture-of-Depths by one word. Both return routings too: a tuple of one `Routing` per router, in the
order of the routers in the module.

Each has one pass, `extend`, for new tokens after those in a cache. `__call__` is `extend` on an
empty cache, and all that a module for training alone needs.
"""

import abc
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import equinox as eqx
import jax
from jaxtyping import PyTree

from .._checks import can_be_called, check_hidden, check_kept_shape, takes_key, type_name
from .._token_info import TokenInfo, resolve_info
from .._types import Gathered, GatheredIds, Hidden, Key
from ..routing import Routings
from ._cache import Cache


# One cache, or those of a layer that is made of layers.
Caches = Cache | tuple[Any, ...]
Result = tuple[Hidden, Routings]
BlockResult = tuple[Hidden, Routings, PyTree]  # of `extend`
LayerResult = tuple[Hidden, Routings, Caches]


@runtime_checkable
class SupportsExtend(Protocol):
    """Any object with a method `extend`: a block without `__call__` is one."""

    extend: Callable[..., BlockResult]


Block = Callable[..., Result] | SupportsExtend
Layer = Callable[..., Result]


class AbstractBlock(eqx.Module):
    """A module that returns the update of the residual stream.

    A block of your own writes `extend` and can train and decode. `Cache` shows one.
    """

    @abc.abstractmethod
    def extend(self, x: Hidden, info: TokenInfo, cache: Cache, *, key: Key = None) -> BlockResult:
        """Computes new tokens after those in the cache.

        **Arguments:**

        - `x`, `info`: new tokens, `[*groups, tokens, dim]`, in time order; padding, behind the real
            tokens, has segment 0. After a cache that is not empty, `*groups` is `batch`.
        - `cache`: what this block returned for the tokens before them.

        **Returns:** `(update, routings, entries)`: the update, `[*groups, tokens, dim]`; the
        routings; and a tree of arrays, `[batch, ..., new, features]`, with what later tokens need
        of the new ones, `()` where no token looks at another.
        """

    def __call__(self, x: Hidden, info: TokenInfo | None = None, *, key: Key = None) -> Result:
        """Maps whole sequences, `[*groups, tokens, dim]`, to their update and the routings."""
        check_hidden(x)
        return self.extend(x, resolve_info(x, info), Cache.empty(), key=key)[:2]


class Keys(eqx.Module):
    """What the queries of some tokens may see: earlier tokens, and all new ones.

    **Attributes:**

    - `cache`: entries of the tokens before the new ones.
    - `entries`, `info`: what `AbstractKeyedBlock.keys` returned for the new tokens, and their
        positions and segments.
    """

    cache: Cache
    entries: PyTree
    info: TokenInfo


class AbstractKeyedBlock(AbstractBlock):
    """A block in which tokens that are not computed may leave keys and values for others.

    `extend` is `keys`, then `extend_queries` of all tokens. `MixtureOfQueries` runs them apart.
    """

    @property
    def is_keyed(self) -> bool:
        """Whether the block really has this form: a wrapper has that of the block inside it."""
        return True

    @abc.abstractmethod
    def keys(self, x: Hidden, info: TokenInfo) -> PyTree:
        """Returns what all tokens leave for later ones, `[batch, ..., tokens, features]`."""

    @abc.abstractmethod
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
        """Computes some of the new tokens.

        **Arguments:**

        - `x`, `info`: these tokens, `[*groups, slots, dim]`, in time order, empty slots behind
            them.
        - `index`: `[*groups, slots]`, where they stand among the new tokens; the number of new
            tokens for an empty slot.
        - `keys`: what they may look at.
        - `cache`: entries that this method returned for earlier tokens.

        **Returns:** `(update, routings, entries)` of these tokens, as `extend` does; without the
        entries that `keys` made.
        """


class AbstractLayer(eqx.Module):
    """A module that returns hidden states: it adds the residual itself."""

    @abc.abstractmethod
    def extend(self, x: Hidden, info: TokenInfo, cache: Caches, *, key: Key = None) -> LayerResult:
        """Computes new tokens after those in the cache, as a block does.

        **Returns:** `(hidden, routings, new)`: hidden states instead of an update; and the entries
        as a `Cache` of the new tokens alone, whose `info` says which of them the layer processed.
        """

    def __call__(self, x: Hidden, info: TokenInfo | None = None, *, key: Key = None) -> Result:
        """Maps whole sequences, `[*groups, tokens, dim]`, to hidden states and the routings."""
        check_hidden(x)
        return self.extend(x, resolve_info(x, info), Cache.empty(), key=key)[:2]


def check_layer(name: str, layer: object, verb: str = "build") -> None:
    """Refuses, where a model is built, what cannot be one of its layers."""
    if isinstance(layer, AbstractBlock):
        raise ValueError(
            f"`{name}` must {verb} layers, which return hidden states, got a block, "
            f"`{type(layer).__name__}`, which returns the update alone. Make a layer of it by "
            "`Residual(block)` or `MixtureOfDepths(block, dim, key=key)`."
        )
    if not _fits(layer):
        raise ValueError(
            f"`{name}` must {verb} layers, called as `layer(x, info, key=key)` and returning "
            f"(hidden, routings), got {type_name(layer)}. `Residual` and `MixtureOfDepths` make "
            "layers of blocks."
        )


def check_block(name: str, block: object) -> None:
    """Refuses, where a layer is built, what cannot be its block."""
    if isinstance(block, AbstractLayer):
        raise ValueError(
            f"`{name}` must return the update alone, got a layer, `{type(block).__name__}`, which "
            "adds the residual itself: it would count twice. Pass the block inside it, "
            "`layer.block`."
        )
    if not _fits(block):
        raise ValueError(
            f"`{name}` must be a block, called as `block(x, info, key=key)` and returning (update, "
            f"routings), got {type_name(block)}, which cannot be called so. Make a block of a "
            "module of one sequence with its own skip connection by `Delta(module)`, of a function "
            "of one token by `PositionWise(function)`."
        )


def check_keyed_block(layer: str, block: object, instead: str) -> AbstractKeyedBlock:
    """Returns `block`, or refuses one that has no keys of its own."""
    if not (isinstance(block, AbstractKeyedBlock) and block.is_keyed):
        raise ValueError(
            f"`block` of {layer} must have keys of its own, as `TransformerBlock` and `Attention` "
            f"do, got {type_name(block)}. Write it as an `AbstractKeyedBlock`, or {instead}."
        )
    return block


def _fits(module: object) -> bool:
    if isinstance(module, type):
        return False
    extend = getattr(module, "extend", None)
    return can_be_called(extend, None, None, None) or can_be_called(module, None, None, key=None)


def run_block(
    name: str, block: Any, x: Hidden, info: TokenInfo, cache: Cache, key: Key
) -> BlockResult:
    """Runs `block.extend`, or the `__call__` of a block without one, and checks what it returns."""
    if hasattr(block, "extend"):
        form, size = "(update, routings, entries) from `extend`", 3
        options = {"key": key} if takes_key(block.extend) else {}
        result = block.extend(x, info, cache, **options)
    elif cache.is_kept:
        raise ValueError(
            f"`model` must be able to decode, but `{type(block).__name__}` in it has no method "
            "`extend(x, info, cache)`, which computes new tokens after those in a cache. "
            "`help(mode.Cache)` shows one."
        )
    else:
        form, size = "(update, routings)", 2
        result = block(x, info, key=key)
    if not (isinstance(result, tuple) and len(result) == size and isinstance(result[1], tuple)):
        got = f"a tuple of {len(result)}" if isinstance(result, tuple) else type_name(result)
        raise ValueError(
            f"`{name}` must return {form}, with `()` where there are none, got {got} from "
            f"{type_name(block)}. `Delta(module)` makes a block of a module that returns hidden "
            "states."
        )
    update, routings, entries = result if size == 3 else (*result, ())
    check_kept_shape(name, getattr(update, "shape", ()), x.shape)
    if cache.is_kept:
        _check_entries(type(block).__name__, entries, x.shape[:-1], cache)
    return update, routings, entries


def _check_entries(name: str, entries: PyTree, shape: tuple[int, ...], cache: Cache) -> None:
    batch, new = shape
    for leaf in jax.tree.leaves(entries):
        got = getattr(leaf, "shape", ())
        if len(got) < 3 or (got[0], got[-2]) != (batch, new):
            raise ValueError(
                f"`{name}.extend` must return entries [batch, ..., new, features] of its {new} new "
                f"tokens alone, here [{batch}, ..., {new}, features], got shape {got}. Those of "
                "earlier tokens are in the cache already."
            )
    structure, earlier = jax.tree.structure(entries), jax.tree.structure(cache.entries)
    if not cache.is_empty and structure != earlier:
        raise ValueError(
            f"`{name}.extend` must return the same tree of entries for every token, got "
            f"{structure} after {earlier}."
        )
