"""The layers of a model, one by one and stacked."""

from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from .._dtypes import is_shaped
from ..nn import Layer
from ._stack import LayerStack
from ._transformer import Transformer


def list_layers(model: Transformer) -> list[Layer]:
    """Returns the layers of a model from bottom to top, each with arrays of its own."""
    return [
        layer
        for stack in model.stacks
        for repeat in range(stack.repeats)
        for layer in _repeats(stack, repeat)
    ]


def unstack_layers(model: Transformer) -> Transformer:
    """Returns the same model with every repeat in a stack of its own: the form that decodes fast.

    A scan slices each layer's parameters and caches out of the stacked ones, which at one token per
    step costs more than the layer. Compiling takes longer in proportion to the depth.
    """
    stacks = tuple(
        LayerStack(1, _repeats(stack, slice(repeat, repeat + 1)), stack.remat)
        for stack in model.stacks
        for repeat in range(stack.repeats)
    )
    return eqx.tree_at(lambda m: m.stacks, model, stacks)


def with_layers(model: Transformer, layers: Sequence[Layer]) -> Transformer:
    """Returns a model with these layers in place of its own.

    Layers of the same structure share a scan, also where they take turns with others: compiling
    takes no longer than for the period.

    >>> import jax, mode
    >>> model = mode.mod_transformer(256, 32, depth=6, num_heads=4, key=jax.random.key(0))
    >>> shallow = mode.with_layers(model, mode.list_layers(model)[:4])
    >>> shallow.depth, len(shallow.stacks)
    (4, 1)
    """
    remat = any(stack.remat for stack in model.stacks)
    kinds = [_kind(layer) for layer in layers]
    stacks: list[LayerStack] = []
    start = 0
    while start < len(layers):
        period, repeats = _longest(kinds[start:])
        columns = (layers[start + i : start + period * repeats : period] for i in range(period))
        stacks.append(LayerStack(repeats, tuple(map(_stacked, columns)), remat))
        start += period * repeats
    return eqx.tree_at(lambda m: m.stacks, model, tuple(stacks))


def _repeats(stack: LayerStack, which: int | slice) -> tuple[Layer, ...]:
    """The layers of a period in one repeat, or in some of them."""
    arrays, rest = eqx.partition(stack.layers, eqx.is_array)
    return eqx.combine(jax.tree.map(lambda leaf: leaf[which], arrays), rest)


def _stacked(layers: Sequence[Layer]) -> Layer:
    arrays, rest = zip(*(eqx.partition(layer, eqx.is_array) for layer in layers), strict=True)
    return eqx.combine(jax.tree.map(lambda *leaves: jnp.stack(leaves), *arrays), rest[0])


def _kind(layer: Layer) -> Any:
    """What two layers must share to be repeats of one: structure, options, shapes and dtypes."""
    leaves, structure = jax.tree.flatten(layer)
    return structure, [(leaf.shape, leaf.dtype) if is_shaped(leaf) else leaf for leaf in leaves]


def _longest(kinds: Sequence[Any]) -> tuple[int, int]:
    """Returns the period, and its repeats, that covers the most layers from the first one on."""
    best = (1, 1)
    for period in range(1, len(kinds) // 2 + 1):
        repeats = 1
        while kinds[repeats * period : (repeats + 1) * period] == kinds[:period]:
            repeats += 1
        if repeats > 1 and period * repeats > best[0] * best[1]:
            best = (period, repeats)
    return best
