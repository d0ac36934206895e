"""Inputs, good models and ways to break them, for the tests of `mode.testing`."""

# pyright: reportIncompatibleVariableOverride=false

from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

import mode
from mode import testing
from tests.helpers import packed_info
from tests.layers import DIM, TOKENS, VOCAB, depth, experts, stack, transformer_block


KEY = jax.random.key(6)
HIDDEN = jax.random.normal(jax.random.key(1), (2, TOKENS, DIM))
IDS = jax.random.randint(jax.random.key(2), (2, TOKENS), 0, VOCAB)
# A padded sequence, and two packed documents with padding behind them.
PACKED = packed_info((20,), (9, 15), tokens=TOKENS)
INFOS: dict[str, mode.TokenInfo | None] = {"plain": None, "packed": PACKED}

ASSERTIONS: dict[str, Callable[..., None]] = {
    "static_shapes": testing.assert_static_shapes,
    "residual_identity": testing.assert_residual_identity,
    "exact_capacity": testing.assert_exact_capacity,
    "no_retrace": testing.assert_no_retrace,
    "causal": testing.assert_causal,
    "router_gradients": testing.assert_router_gradients,
    "batch_independent": testing.assert_batch_independent,
}

GOOD: dict[str, Callable[[], Any]] = {
    "mod": lambda: depth(KEY, transformer_block),
    "moe": lambda: experts(KEY),
    "stack": lambda: stack(KEY),
    "causal": lambda: mode.make_causal(depth(KEY, select=mode.QuantileThreshold())),
}


class Around(eqx.Module):
    """A layer, and a change of its input or of its result."""

    layer: Any
    before: Callable[[Array], Array] = lambda x: x
    after: Callable[..., Any] = lambda x, out, routings: (out, routings)

    def __call__(
        self, x: Array, info: mode.TokenInfo | None = None, *, key: PRNGKeyArray | None = None
    ) -> Any:
        return self.after(x, *self.layer(self.before(x), info, key=key))


class Deformed(mode.AbstractSelector):
    """Expert choice with a change of the index."""

    change: Callable[[Array], Array] = eqx.field(static=True)
    is_causal: ClassVar[bool] = True
    max_capacity: ClassVar[None] = None

    def __call__(
        self, inputs: mode.RoutingInputs, *, key: PRNGKeyArray | None = None
    ) -> mode.Assignment:
        right = mode.ExpertChoice()(inputs)
        return mode.Assignment(self.change(right.index), right.load)


def deformed(change: Callable[[Array], Array]) -> mode.MixtureOfDepths:
    return depth(KEY, select=Deformed(change))


class Frozen(mode.AbstractGate):
    """The logit as the weight, without a gradient."""

    def scores(self, logits: Array) -> Array:
        return logits

    def __call__(self, logits: Array, selected: Array) -> Array:
        return jax.lax.stop_gradient(logits)


class Pooled(eqx.Module):
    """All sequences of the batch compete with one another."""

    layer: Any

    def __call__(
        self, x: Array, info: mode.TokenInfo | None = None, *, key: PRNGKeyArray | None = None
    ) -> Any:
        out, routings = self.layer(x.reshape(-1, x.shape[-1]), None, key=key)
        return out.reshape(x.shape), routings


class Rooted(eqx.Module):
    """Finite, but its gradient is not: the slope of a root at 0."""

    scale: Array

    def __call__(
        self, x: Array, info: mode.TokenInfo, *, key: PRNGKeyArray | None = None
    ) -> tuple[Array, tuple[()]]:
        return x + jnp.sqrt(jnp.abs(self.scale * (x - x))), ()
