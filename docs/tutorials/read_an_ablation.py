# %% [markdown]
# # Read an ablation
#
# `mode-lab ablate` trains models that differ in their routing alone, at equal training FLOPs. This
# page runs a short one and reads it: what a good loss means, and what it does not. A few
# minutes on two cores.

# %%
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from IPython.display import Image


SMALL = bool(os.environ.get("TUTORIAL_SMALL"))  # to see that it runs
out = Path(tempfile.mkdtemp()) / "ablation"
arms = ["dense", "left-out", "mod", "mod-random", "mod-queries"][: 3 if SMALL else 5]
options = ["--no-recall", "--budget", "0.02" if SMALL else "0.5", "--arms", *arms]
print("mode-lab ablate", *options)

# %% [markdown]
# | arm | what it is |
# |---|---|
# | `dense` | every token through every block |
# | `left-out` | dense without the blocks that the others route: **what they are worth** |
# | `mod` | Mixture-of-Depths: the router selects an eighth of the tokens for every other block |
# | `mod-random` | the same with random selection: **what the router is worth** |
# | `mod-queries` | Mixture-of-Depths in which skipped tokens still leave keys and values |
#
# In a terminal one runs the command as it is printed above. It goes on where it was stopped.

# %%
command = [sys.executable, "-m", "mode.lab", "--quiet", "ablate", "--out", str(out), *options]
subprocess.run(command, check=True, stdout=subprocess.DEVNULL)

# %% [markdown]
# ## First: the loss at equal FLOPs, causally
#
# Every table of `report.md` is in `report.json`, unrounded.

# %%
tables = json.loads((out / "report.json").read_text())["content"]["tables"]
losses = pd.DataFrame(tables["equal FLOPs"]).set_index("arm")
causal = "bits / byte, CAUSAL"
print(losses[["steps", "bits / byte, top-k", causal]].round(3))

# %% [markdown]
# - **Only the causal column counts.** Top-k over a sequence looks at the future, so its loss is of
#   something that no sampler can do. The distance between the two columns is what the causal rule
#   costs.
# - **Cheaper arms took more steps.** That is the whole idea: what is saved per token is spent on
#   more tokens.
# - **`mod` below `dense` is not yet a success of routing.** Look at the two controls: where
#   `left-out` is as low, the blocks that were skipped were not worth their cost at this size;
#   where `mod-random` is as low, any eighth of the tokens would have done.
#
# ## Second: what the routed blocks are worth, at equal steps
#
# Here every arm has seen the same text. *Recovery* is (left out - arm) / (left out - dense): the
# part of the routed blocks' worth that an arm has while its blocks compute few tokens.

# %%
worth = pd.DataFrame(tables["recovery"]).set_index("arm")
print(worth.round(3))

# %%
order = [arm for arm in worth.index if arm not in ("dense", "left-out")]
figure, axes = plt.subplots(figsize=(7, 0.35 * len(worth) + 0.9), layout="constrained")
low, high = worth[causal]["dense"], worth[causal]["left-out"]
axes.axvspan(min(low, high), max(low, high), color="#F0F0EE", label="worth of the routed blocks")
for arm in order:
    axes.plot(worth[causal][arm], arm, "o", color="#0072B2")
    axes.plot(worth["without its updates"][arm], arm, "x", color="#D55E00")
axes.plot([], [], "o", color="#0072B2", label="the arm")
axes.plot([], [], "x", color="#D55E00", label="the same model without its routed updates")
axes.set(
    xlabel="held-out bits per byte, causally, at equal steps (lower is better)",
    ylim=(-0.6, len(order) - 0.4),
)
figure.legend(loc="outside lower center", ncols=3, fontsize=8, frameon=False)
axes.set_title("6 layers of 64, Python source, one seed", fontsize=9)

# %% [markdown]
# *Without its updates* is the trained model with every routing weight 0: the cross of the picture.
# Where it lies on the dot, **the model does not use its routed blocks**. Its recovery then comes
# from how the rest was trained, and no router could be told from another. That is a finding about
# the model and the text, not about the router; `mod-queries` usually uses them most.
#
# ## Third: which tokens
#
# The report draws which tokens each routed layer selected.

# %%
Image(out / "routing.png", width=900)

# %% [markdown]
# ## What one ablation cannot say
#
# - **One seed is a lead.** Recovery moves by tens of per cent between seeds. Run `--seed 1` and
#   `--seed 2` into other folders before a difference in the second decimal is worth a word.
# - **This text does not say which tokens matter.** Where that is known, a router can be marked
#   right or wrong: [Routers that learn](routers_that_learn.md).
# - **Toy scale.** [Evidence](../../benchmarks/EVIDENCE.md) has sizes and budgets, with intervals.
