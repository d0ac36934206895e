"""Padding goes through every layer of the table untouched, and touches nothing."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array, PyTree

import mode
from tests.helpers import padded_info
from tests.layers import CASES, DIM, GROUPS, TOKENS, Case, build, hidden, run, split


every = pytest.mark.parametrize("case", CASES, ids=str)
NOTHING = mode.TokenInfo.packed(jnp.zeros((GROUPS, TOKENS), jnp.int32))
LENGTHS = (32, 31, 20, 12, 8, 3, 1, 0)


@functools.cache
def ragged() -> mode.TokenInfo:
    """Sequences of every kind of length in one batch, none among them."""
    return padded_info(*LENGTHS, tokens=TOKENS)


def poisoned(info: mode.TokenInfo) -> Array:
    """`hidden()` with what must never be read in the padding."""
    bad = jnp.where(jnp.arange(DIM) % 2 == 0, jnp.nan, jnp.inf)
    return jnp.where(info.valid[..., None], hidden(), bad[None, None])


@eqx.filter_jit
@functools.partial(jax.grad, argnums=(0, 2))
def gradients(parameters: PyTree, rest: PyTree, x: Array, info: mode.TokenInfo) -> Array:
    """Of a loss that reads padding too, evenly: what its gradient is there is known to be 1."""
    out, _ = eqx.combine(parameters, rest)(x, info, key=jax.random.key(2))
    real = info.valid[..., None]
    return jnp.sum(jnp.sin(jnp.where(real, out, 0))) + jnp.sum(jnp.where(real, 0, out))


@every
def test_padding_alone_comes_back_bit_for_bit(case: Case) -> None:
    x = poisoned(NOTHING)
    out, routings = run(build(case), x, NOTHING)
    assert np.asarray(out).tobytes() == np.asarray(x).tobytes()
    for routing in routings:
        assert not np.any(routing.filled)
        assert not np.any(routing.weight)


@every
def test_padding_alone_teaches_nothing(case: Case) -> None:
    """The layer is the identity, for gradients too."""
    parameters, of_input = gradients(*split(build(case)), hidden(), NOTHING)
    assert np.all(of_input == 1)
    for leaf in jax.tree.leaves(parameters):
        assert not np.any(leaf)


@pytest.mark.optimized
@every
def test_nothing_in_the_padding_reaches_a_real_token(case: Case) -> None:
    info = ragged()
    clean, clean_routings = run(build(case), hidden(), info)
    out, routings = run(build(case), poisoned(info), info)
    real = np.asarray(info.valid)
    assert np.array_equal(np.asarray(out)[real], np.asarray(clean)[real])
    assert np.asarray(out)[~real].tobytes() == np.asarray(poisoned(info))[~real].tobytes()
    for one, other in zip(routings, clean_routings, strict=True):
        assert eqx.tree_equal(one.index, other.index)
        assert not np.any(one.selected & ~one.valid[..., None])


@every
def test_nothing_in_the_padding_reaches_a_gradient(case: Case) -> None:
    info = ragged()
    clean = gradients(*split(build(case)), hidden(), info)
    assert eqx.tree_equal(gradients(*split(build(case)), poisoned(info), info), clean)
    for leaf in jax.tree.leaves(clean):
        assert np.all(np.isfinite(leaf))
    assert np.all(np.asarray(clean[1])[~np.asarray(info.valid)] == 1)
