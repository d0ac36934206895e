"""Gates, selectors, a scorer and a layer that the study compares with those of the library."""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

import mode
from mode.routing import Routings


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


class KeysForAll(eqx.Module):
    """Mixture-of-Depths in which unselected tokens are keys and values too.

    Queries, the output of the attention and the feed-forward are those of the selected tokens. For
    training on whole sequences alone, `[batch, tokens, dim]`.
    """

    router: mode.Router
    block: mode.TransformerBlock

    def __call__(
        self, x: Array, info: mode.TokenInfo, *, key: PRNGKeyArray | None = None
    ) -> tuple[Array, Routings]:
        routing = self.router(x, info, key=key)
        attention, index = self.block.attention, routing.index[:, 0]
        attended = jax.vmap(lambda x, info, index: _attend(attention, x, info, index))(
            self.block.attention_norm(x), info, index
        )
        slots = mode.dispatch(x, routing)[0] + attended
        normed = self.block.feedforward_norm(slots)
        feedforward = self.block.feedforward
        assert isinstance(feedforward, mode.PositionWise)
        update, _ = feedforward(normed)
        return mode.combine((attended + update)[None], routing, onto=x), (routing,)


def _attend(attention: mode.Attention, x: Array, info: mode.TokenInfo, index: Array) -> Array:
    """Attends from the tokens at `index` to all, `[tokens, dim]`, of the same document."""
    heads, kv_heads = attention.num_heads, attention.num_kv_heads
    assert heads == kv_heads
    rotated, v = jnp.split(attention.qkv(x).reshape(x.shape[0], 3 * heads, -1), [2 * heads], axis=1)
    assert attention.rope_theta is not None
    q, k = jnp.split(mode.rope(rotated, info.positions, attention.rope_theta), 2, axis=1)
    scores = jnp.einsum("qhd,khd->hqk", q[index], k) * q.shape[-1] ** -0.5
    same = info.segment_ids[index][:, None] == info.segment_ids
    seen = same & (jnp.arange(x.shape[0]) <= index[:, None])
    weights = jax.nn.softmax(jnp.where(seen, scores, -1e30), axis=-1)
    return attention.out(jnp.einsum("hqk,khd->qhd", weights, v).reshape(-1, x.shape[-1]))
