# %% [markdown]
# # Routers that learn
#
# On text nobody knows which tokens a router should select. In *recall among filler* it is known:
# four values stand early in a sequence, four questions late, and everything between is filler. A
# routed layer has eight slots: exactly enough for the tokens that matter. A few minutes on two
# cores.

# %%
import os

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch

import mode
from mode.lab.commands import TASK_RECIPE
from mode.lab.tasks.arms import train_and_score
from mode.lab.tasks.sequences import task_named


SMALL = bool(os.environ.get("TUTORIAL_SMALL"))  # to see that it runs
task = task_named("recall", density=0.0625)
steps = 10 if SMALL else task.steps
print(f"{task.about}; {task.slots} slots, {steps} steps; classes: {', '.join(task.classes)}")

# %% [markdown]
# ## Three routers and an oracle
#
# Each model has a dense layer and, above it, the routed one. *oracle* is told the class of every
# token; *random* draws its tokens; *learned* is the library's default.

# %%
scores = {}
for arm in ("oracle", "random", "learned"):
    top_k, causal = train_and_score(task, arm, TASK_RECIPE, steps=steps, seed=0)
    scores[arm] = causal or top_k  # an oracle has no causal rule

# %% [markdown]
# ## The router of the paper's equation 1
#
# Equation 1 multiplies a token's own update by its weight: $x_i + r_i f(\tilde X)_i$. So the
# gradient of $r_i$ is the loss's gradient at token $i$ times *that token's own update*. A question
# is rewarded: its output is the answer. A value is not: nobody looks at its output, **others read
# its key and value**. The same layer without what the library adds for this:


# %%
def equation_1(block, dim, capacity, *, key):
    return mode.MixtureOfDepths(
        block, dim, capacity, gate=mode.IdentityGate(), weigh_values=False, key=key
    )


top_k, causal = train_and_score(
    task, "learned", TASK_RECIPE, steps=steps, seed=0, make_routed=equation_1
)
scores["equation 1"] = causal or top_k

# %% [markdown]
# ## Who got a slot
#
# Chance is an eighth.

# %%
print(f"{'':12}accuracy" + "".join(f"{name:>10}" for name in task.classes))
for arm, score in scores.items():
    print(f"{arm:12}{score.accuracy:8.2f}" + "".join(f"{hit:10.2f}" for hit in score.hits.values()))

# %%
needed_classes = [task.classes.index(name) for name in task.needed]
colours = ["#F0F0EE", "#999999", "#E69F00", "#00507D"]
meaning = ["filler", "filler with a slot", "needed, without a slot", "needed, with a slot"]
figure, panels = plt.subplots(len(scores), 1, figsize=(9, 3.6), layout="constrained")
for axes, (arm, score) in zip(panels, scores.items(), strict=True):
    needed = np.isin(score.classes, needed_classes)
    axes.pcolormesh(
        (2 * needed + np.array(score.selected))[:4],
        cmap=ListedColormap(colours),
        vmin=0,
        vmax=3,
        edgecolors="white",
    )
    axes.set_ylabel(arm, rotation=0, ha="right", va="center")
    axes.set(xticks=[], yticks=[])
figure.legend(
    handles=[
        Patch(facecolor=c, edgecolor="#CCCCCC", label=m)
        for c, m in zip(colours, meaning, strict=True)
    ],
    loc="outside lower center",
    ncols=4,
    frameon=False,
)
figure.suptitle("Recall, seed 0: four sequences for each router, from left to right", fontsize=10)

# %% [markdown]
# ## What makes it learn
#
# Three things together, each of which alone does little:
#
# 1. **The weight reaches the values.** `weigh_values=True`, the default, multiplies a token's
#    attention values by its weight, so that being read is rewarded. It is exact in decoding,
#    because caches hold weighted values.
# 2. **Slots cost something.** `mode.router_l1_loss`, with a small coefficient, lets the weight of
#    a useless token fall, until a token that was never tried comes within reach of top-k.
# 3. **More tokens are tried at first.** `mode.capacity_schedule` begins with all of them.
#
# [ROUTERS.md](../../benchmarks/ROUTERS.md) leaves out one after the other, over five seeds; this
# page is one seed. With a router of your own in place of `equation_1` this is a test bench: [Test
# a router of your own](../own-router.md).
