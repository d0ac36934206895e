"""Gates, selectors and a scorer that the study compares with those of the library."""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

import mode


class Softplus(mode.AbstractGate):
    """The weight is the softplus of the logit."""

    def scores(self, logits: Array) -> Array:
        return logits

    def __call__(self, logits: Array, selected: Array) -> Array:
        return jax.nn.softplus(logits[..., : selected.shape[-1]])


class OnePlus(mode.AbstractGate):
    """The weight is 1 plus the logit: an undecided router adds the whole update."""

    def scores(self, logits: Array) -> Array:
        return logits

    def __call__(self, logits: Array, selected: Array) -> Array:
        return 1 + logits[..., : selected.shape[-1]]


class Perturbed(mode.AbstractSelector):
    """Top-k of scores that are changed in training alone: where there is a key."""

    change: Callable[[mode.RoutingInputs, PRNGKeyArray], Array] = eqx.field(static=True)
    is_causal = False
    max_capacity = None

    def __call__(self, inputs: mode.RoutingInputs, *, key: Any = None) -> mode.Assignment:
        if key is not None:
            inputs = dataclasses.replace(inputs, scores=self.change(inputs, key))
        return mode.ExpertChoice()(inputs)


def noise(inputs: mode.RoutingInputs, key: PRNGKeyArray) -> Array:
    """Scores with Gumbel noise of scale 0.3."""
    return inputs.scores + 0.3 * jax.random.gumbel(key, inputs.scores.shape, inputs.scores.dtype)


def random_slots(inputs: mode.RoutingInputs, key: PRNGKeyArray) -> Array:
    """Scores by which about a quarter of the slots goes to random tokens."""
    drawn = jax.random.uniform(key, inputs.scores.shape, inputs.scores.dtype)
    chance = 0.25 * inputs.slots / inputs.num_tokens
    return jnp.where(drawn < chance, 1e9 * (1 + drawn), inputs.scores)


class Scorer(eqx.Module):
    """A router's linear map, of a normed input, or one that learns `factor` times as fast."""

    linear: mode.Linear
    norm: mode.RMSNorm | None
    factor: float = eqx.field(static=True)

    def __call__(self, x: Array) -> Array:
        return self.factor * self.linear(x if self.norm is None else self.norm(x))
