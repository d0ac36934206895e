# %% [markdown]
# # Recursion: one block, as often as a token needs it
#
# A recursive model has one set of weights and applies it in rounds. `mode.Loop` does so for all
# tokens; `mode.Recursion` has a router before each round, and tokens that leave are done. A few
# minutes on two cores.

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
STEPS = 10 if SMALL else 300
BATCH, TOKENS, DIM, ROUNDS = 16, 128, 64, 3
plt.style.use(STYLE)

# %% [markdown]
# ## Three models with the same weights
#
# A layer below and one above are each on their own; the block between them goes round. *narrowing*
# computes all tokens in the first round, half in the second and a quarter in the third: as many as
# a depth of 1.75. Its control selects the same numbers at random.

# %%
CAPACITIES = (1, 0.5, 0.25)


def own(key):
    return mode.Residual(mode.TransformerBlock(DIM, num_heads=4, key=key))


def loop(key):
    return mode.Loop(mode.TransformerBlock(DIM, num_heads=4, key=key), repeats=ROUNDS)


def narrowing(key, select: mode.AbstractSelector = mode.ExpertChoice()):
    block_key, router_key = jax.random.split(key)
    block = mode.TransformerBlock(DIM, num_heads=4, key=block_key)
    return mode.Recursion(block, DIM, CAPACITIES, select=select, key=router_key)


def narrowing_at_random(key):
    return narrowing(key, mode.RandomChoice())


middle = {"loop": loop, "narrowing": narrowing, "random": narrowing_at_random}
models = {
    name: mode.Transformer(256, DIM, [own, layer, own], key=jax.random.key(0))
    for name, layer in middle.items()
}
shape = jax.ShapeDtypeStruct((1, TOKENS), jnp.int32)
for name, model in models.items():
    count = mode.count_flops(model, shape, key=jax.random.key(0)).total / TOKENS
    size = sum(leaf.size for leaf in jax.tree.leaves(eqx.filter(model, mode.is_trainable(model))))
    print(f"{name:10} {size:9,} parameters, {count:9,.0f} FLOPs per token")

# %% [markdown]
# ## Training

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
        return loss + 0.03 * sum(map(mode.router_l1_loss, routings)), (loss, routings)

    (_, (loss, routings)), gradients = jax.value_and_grad(objective, has_aux=True)(parameters)
    updates, state = optimizer.update(gradients, state, parameters)
    model = eqx.combine(eqx.apply_updates(parameters, updates), rest)
    return mode.update_router_state(model, routings), state, loss


for name, model in models.items():
    rng = np.random.default_rng(0)  # the same text for all
    state = optimizer.init(eqx.filter(model, mode.is_trainable(model)))
    for step in range(STEPS):
        key = jax.random.fold_in(jax.random.key(1), step)
        model, state, loss = train_step(model, state, batch_of(train, rng, BATCH), key)
        if step % 100 == 0 or step == STEPS - 1:
            print(f"{name:10} step {step:3}, {float(loss) / np.log(2):.3f} bits per byte")
    models[name] = model

# %% [markdown]
# ## Held-out, causally, and by depth
#
# A record for each round. A token that left is not `valid` in the rounds after it.

# %%
rng = np.random.default_rng(1)
tests = [batch_of(held_out, rng, 64) for _ in range(1 if SMALL else 4)]
evaluate = eqx.filter_jit(next_byte_loss)
calibrated = mode.calibrate_thresholds(models["narrowing"], batch_of(train, rng, 64)[:, :-1])
rows = {
    "loop": models["loop"],
    "narrowing, top-k": models["narrowing"],
    "narrowing, causally": mode.make_causal(calibrated),
    "random": models["random"],
}
for name, model in rows.items():
    results = [evaluate(model, tokens, jax.random.key(2)) for tokens in tests]
    loss = np.mean([float(loss) for loss, _ in results]) / np.log(2)
    rounds = [float(routing.selected.mean()) for routing in results[0][1]]
    depth = f"mean depth {sum(rounds):.2f}" if rounds else f"depth {ROUNDS}"
    print(f"{name:20} {loss:.3f} bits per byte, {depth}")

# %% [markdown]
# These are equal *steps*: the narrowing model has spent fewer FLOPs. `random` beside it says what
# the choice of tokens is worth; [Evidence](../../benchmarks/EVIDENCE.md) has the same at equal
# FLOPs over five seeds. In the picture, strips are rounds, the first at the bottom.

# %%
text = tests[0][0, :-1]
_, routings = rows["narrowing, causally"](text[None])
selected = [np.asarray(routing.selected).reshape(TOKENS).astype(int) for routing in routings]
counts = {"under the causal rule": tuple(tuple(layer.tolist()) for layer in selected)}
RoutingMap("", tuple(text.tolist()), (), tuple(range(1, ROUNDS + 1)), counts).draw("blocks")

# %% [markdown]
# ## Sampling
#
# Each round has a cache that holds its tokens alone. `share_keys=True` lets all rounds read the
# keys of the first.

# %%
fast = mode.make_causal(calibrated, max_capacity=0.75)
samplers = {"loop": mode.unstack_layers(models["loop"]), "narrowing": mode.unstack_layers(fast)}
prompts = tests[0][:32, :16]
seconds = {name: [] for name in samplers}
for turn in range(2 if SMALL else 6):
    for name, sampler in samplers.items():  # in turns, so that both see the same machine
        start = time.perf_counter()
        generation = mode.generate(sampler, prompts, steps=4 if SMALL else 64, max_tokens=256)
        jax.block_until_ready(generation.tokens)
        if turn:  # the first turn compiles
            seconds[name].append(time.perf_counter() - start)
ratio = np.median(seconds["loop"]) / np.median(seconds["narrowing"])
print(f"narrowing decodes {ratio:.2f} times as fast as the loop, batch {len(prompts)}")

# %% [markdown]
# At 64 features a step is bound by its many small operations, not by bytes;
# `benchmarks/recursion.py` measures larger models, and
# [`benchmarks/README.md`](../../benchmarks/README.md) has its numbers.
#
# ## Other ways to leave
#
# - `mode.TokenChoiceRecursion`: a token chooses its depth at the start.
# - `select=mode.UpdateThreshold(least=0.1)`: it leaves when a round changes it by less than a
#   tenth.
# - Both are causal as they are. [Getting started](../getting-started.md#depth-in-other-forms).
