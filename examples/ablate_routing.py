"""One set of weights under several rules: how much does the choice of tokens decide?"""

import equinox as eqx
import jax
import jax.numpy as jnp

import mode


model_key, tokens_key, noise_key = jax.random.split(jax.random.key(0), 3)
model = mode.mod_decoder(256, 64, depth=4, num_heads=4, capacity=0.25, key=model_key)
tokens = jax.random.randint(tokens_key, (2, 64), 0, 256)
learned, routings = model(tokens)

for select in (mode.Strided(), mode.RandomChoice(), mode.Replay(routings[0])):
    # A stack's one router stands for all its layers, so a recorded routing replays on all of them.
    arm = mode.map_routers(lambda r, s=select: eqx.tree_at(lambda r: r.select, r, s), model)
    logits, _ = arm(tokens, key=noise_key)
    change = jnp.abs(logits - learned).mean() / jnp.abs(learned).mean()
    print(f"{type(select).__name__:13} changes the logits by {change:.1%}")
