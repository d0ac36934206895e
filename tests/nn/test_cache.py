"""New tokens after those in a cache: each kind of layer, in pieces, and the cache by itself."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import PRNGKeyArray

import mode
from tests.helpers import assert_close, hidden_states
from tests.layers import DIM, depth, expert, experts, transformer_block


KEY = jax.random.key(5)
BATCH, TOKENS = 2, 10
X = hidden_states(1, BATCH, TOKENS, DIM)

LAYERS: dict[str, Callable[[PRNGKeyArray], Any]] = {
    "dense": lambda key: mode.Residual(transformer_block(key, num_kv_heads=1)),
    "window": lambda key: mode.Residual(
        transformer_block(key, attend=mode.CausalAttention(window=3))
    ),
    "attention alone": lambda key: mode.Residual(mode.Attention(DIM, 2, key=key)),
    "position-wise": lambda key: mode.Residual(mode.PositionWise(expert(key))),
    "depths": lambda key: depth(key, transformer_block, select=mode.LogitThreshold(0.5)),
    "experts": lambda key: experts(key, select=mode.LogitThreshold(0.5)),
    "token choice": lambda key: experts(key, select=mode.TokenChoice(2), num_shared=1),
    "staged": lambda key: mode.make_causal(
        mode.staged_mode_layer(expert, DIM, 2, 2, capacity=0.5, key=key),
        threshold=mode.LogitThreshold(),
    ),
}


def info_of(start: int, valid: list[list[bool]]) -> mode.TokenInfo:
    """New tokens from a position on; false is padding."""
    positions = jnp.broadcast_to(start + jnp.arange(len(valid[0])), (BATCH, len(valid[0])))
    return mode.TokenInfo(positions, jnp.array(valid, jnp.int32))


@pytest.mark.parametrize("name", LAYERS)
def test_several_new_tokens_after_a_past(name: str) -> None:
    """Four tokens, then one, then five: what the layer makes of all ten at once."""
    layer = LAYERS[name](KEY)
    layer = mode.map_routers(
        lambda r: eqx.tree_at(lambda r: r.scorer.weight, r, replace_fn=lambda w: 40 * w), layer
    )
    expected, routings = eqx.filter_jit(layer)(X)

    @eqx.filter_jit
    def extend(x: Any, info: mode.TokenInfo, cache: mode.Cache) -> Any:
        hidden, routed, new = layer.extend(x, info, cache)
        return hidden, routed, cache.append(new, hidden)

    cache = mode.Cache.empty(TOKENS)
    filled = 0
    for start, size in ((0, 4), (4, 1), (5, 5)):
        part = X[:, start : start + size]
        hidden, routed, cache = extend(part, info_of(start, [[True] * size] * BATCH), cache)
        assert_close(hidden, expected[:, start : start + size], scale=10)
        filled += sum(int(routing.num_filled.sum()) for routing in routed)
    assert filled == sum(int(routing.num_filled.sum()) for routing in routings)
    if name == "depths":
        assert np.array_equal(cache.length, routings[0].num_filled)
    else:
        assert filled > 0 or not routings


def a_cache() -> mode.Cache:
    """Room for six tokens; one sequence has three, the other one and two of padding."""
    new = mode.Cache.of_tokens(
        {"x": X[:, None, :3]}, info_of(0, [[True] * 3, [True, False, False]]), 6
    )
    return mode.Cache.empty(6).append(new, X)


def tokens_in(cache: mode.Cache) -> list[list[float]]:
    """The first feature of each entry of each sequence."""
    assert cache.length is not None
    values = np.asarray(cache.entries["x"][:, 0, :, 0])
    return [row[:length].tolist() for row, length in zip(values, cache.length, strict=True)]


def test_tokens_are_appended_in_time_order_without_the_padding() -> None:
    """Each sequence behind its own end; what lies behind is empty."""
    cache = a_cache()
    first = X[..., 0].tolist()
    assert tokens_in(cache) == [first[0][:3], first[1][:1]]
    new = mode.Cache.of_tokens(
        {"x": X[:, None, 3:6]}, info_of(3, [[True, False, False], [True] * 3]), 6
    )
    cache = cache.append(new, X)
    assert tokens_in(cache) == [first[0][:4], [first[1][0], *first[1][3:6]]]
    assert cache.info is not None
    assert cache.info.valid.tolist() == [[True] * 4 + [False] * 2] * 2
    assert cache.info.positions[1, :4].tolist() == [0, 3, 4, 5]


def test_a_cache_goes_back() -> None:
    """Tokens at later positions are gone, and others may follow."""
    cache = a_cache().rewind(jnp.array([2, 0]))
    first = X[..., 0].tolist()
    assert tokens_in(cache) == [first[0][:2], []]
    new = mode.Cache.of_tokens({"x": X[:, None, 5:6]}, info_of(2, [[True], [True]]), 6)
    assert tokens_in(cache.append(new, X)) == [[*first[0][:2], first[0][5]], [first[1][5]]]


def test_what_is_known_when_a_program_is_traced() -> None:
    """Whether there are earlier tokens, and whether later ones follow."""
    assert mode.Cache.empty().is_empty
    assert not mode.Cache.empty().is_kept
    assert mode.Cache.empty(3).is_empty
    assert mode.Cache.empty(3).is_kept
    assert not a_cache().is_empty
    assert mode.Cache.empty(3).part(1).is_empty
    two = mode.Cache((X, 2 * X), info_of(0, [[True] * TOKENS] * 2), jnp.array([TOKENS] * 2), TOKENS)
    assert np.array_equal(two.part(1).entries, 2 * X)
