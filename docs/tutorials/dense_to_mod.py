# %% [markdown]
# # From a dense model to Mixture-of-Depths
#
# A small language model of your own, a training loop of your own, and one changed line: half of
# the layers then compute one token of eight. What does it cost, what does it save, and is it the
# router that does it? A few minutes on two cores.

# %%
import os
import time
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import mode
from mode.lab.figures import STYLE
from mode.lab.routing_map import RoutingMap


SMALL = bool(os.environ.get("TUTORIAL_SMALL"))  # to see that it runs
STEPS = 20 if SMALL else 500
BATCH, TOKENS, DIM, LAYERS = 16, 128, 64, 4
plt.style.use(STYLE)

# %% [markdown]
# ## The model
#
# A *block* returns the update of the residual stream; `mode.TransformerBlock` is one, and a module
# of yours can be one. `mode.Residual(block)` is the layer that everybody knows: $x + f(x)$ for all
# tokens. `mode.MixtureOfDepths(block, ...)` is the same for the tokens that its router selects.
# The others pass by.


# %%
def dense_layer(key):
    return mode.Residual(mode.TransformerBlock(DIM, num_heads=4, key=key))


def routed_layer(key):
    block_key, router_key = jax.random.split(key)
    block = mode.TransformerBlock(DIM, num_heads=4, key=block_key)
    return mode.MixtureOfDepths(block, DIM, capacity=0.125, key=router_key)


def random_layer(key):  # the control: the same layer with another selector
    layer = routed_layer(key)
    return eqx.tree_at(lambda layer: layer.router.select, layer, mode.RandomChoice())


