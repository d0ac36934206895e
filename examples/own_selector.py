"""A selector of your own: one class with two methods joins every layer, loss, metric and test."""

from fractions import Fraction
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp

import mode


class Recent(mode.AbstractSelector):
    """Takes the last tokens of a sequence, whatever they are: a sliding window over depth."""

    looks_ahead: ClassVar[bool] = False

    def share(self, fraction: Fraction) -> Fraction:
        return fraction

    def __call__(self, request: mode.Request, *, key: jax.Array | None = None) -> mode.Selection:
        later = jnp.flip(jnp.cumsum(jnp.flip(request.valid, -1), axis=-1), -1)
        asked = ((later <= request.slots) & request.valid)[..., None]
        asked = jnp.broadcast_to(asked, (*asked.shape[:-1], request.num_experts))
        index = mode.first_come(asked, request.slots)
        return mode.Selection(index, request.without_noop(asked.sum(-2, dtype=jnp.int32)))


block_key, router_key = jax.random.split(jax.random.key(0))
block = mode.TransformerBlock(32, num_heads=4, key=block_key)
layer = mode.MixtureOfDepths(block, 32, capacity=0.25, key=router_key)
layer = eqx.tree_at(lambda m: m.router.select, layer, Recent())

mode.testing.assert_static_shapes(layer, tokens=(16, 64), dim=32)
mode.testing.assert_exact_capacity(layer, dim=32)
mode.testing.assert_residual_identity(layer, dim=32)
mode.testing.assert_router_gradients(layer, dim=32)
_, (routing,) = layer(jnp.ones((1, 16, 32)))
print("took", routing.index[0, 0].tolist(), "and passed every check")
