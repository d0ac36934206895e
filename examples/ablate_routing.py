"""Run one set of weights under several selectors: how much depends on which tokens are selected?"""

import equinox as eqx
import jax
import jax.numpy as jnp

import mode


model_key, tokens_key, noise_key = jax.random.split(jax.random.key(0), 3)
model = mode.mod_transformer(256, 64, depth=4, num_heads=4, capacity=0.25, key=model_key)
tokens = jax.random.randint(tokens_key, (2, 64), 0, 256)
learned, routings = model(tokens)

for select in (mode.Strided(), mode.RandomChoice(), mode.Replay(routings[0])):
    # The one router of a stack has the leaves of all its layers, and so has its recorded routing.
    arm = mode.map_routers(lambda r, s=select: eqx.tree_at(lambda r: r.select, r, s), model)
    logits, _ = arm(tokens, key=noise_key)
    change = jnp.abs(logits - learned).mean() / jnp.abs(learned).mean()
    print(f"{type(select).__name__:13} changes the logits by {change:.1%}")