upper = {"dense": dense_layer, "routed": routed_layer, "random": random_layer}
models = {
    name: mode.Transformer(256, DIM, [dense_layer, layer], LAYERS // 2, key=jax.random.key(0))
    for name, layer in upper.items()
}

# %% [markdown]
# What a forward pass takes is counted, not estimated:

# %%
shape = jax.ShapeDtypeStruct((1, TOKENS), jnp.int32)
flops = {
    name: mode.count_flops(model, shape, key=jax.random.key(0)).total / TOKENS
    for name, model in models.items()
}
for name, count in flops.items():
    print(f"{name:7} {count:9,.0f} FLOPs per token, {count / flops['dense']:.2f} of dense")

# %% [markdown]
# ## Training
#
# The text is this library's own source. Two lines of the step are about routing: a small cost of
# slots, without which a router hardly learns, and the running quantiles, which sampling needs.

# %%
source = b"".join(path.read_bytes() for path in sorted(Path(mode.__file__).parent.rglob("*.py")))
data = np.frombuffer(source, np.uint8).astype(np.int32)
train, held_out = data[: -len(data) // 10], data[-len(data) // 10 :]


def batch_of(text, rng, size):
    starts = rng.integers(0, len(text) - TOKENS - 1, size)
    return jnp.stack([text[start : start + TOKENS + 1] for start in starts])


def next_byte_loss(model, tokens, key):
    logits, routings = model(tokens[:, :-1], key=key)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    return losses.mean(), routings


optimizer = optax.chain(
    optax.clip_by_global_norm(1.0), optax.adamw(optax.cosine_decay_schedule(1e-2, STEPS))
)


@eqx.filter_jit
def train_step(model, state, tokens, key):
    parameters, rest = eqx.partition(model, mode.is_trainable(model))

    def objective(parameters):
        loss, routings = next_byte_loss(eqx.combine(parameters, rest), tokens, key)
        cost = sum(map(mode.router_l1_loss, routings))  # 0 of a model without routers
        return loss + 0.03 * cost, (loss, routings)

    (_, (loss, routings)), gradients = jax.value_and_grad(objective, has_aux=True)(parameters)
    updates, state = optimizer.update(gradients, state, parameters)
    model = eqx.combine(eqx.apply_updates(parameters, updates), rest)
    return mode.update_router_state(model, routings), state, loss


# %%
losses, seconds = {}, {}
for name, model in models.items():
    rng = np.random.default_rng(0)  # the same text for all
    state = optimizer.init(eqx.filter(model, mode.is_trainable(model)))
    curve, start = [], 0.0
    for step in range(STEPS):
        key = jax.random.fold_in(jax.random.key(1), step)
        if step == 5:  # compiled by then
            start = time.perf_counter()
        model, state, loss = train_step(model, state, batch_of(train, rng, BATCH), key)
        curve.append(float(loss))
    seconds[name] = (time.perf_counter() - start) / (STEPS - 5)
    models[name], losses[name] = model, np.array(curve)
    print(
        f"{name:7} {1000 * seconds[name]:4.0f} ms per step, "
        f"{seconds[name] / seconds['dense']:.2f} of dense"
    )

# %% [markdown]
# ## Loss, by steps and by FLOPs
#
# A step of the routed model takes less time, but not as much less as FLOPs say: at 64 features it
# is bound by many small operations. [Larger models](../../benchmarks/README.md) turn 92 to 93 % of
# the FLOPs saved into time.
#
# On the left all models have seen the same text. On the right they have spent the same: that is
# the comparison of the paper, and there a model of cheap layers has run more steps.

# %%
figure, panels = plt.subplots(1, 2, figsize=(9, 3.2), sharey=True, layout="constrained")
styles = {"dense": ("black", "-"), "routed": ("#0072B2", "-"), "random": ("#999999", "--")}
window = max(1, STEPS // 30)
for name, curve in losses.items():
    smooth = np.convolve(curve, np.ones(window) / window, "valid") / np.log(2)
    steps = np.arange(len(smooth)) + window
    colour, line = styles[name]
    panels[0].plot(steps, smooth, color=colour, linestyle=line, label=name)
    spent = steps * BATCH * TOKENS * 3 * flops[name]  # the backward pass is twice the forward pass
    panels[1].plot(spent / 1e12, smooth, color=colour, linestyle=line, label=name)
panels[0].set(xlabel="steps", ylabel="training loss, bits per byte")
panels[1].set(xlabel="training FLOPs, $10^{12}$")
panels[1].legend(title=f"{LAYERS} layers of {DIM}, every other one:")
figure.suptitle("Bytes of Python source, means of 30 parts of training", fontsize=10)

# %% [markdown]
# ## Held-out, and causally
#
# Top-k looks at the future: whether a token is selected depends on the tokens after it. So a loss
# under top-k is not the loss of a model that writes text. `mode.calibrate_thresholds` measures the
# trained routers, and `mode.make_causal` replaces top-k by thresholds, under which a token's
# selection depends on the token alone.

# %%
rng = np.random.default_rng(1)
tests = [batch_of(held_out, rng, 64) for _ in range(1 if SMALL else 4)]
evaluate = eqx.filter_jit(next_byte_loss)


def held_out_loss(model):
    values = [float(evaluate(model, tokens, jax.random.key(2))[0]) for tokens in tests]
    return np.mean(values) / np.log(2)


calibrated = mode.calibrate_thresholds(models["routed"], batch_of(train, rng, 64)[:, :-1])
causal = mode.make_causal(calibrated)
for name, model in {**models, "routed, causally": causal}.items():
    print(f"{name:17} {held_out_loss(model):.3f} bits per byte")

# %% [markdown]
# Read the control before anything else. If *random* is as good as *routed*, the router has found
# nothing that this model needs, and the gain is that of skipping. At this size and on this text
# that is what happens, and [Evidence](../../benchmarks/EVIDENCE.md) says the same with five seeds
# and intervals. Where it is known which tokens matter, the same router finds them: that is the
# tutorial [Routers that learn](routers_that_learn.md).
#
# ## Which bytes were computed
#
# Every layer returns its record. Its `selected` is a mask of tokens.

# %%
text = tests[0][:1, :-1]
_, (routing,) = causal(text)
selected = np.asarray(routing.selected)[:, 0, :, 0].astype(int)  # [routed layers, tokens]
print("fraction of tokens computed, by routed layer:", selected.mean(axis=1).round(3))
counts = {"under the causal rule": tuple(map(tuple, selected.tolist()))}
RoutingMap("", tuple(text[0].tolist()), (), tuple(range(2, LAYERS + 1, 2)), counts).draw("blocks")

# %% [markdown]
# ## Text from it
#
# Caches hold the computed tokens alone.

# %%
prompt = jnp.array([list(b"def ")])
fast = mode.unstack_layers(mode.make_causal(calibrated, max_capacity=0.25))
generation = mode.generate(fast, prompt, steps=8 if SMALL else 60, max_tokens=TOKENS)
print(bytes(generation.tokens[0].tolist()).decode(errors="replace"))

# %% [markdown]
# ## What to take along
#
# - The change is one line: which layer a block is put into.
# - Compare at equal FLOPs, causally, with random selection beside it.
# - [Choose a router](../choose.md), [read a record](../record.md), [sample](../sampling.md).
