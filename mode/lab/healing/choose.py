"""What each layer of a trained model is worth, and which ones to route."""

import dataclasses

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
    """Returns the layers of the least loss that save a fraction of the FLOPs, no two neighbours.

    So each routed layer is between dense ones, which the paper found crucial. Fewer are returned
    where no layer is left.
    """
    tokens = jax.ShapeDtypeStruct((1, 512), jnp.int32)
    whole = mode.count_flops(model, tokens).total
    chosen: list[int] = []
    for worth in sorted(worths, key=lambda worth: worth.loss_without):
        if {worth.layer - 1, worth.layer + 1} & set(chosen):
            continue
        chosen.append(worth.layer)
        routed = eqx.filter_eval_shape(
            lambda model: mode.pretrained.convert(
                model, sorted(chosen), capacity=capacity, form=form, key=jax.random.key(0)
            ),
            model,
        )
        if mode.count_flops(routed, tokens).total <= (1 - save) * whole:
            break
    return sorted(chosen)
