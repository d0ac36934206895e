"""Test a router of your own where the right answer is known: associative recall among filler.

Eight of 64 tokens matter, and the routed layer has eight slots. `train_and_score` trains a small
model around the layer that you build and says which tokens got a slot. 800 steps, a minute on two
cores, show what a router learns; the 20 here only show how.
"""

import sys
from collections.abc import Callable

import jax

import mode
from mode.lab.options import Recipe
from mode.lab.tasks.arms import train_and_score
from mode.lab.tasks.sequences import recall


def my_layer(
    block: Callable, dim: int, capacity: mode.Capacity, *, key: jax.Array
) -> mode.MixtureOfDepths:
    """Equation 1 as it is printed: the raw logit, on the update alone."""
    return mode.MixtureOfDepths(
        block, dim, capacity, gate=mode.IdentityGate(), weigh_values=False, key=key
    )


steps = int(sys.argv[1]) if sys.argv[1:] else 20
recipe = Recipe(learning_rate=3e-3)
score, causal = train_and_score(
    recall(), "learned", recipe, steps=steps, seed=0, make_routed=my_layer
)
print(f"accuracy {score.accuracy:.2f}; got a slot:", score.hits)
