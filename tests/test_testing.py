"""Each assertion of `mode.testing` passes on what is right and fails on what is broken."""

import itertools
from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from jaxtyping import Array

import mode
from mode import testing

from .layers import (
    DIM,
    TOKENS,
    VOCAB,
    One,
    depth,
    experts,
    stack,
    transformer_block,
    with_selector,
)


KEY = jax.random.key(6)


class Around(eqx.Module):
    """A layer, and what is done to its input or to its result."""

    layer: Any
    before: Callable[[Array], Array] = lambda x: x
    after: Callable[..., Any] = lambda x, out, routings: (out, routings)

    def __call__(
        self, x: Array, info: mode.TokenInfo | None = None, *, key: Array | None = None
    ) -> Any:
        return self.after(x, *self.layer(self.before(x), info, key=key))


class Deformed(mode.AbstractSelector):
    """Expert choice, and then something is done to the index."""

    change: Callable[[Array], Array] = eqx.field(static=True)
    looks_ahead: ClassVar[bool] = True

    def share(self, fraction: Any) -> Any:
        return fraction

    def __call__(self, request: mode.Request, *, key: Array | None = None) -> mode.Selection:
        right = mode.ExpertChoice()(request)
        return mode.Selection(self.change(right.index), right.load)


class Frozen(mode.AbstractGate):
    """The raw weight without a gradient."""

    def scores(self, logits: Array) -> Array:
        return logits

    def __call__(self, logits: Array, selected: Array) -> Array:
        return jax.lax.stop_gradient(logits)


class Pooled(eqx.Module):
    """All sequences of the batch compete with one another."""

    layer: Any

    def __call__(
        self, x: Array, info: mode.TokenInfo | None = None, *, key: Array | None = None
    ) -> Any:
        out, routings = self.layer(x.reshape(-1, x.shape[-1]), None, key=key)
        return out.reshape(x.shape), routings


def deformed(change: Callable[[Array], Array]) -> mode.MixtureOfDepths:
    return depth(KEY, select=Deformed(change))


def narrow(x: Array, out: Array, routings: Any) -> Any:
    half = eqx.tree_at(lambda r: r.logits, routings[0], replace_fn=lambda a: a.astype(jnp.bfloat16))
    return out, (half,)


class Rooted(eqx.Module):
    """Finite, but its gradient is not: the slope of a root at 0."""

    scale: Array

    def __call__(self, x: Array, info: mode.TokenInfo, *, key: Array | None = None) -> Any:
        return x + jnp.sqrt(jnp.abs(self.scale * (x - x))), ()


def by_value(x: Array) -> Array:
    return x if x.ravel()[0] > 0 else -x


def by_calls() -> Any:
    """What it returns depends on how often it was called, as does a capacity that warms up."""
    calls = itertools.count(1)
    return Around(depth(KEY), after=lambda x, out, routings: (out[..., next(calls) :, :], routings))


def per_group(x: Array, out: Array, routings: Any) -> Any:
    return out * (2 if x.ndim == 3 else 1), routings


ASSERTIONS: dict[str, Callable[[Any], None]] = {
    "static_shapes": lambda m: testing.assert_static_shapes(m, tokens=(TOKENS, 48), dim=DIM),
    "residual_identity": lambda m: testing.assert_residual_identity(m, tokens=TOKENS, dim=DIM),
    "exact_capacity": lambda m: testing.assert_exact_capacity(m, tokens=TOKENS, dim=DIM),
    "no_retrace": lambda m: testing.assert_no_retrace(m, tokens=TOKENS, dim=DIM),
    "causal": lambda m: testing.assert_causal(m, tokens=TOKENS, dim=DIM),
    "router_gradients": lambda m: testing.assert_router_gradients(m, tokens=TOKENS, dim=DIM),
    "batch_independent": lambda m: testing.assert_batch_independent(m, tokens=TOKENS, dim=DIM),
}

GOOD: dict[str, Callable[[], Any]] = {
    "mod": lambda: depth(KEY, transformer_block),
    "moe": lambda: experts(KEY),
    "stack": lambda: stack(KEY),
    "causal": lambda: mode.causal(depth(KEY, select=mode.Threshold())),
}
# Where an assertion says of itself that it does not hold.
NOT_FOR = {
    ("residual_identity", "stack"),
    ("exact_capacity", "causal"),
    ("causal", "mod"),
    ("causal", "moe"),
    ("causal", "stack"),
}


@pytest.mark.parametrize(
    ("assertion", "name"),
    [(one, name) for one in ASSERTIONS for name in GOOD if (one, name) not in NOT_FOR],
)
def test_passes_on_what_is_right(assertion: str, name: str) -> None:
    ASSERTIONS[assertion](GOOD[name]())


@pytest.mark.parametrize(("assertion", "name"), sorted(NOT_FOR))
def test_fails_where_it_says_so(assertion: str, name: str) -> None:
    with pytest.raises(AssertionError):
        ASSERTIONS[assertion](GOOD[name]())


