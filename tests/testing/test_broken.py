"""Each assertion of `mode.testing` fails on what is broken, and says what differs and where."""

import itertools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import pytest
from jaxtyping import Array

import mode
from tests.layers import TOKENS, UnitGate, depth, experts, transformer_block

from .models import ASSERTIONS, HIDDEN, KEY, Around, Frozen, Pooled, Rooted, deformed


def narrow(x: Array, out: Array, routings: Any) -> Any:
    half = eqx.tree_at(lambda r: r.logits, routings[0], replace_fn=lambda a: a.astype(jnp.bfloat16))
    return out, (half,)


def by_value(x: Array) -> Array:
    return x if x.ravel()[0] > 0 else -x


def by_calls() -> Any:
    """Its result depends on how often it was called, as does a capacity that warms up."""
    calls = itertools.count(1)
    return Around(depth(KEY), after=lambda x, out, routings: (out[..., next(calls) :, :], routings))


def per_group(x: Array, out: Array, routings: Any) -> Any:
    return out * (2 if x.ndim == 3 else 1), routings


BROKEN: dict[str, tuple[str, Callable[[], Any], str]] = {
    "one slot too few": ("static_shapes", lambda: deformed(lambda i: i[..., 1:]), "shape"),
    "a routing is lost": (
        "static_shapes",
        lambda: Around(depth(KEY), after=lambda x, out, routings: (out, ())),
        "the model has 1 routers, but returned 0 routings",
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
    "no router": ("residual_identity", lambda: mode.Residual(transformer_block(KEY)), "no routing"),
    "nothing skipped": (
        "residual_identity",
        lambda: depth(KEY, capacity=1.0),
        "selected every token: there is nothing to check",
    ),
    "shared experts": ("residual_identity", lambda: experts(KEY, num_shared=1), "were changed"),
    "k - 1 tokens": (
        "exact_capacity",
        lambda: deformed(lambda i: i[..., 1:]),
        "an expert has 7 slots, but its capacity of 32 tokens is 8",
    ),
    "k - 1 tokens in k slots": (
        "exact_capacity",
        lambda: deformed(lambda i: i.at[..., -1].set(TOKENS)),
        "2 slots are empty that a token could fill",
    ),
    "out of order": (
        "exact_capacity",
        lambda: deformed(lambda i: i[..., ::-1]),
        "not in time order",
    ),
    "twice the same": (
        "exact_capacity",
        lambda: deformed(lambda i: i.at[..., 1].set(i[..., 0])),
        "a token is there twice",
    ),
    "Python reads a value": (
        "no_retrace",
        lambda: Around(depth(KEY), before=by_value),
        "reads the value of an array",
    ),
    "calls are counted": ("no_retrace", by_calls, "traced again"),
    "the next token is seen": (
        "causal",
        lambda: Around(mode.make_causal(depth(KEY)), before=lambda x: x + jnp.roll(x, -1, -2)),
        r"on changed the output at 7: .* so a selector says so wrongly, or a block",
    ),
    "the mean over time is seen": (
        "causal",
        lambda: Around(
            mode.make_causal(depth(KEY)), before=lambda x: x - x.mean(-2, keepdims=True)
        ),
        "sees the future",
    ),
    "the output is NaN": (
        "causal",
        lambda: Around(depth(KEY), after=lambda x, out, routings: (out * jnp.nan, routings)),
        "has NaN where there is no padding",
    ),
    "a router without a gradient": (
        "router_gradients",
        lambda: depth(KEY, gate=Frozen()),
        "no gradient reaches the scorer of router 0",
    ),
    "a gate that is constant": (
        "router_gradients",
        lambda: depth(KEY, gate=UnitGate()),
        "no gradient",
    ),
    "a gradient that is not finite": (
        "router_gradients",
        lambda: depth(KEY, lambda _: Rooted(jnp.ones(()))),
        "not finite",
    ),
    "nothing is routed": (
        "router_gradients",
        lambda: mode.Residual(transformer_block(KEY)),
        "no router: there is nothing to check",
    ),
    "the batch is normalised": (
        "batch_independent",
        lambda: Around(depth(KEY), before=lambda x: x - x.mean(0, keepdims=True)),
        "changing all other sequences of a batch changed the output of sequence 0",
    ),
    "the last sequence sees the first": (
        "batch_independent",
        lambda: Around(depth(KEY), before=lambda x: x.at[-1].add(x[0]) if x.ndim == 3 else x),
        "changed the output of sequence 1",
    ),
    "sequences compete": (
        "batch_independent",
        lambda: Pooled(depth(KEY)),
        "changing all other sequences",
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
        ASSERTIONS[assertion](make(), HIDDEN)
