"""A selector of your own: one class with two methods joins every layer, loss, metric and test."""

from fractions import Fraction

import equinox as eqx
import jax
import jax.numpy as jnp

import mode


class Periodic(mode.AbstractTokenwise):
    """Every so many tokens, whatever they are. Each token asks for itself, so nothing looks ahead;
    the base class seats those that ask, in time order, as long as there are slots."""

    period: int = eqx.field(static=True)

    def share(self, fraction: Fraction) -> Fraction:
        return fraction  # as many slots as the layer's capacity says

    def asks(self, request: mode.Request) -> jax.Array:
        place = jnp.cumsum(request.valid, axis=-1) - 1
        return jnp.repeat((place % self.period == 0)[..., None], request.num_experts, axis=-1)


block_key, router_key = jax.random.split(jax.random.key(0))
block = mode.TransformerBlock(32, num_heads=4, key=block_key)
layer = mode.MixtureOfDepths(block, 32, capacity=0.25, key=router_key)
layer = eqx.tree_at(lambda m: m.router.select, layer, Periodic(4))

mode.testing.assert_static_shapes(layer, tokens=(16, 64), dim=32)
mode.testing.assert_exact_capacity(layer, dim=32)
mode.testing.assert_residual_identity(layer, dim=32)
mode.testing.assert_causal(layer, dim=32)
mode.testing.assert_router_gradients(layer, dim=32)
_, (routing,) = layer(jnp.ones((1, 16, 32)))
print("took", routing.index[0, 0].tolist(), "and passed every check")