BROKEN: dict[str, tuple[str, Callable[[], Any], str]] = {
    "one slot too few": ("static_shapes", lambda: deformed(lambda i: i[..., 1:]), "shape"),
    "a routing is lost": (
        "static_shapes",
        lambda: Around(depth(KEY), after=lambda x, out, routings: (out, ())),
        "1 routers, but 0 routings",
    ),
    "a token is lost": (
        "static_shapes",
        lambda: Around(depth(KEY), after=lambda x, out, routings: (out[..., 1:, :], routings)),
        "shape",
    ),
    "another dtype": (
        "static_shapes",
        lambda: Around(depth(KEY), after=lambda x, o, routings: (o.astype(jnp.bfloat16), routings)),
        "type",
    ),
    "a narrow router": ("static_shapes", lambda: Around(depth(KEY), after=narrow), "below float32"),
    "skipped tokens changed": (
        "residual_identity",
        lambda: Around(depth(KEY), after=lambda x, out, routings: (out * 1.000001, routings)),
        r"\d+ of 48 tokens that the first router skipped were changed",
    ),
    "skipped tokens lost": (
        "residual_identity",
        lambda: Around(depth(KEY), after=lambda x, out, routings: (out - x, routings)),
        "48 of 48 tokens that the first router skipped were changed",
    ),
    "nothing skipped": (
        "residual_identity",
        lambda: mode.Residual(transformer_block(KEY)),
        "no routing",
    ),
    "shared experts": ("residual_identity", lambda: experts(KEY, num_shared=1), "were changed"),
    "k - 1 tokens": ("exact_capacity", lambda: deformed(lambda i: i[..., 1:]), "7 slots where"),
    "k - 1 tokens in k slots": (
        "exact_capacity",
        lambda: deformed(lambda i: i.at[..., -1].set(TOKENS)),
        "2 slots were left empty",
    ),
    "out of order": (
        "exact_capacity",
        lambda: deformed(lambda i: i[..., ::-1]),
        "not in time order",
    ),
    "twice the same": (
        "exact_capacity",
        lambda: deformed(lambda i: i.at[..., 1].set(i[..., 0])),
        "one is there twice",
    ),
    "Python reads a value": (
        "no_retrace",
        lambda: Around(depth(KEY), before=by_value),
        "reads the value of an array",
    ),
    "calls are counted": ("no_retrace", by_calls, "traced again"),
    "the next token is seen": (
        "causal",
        lambda: Around(mode.causal(depth(KEY)), before=lambda x: x + jnp.roll(x, -1, -2)),
        "on changed the output at 7",
    ),
    "the mean over time is seen": (
        "causal",
        lambda: Around(mode.causal(depth(KEY)), before=lambda x: x - x.mean(-2, keepdims=True)),
        "sees the future",
    ),
    "a router without a gradient": (
        "router_gradients",
        lambda: depth(KEY, gate=Frozen()),
        "no gradient reaches the scorer of router 0",
    ),
    "a gate that is constant": ("router_gradients", lambda: depth(KEY, gate=One()), "no gradient"),
    "a gradient that is not finite": (
        "router_gradients",
        lambda: depth(KEY, lambda _: Rooted(jnp.ones(()))),
        "not finite",
    ),
    "the batch is normalised": (
        "batch_independent",
        lambda: Around(depth(KEY), before=lambda x: x - x.mean(0, keepdims=True)),
        "changing the other sequences",
    ),
    "sequences compete": (
        "batch_independent",
        lambda: Pooled(depth(KEY)),
        "changing the other sequences",
    ),
    "vmap is something else": (
        "batch_independent",
        lambda: Around(depth(KEY), after=per_group),
        "close",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_fails_on_what_is_broken(name: str) -> None:
    assertion, make, words = BROKEN[name]
    with pytest.raises(AssertionError, match=words):
        ASSERTIONS[assertion](make())


def test_one_bad_layer_of_a_scan_is_found() -> None:
    """A gradient that reaches all layers of a stack but one."""
    good = stack(KEY, depth=6)
    bad = eqx.tree_at(
        lambda m: m.layers[1].block.outer.weight, good, replace_fn=lambda w: w.at[1].set(0)
    )
    with pytest.raises(AssertionError, match="no gradient reaches the scorer of router 0"):
        ASSERTIONS["router_gradients"](bad)


def test_models_of_token_ids() -> None:
    """Every assertion that takes `vocab` instead of `dim`."""
    model = mode.mod_decoder(VOCAB, DIM, 2, 2, key=KEY)
    tokens = {"tokens": TOKENS, "vocab": VOCAB}
    testing.assert_static_shapes(model, tokens=(8, TOKENS), vocab=VOCAB)
    testing.assert_exact_capacity(model, **tokens)
    testing.assert_no_retrace(model, **tokens)
    testing.assert_causal(mode.causal(model), **tokens)
    testing.assert_router_gradients(model, **tokens)
    testing.assert_batch_independent(model, **tokens)
    with pytest.raises(AssertionError):
        testing.assert_exact_capacity(with_selector(mode.Threshold(), model), **tokens)
    with pytest.raises(AssertionError):
        testing.assert_static_shapes(model, tokens=(8,), vocab=VOCAB + 1)
