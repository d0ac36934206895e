"""Put a router around a module of your own, and read its decisions."""

import equinox as eqx
import jax
import jax.numpy as jnp

import mode


class Mixer(eqx.Module):
    """A module of one sequence, [tokens, dim], that has its own skip connection."""

    linear: eqx.nn.Linear

    def __init__(self, dim: int, *, key: jax.Array):
        self.linear = eqx.nn.Linear(dim, dim, key=key)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        mean_so_far = jnp.cumsum(tokens, axis=0) / jnp.arange(1.0, len(tokens) + 1)[:, None]
        return tokens + jax.vmap(self.linear)(mean_so_far)


dim = 16
module_key, router_key, x_key = jax.random.split(jax.random.key(0), 3)
layer = mode.MixtureOfDepths(
    mode.Delta(Mixer(dim, key=module_key)), dim, capacity=0.25, key=router_key
)
x = jax.random.normal(x_key, (2, 12, dim))
hidden, (routing,) = layer(x)

print("tokens that took part:", routing.index[:, 0].tolist())
print("their weights:", routing.weight[0, 0].round(2).tolist())
print("tokens that passed by unchanged:", int((hidden == x).all(-1).sum()), "of", 2 * 12)
