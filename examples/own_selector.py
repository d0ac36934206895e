"""Write a selector of your own: one class with one method joins every layer, loss and metric."""

from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp

import mode


class Periodic(mode.AbstractTokenSelector):
    """Requests every `period`-th token, whatever it is.

    Each token decides for itself, by its position in the sequence and not among `inputs`, which are
    the new tokens alone in a decoding step. So the rule is causal and decodes; the base class gives
    slots to the tokens that request one, in time order, as long as there are any.
    """

    period: int = eqx.field(static=True)
    max_capacity: ClassVar[mode.Capacity | None] = None  # the layer's own capacity

    def requested_mask(self, inputs: mode.RoutingInputs) -> jax.Array:
        assert inputs.positions is not None
        wanted = inputs.positions % self.period == 0
        return jnp.repeat(wanted[..., None], inputs.num_experts, axis=-1)


block_key, router_key, x_key = jax.random.split(jax.random.key(0), 3)
block = mode.TransformerBlock(32, num_heads=4, key=block_key)
layer = mode.MixtureOfDepths(block, 32, capacity=0.25, key=router_key)
layer = eqx.tree_at(lambda m: m.router.select, layer, Periodic(4))

x = jax.random.normal(x_key, (2, 16, 32))
mode.testing.assert_static_shapes(layer, x)
mode.testing.assert_exact_capacity(layer, x)
mode.testing.assert_residual_identity(layer, x)
mode.testing.assert_causal(layer, x)
mode.testing.assert_router_gradients(layer, x)
model = mode.Transformer(64, 32, [lambda key: layer], key=x_key)
mode.testing.assert_decodes(model, jax.random.randint(x_key, (2, 16), 0, 64))
_, (routing,) = layer(x)
print("selected", routing.index[0, 0].tolist(), "and passed every check")
