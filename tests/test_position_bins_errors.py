"""Every construction has `position_bins`, and what cannot be one is refused."""

import re

import jax
import jax.numpy as jnp
import jaxtyping
import pytest

import mode


KEY = jax.random.key(0)
DIM = 8


def make_expert(key):
    return mode.GELU(DIM, 8, key=key)


def depths(bins):
    block = mode.PositionWise(make_expert(KEY))
    return mode.MixtureOfDepths(block, DIM, 0.25, position_bins=bins, key=KEY)


CONSTRUCTIONS = {
    "depths": depths,
    "experts": lambda bins: mode.MixtureOfExperts(make_expert, DIM, 3, position_bins=bins, key=KEY),
    "decoder": lambda bins: mode.mod_decoder(17, DIM, 4, 2, position_bins=bins, key=KEY),
    "staged": lambda bins: mode.staged_mode(make_expert, DIM, 2, 2, position_bins=bins, key=KEY),
    "integrated": lambda bins: mode.integrated_mode(
        make_expert, DIM, 2, 3, 1, position_bins=bins, key=KEY
    ),
    "reduced": lambda bins: mode.reduced_capacity_moe(
        make_expert, DIM, 2, 3, 1, position_bins=bins, key=KEY
    ),
}


@pytest.fixture(autouse=True)
def as_users_see_it():
    """Without the suite's type hook, which would refuse some of these first."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.parametrize("name", CONSTRUCTIONS)
def test_every_construction_has_bins(name):
    """Those with two routers have them in both."""
    found = [router.state.position_bins for router in mode.routers(CONSTRUCTIONS[name](6))]
    assert found == [6] * (2 if name == "staged" else 1)


@pytest.mark.parametrize("name", CONSTRUCTIONS)
@pytest.mark.parametrize("bins", [0, -3, 2.5, "8", None])
def test_bins_that_cannot_be_are_refused(name, bins):
    with pytest.raises(ValueError, match=rf"`position_bins` must be .*got {re.escape(repr(bins))}"):
        CONSTRUCTIONS[name](bins)


@pytest.mark.parametrize("call", [mode.update_state, mode.causal_membership])
def test_routings_without_positions_are_refused(call):
    """Those of a router with one bin say nothing of where their tokens stood."""
    _, routings = depths(1)(jnp.ones((2, 12, DIM)))
    words = r"`routings` must carry positions for a router of 3 position bins, got one without"
    with pytest.raises(ValueError, match=words):
        call(depths(3), routings)
