"""Train a small byte-level Mixture-of-Depths model on this library's own source, in half a minute.

Everything is here: data, model, loss, optimizer, router state, and the causal evaluation.
"""

from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import mode


STEPS, BATCH, TOKENS, DIM = 120, 16, 128, 64

text = b"".join(path.read_bytes() for path in sorted(Path(mode.__file__).parent.rglob("*.py")))
data = np.frombuffer(text, np.uint8).astype(np.int32)
rng = np.random.default_rng(0)


def batch() -> jax.Array:
    starts = rng.integers(0, len(data) - TOKENS - 1, BATCH)
    return jnp.stack([data[start : start + TOKENS + 1] for start in starts])


def next_byte_loss(model, tokens):
    logits, routings = model(tokens[:, :-1])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    return losses.mean(), routings


@eqx.filter_jit
def train_step(model, state, tokens, *, under_threshold):
    parameters, rest = eqx.partition(model, mode.is_trainable(model))

    def loss(parameters):
        model = eqx.combine(parameters, rest)
        if under_threshold:  # at the cost of top-k: with as many slots
            model = mode.make_causal(model, max_capacity=None)
        return next_byte_loss(model, tokens)

    (value, routings), gradients = jax.value_and_grad(loss, has_aux=True)(parameters)
    updates, state = optimizer.update(gradients, state, parameters)
    model = eqx.combine(eqx.apply_updates(parameters, updates), rest)
    return mode.update_router_state(model, routings), state, value


model = mode.mod_transformer(256, DIM, depth=4, num_heads=4, key=jax.random.key(0))
optimizer = optax.adamw(optax.cosine_decay_schedule(3e-3, STEPS))
state = optimizer.init(eqx.filter(model, mode.is_trainable(model)))
for step in range(STEPS):
    # The last fifth runs under the thresholds that the model will be sampled with.
    late = step >= STEPS * 4 // 5
    model, state, loss = train_step(model, state, batch(), under_threshold=late)
    if step % 20 == 0 or step == STEPS - 1:
        print(f"step {step:4d}  loss {loss:.3f} nats per byte")

evaluate = eqx.filter_jit(next_byte_loss)
loss, routings = evaluate(mode.make_causal(model), batch())
computed = np.mean([mode.routing_metrics(routing).compute for routing in routings])
print(f"causal loss {loss:.3f}, {computed:.1%} of the tokens computed in a routed layer")
