"""What each layer of a trained model is worth, and which ones to route."""

import dataclasses
import math

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

import mode
from mode._types import Scalar
from mode.nn import Layer
from mode.routing import masked_mean

from ..data import Batch
from ..step import cross_entropy


@dataclasses.dataclass(frozen=True)
class LayerWorth:
    """One layer: the mean cosine of its input and its output, and the loss without it, in nats."""

    layer: int
    cosine: float
    loss_without: float


@eqx.filter_jit
def _run(layer: Layer, x: Float[Array, "batch tokens dim"], info: mode.TokenInfo) -> Array:
    return layer(x, info)[0]


@eqx.filter_jit
def _loss(model: mode.Transformer, x: Float[Array, "batch tokens dim"], batch: Batch) -> Scalar:
    """The loss of hidden states of the last layer."""
    return cross_entropy(model.unembed(x), batch)


@eqx.filter_jit
def _cosine(before: Array, after: Array, info: mode.TokenInfo) -> Scalar:
    products = jnp.sum(before * after, axis=-1)
    norms = jnp.linalg.norm(before, axis=-1) * jnp.linalg.norm(after, axis=-1)
    return masked_mean(products / norms, info.valid)


def measure_layers(model: mode.Transformer, batch: Batch) -> tuple[float, list[LayerWorth]]:
    """Runs the model once, and once without each layer, on the same text.

    **Returns:** the loss of the whole model in nats per token, and a record for each layer.
    """
    layers = mode.list_layers(model)
    states = [model.embed(batch.inputs, batch.info)]
    for layer in layers:
        states.append(_run(layer, states[-1], batch.info))
    worths = []
    for number in range(len(layers)):
        x = states[number]
        for layer in layers[number + 1 :]:
            x = _run(layer, x, batch.info)
        cosine = float(_cosine(states[number], states[number + 1], batch.info))
        worths.append(LayerWorth(number, cosine, float(_loss(model, x, batch))))
    return float(_loss(model, states[-1], batch)), worths


def propose_layers(
    model: mode.Transformer, worths: list[LayerWorth], *, capacity: float, form: str, save: float
) -> list[int]:
    """Returns the fewest layers that save a fraction of the FLOPs: those of the least loss in all.

    No two are neighbours, so each routed layer is between dense ones, which the paper found
    crucial. Where so much cannot be saved, returns as many layers as there can be.
    """
    tokens = jax.ShapeDtypeStruct((1, 512), jnp.int32)
    whole = mode.count_flops(model, tokens).total
    chosen: list[int] = []
    for count in range(1, (len(worths) + 1) // 2 + 1):
        chosen = _least_loss(worths, count)
        routed = eqx.filter_eval_shape(
            lambda model, layers: mode.pretrained.convert(
                model, layers, capacity=capacity, form=form, key=jax.random.key(0)
            ),
            model,
            chosen,
        )
        if mode.count_flops(routed, tokens).total <= (1 - save) * whole:
            break
    return chosen


def _least_loss(worths: list[LayerWorth], count: int) -> list[int]:
    """The `count` layers of the least sum of losses, no two neighbours, by dynamic programming.

    Taking the best layer first is not enough: it can leave none but the first and the last ones,
    which are worth the most.
    """
    # best[n]: loss and layers of the best choice of n among the layers so far; `earlier` is the
    # same without the layer just seen.
    none: list[tuple[float, tuple[int, ...]]] = [(0.0, ())] + [(math.inf, ())] * count
    earlier, best = none, none
    for worth in sorted(worths, key=lambda worth: worth.layer):
        with_it = [
            (loss + worth.loss_without, (*layers, worth.layer)) for loss, layers in earlier[:-1]
        ]
        earlier, best = best, [best[0], *map(min, best[1:], with_it)]
    return list(best[count][1])
