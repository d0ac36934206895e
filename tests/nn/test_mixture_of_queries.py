"""`MixtureOfQueries`, and attention and feed-forward routed apart, against the oracle."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mode
from tests import reference as ref
from tests.helpers import assert_close, hidden_states, packed_info, run
from tests.layers import UnitGate
from tests.nn import oracles
from tests.nn.cases import DIM, INFOS, TOKENS, make_block, make_experts, numbers
from tests.routing.draws import GATES, assert_assigned


infos = pytest.mark.parametrize("info", INFOS.values(), ids=INFOS)


def make_layer(block: Any, capacity: float = 0.5, **options: Any) -> mode.MixtureOfQueries:
    return mode.MixtureOfQueries(block, DIM, capacity, key=jax.random.key(3), **options)


@pytest.mark.optimized
@infos
@pytest.mark.parametrize("gate", ["absolute", "identity", "sigmoid"])
def test_a_selected_token_gets_the_update_of_the_dense_block(
    gate: str, info: mode.TokenInfo | None
) -> None:
    """Times its weight; the others stay as they are."""
    gate_of_layer, name, scale = GATES[gate]
    layer = make_layer(make_block(), gate=gate_of_layer)
    x = hidden_states(1, 3, TOKENS, DIM)
    hidden, (routing,) = run(layer, x, info)
    oracle = oracles.of_queries(layer, name, scale)
    expected, (assignment,) = ref.over_groups(oracle, 1, *numbers(x, info))
    assert_assigned(routing, assignment)
    assert_close(hidden, expected)
    kept = ~np.asarray(routing.selected[..., 0])
    assert np.array_equal(np.asarray(hidden)[kept], np.asarray(x)[kept])


@pytest.mark.optimized
def test_at_full_capacity_and_weight_one_it_is_the_dense_layer() -> None:
    """To the bit: the same operations on the same tokens in the same order.

    Queries and keys are projected by two products instead of one. With JAX 0.10 that is the same to
    the bit; with 0.12 it differs by 5e-7.
    """
    block, x = make_block(), hidden_states(4, 2, TOKENS, DIM)
    hidden, _ = run(make_layer(block, 1.0, gate=UnitGate()), x)
    dense, _ = run(mode.Residual(block), x)
    if jax.__version_info__ < (0, 11):
        np.testing.assert_array_equal(hidden, dense)
    np.testing.assert_allclose(hidden, dense, rtol=0, atol=1e-6)


@pytest.mark.parametrize("window", [None, 20])
def test_long_sequences_are_computed_in_blocks(window: int | None) -> None:
    """Values and gradients are those of all scores at once."""
    x = hidden_states(5, 2, 70, DIM)
    info = packed_info((30, 35), (70,), tokens=70)

    def loss(block_size: int | None, x: Any) -> Any:
        attend = mode.CausalAttention(block_size=block_size, window=window)
        block = mode.TransformerBlock(DIM, 4, num_kv_heads=2, attend=attend, key=jax.random.key(1))
        return jnp.sum(jnp.sin(make_layer(block)(x, info)[0]))

    whole, in_blocks = (
        jax.value_and_grad(lambda x, size=size: loss(size, x))(x) for size in (None, 16)
    )
    assert_close(in_blocks, whole, scale=10)


def test_the_router_learns_from_the_update_alone() -> None:
    """A token is read whether it is selected or not: no weight reaches the values."""
    block, x = make_block(), hidden_states(6, TOKENS, DIM)
    layer = make_layer(block)
    double = eqx.tree_at(lambda m: m.router.scorer.weight, layer, replace_fn=lambda w: 2 * w)
    (once, _), (twice, _) = run(layer, x), run(double, x)
    assert_close(twice - x, 2 * (once - x))


@infos
def test_split_is_the_block(info: mode.TokenInfo | None) -> None:
    """Attention, then feed-forward, as two layers."""
    block, x = make_block(), hidden_states(7, 3, TOKENS, DIM)
    parts = mode.Sequential([mode.Residual(part) for part in block.split()])
    assert_close(run(parts, x, info)[0], run(mode.Residual(block), x, info)[0])


def test_parts_are_routed_apart() -> None:
    """The attention by one router, the feed-forward by another: x' = MoD(attention)(x), and then
    MoD(feed-forward)(x')."""
    attention, feedforward = make_block().split()
    keys = jax.random.split(jax.random.key(0))
    layers = [
        mode.MixtureOfDepths(part, DIM, capacity, key=key)
        for part, capacity, key in zip((attention, feedforward), (0.5, 0.25), keys, strict=True)
    ]
    x = hidden_states(8, 3, TOKENS, DIM)
    hidden, (of_attention, of_feedforward) = run(mode.Sequential(layers), x)
    middle, _ = run(layers[0], x)
    expected, _ = run(layers[1], middle)
    assert_close(hidden, expected)
    assert (of_attention.index.shape[-1], of_feedforward.index.shape[-1]) == (6, 3)


def test_queries_of_the_attention_alone() -> None:
    """`PreNorm` passes on what the attention inside offers."""
    attention, _ = make_block().split()
    x = hidden_states(9, 3, TOKENS, DIM)
    hidden, (routing,) = run(make_layer(attention, gate=UnitGate()), x)
    dense, _ = run(mode.Residual(attention), x)
    assert_close(hidden, jnp.where(routing.selected, dense, x))


def test_experts_inside_see_the_selected_tokens() -> None:
    """Their router has the slots of the layer for tokens."""
    layer = make_layer(make_block(make_experts()), 0.5)
    _, (queries, experts) = run(layer, hidden_states(10, 3, TOKENS, DIM))
    assert queries.index.shape == (3, 1, 6)
    assert experts.logits.shape == (3, 6, 3)


def test_what_has_no_keys_is_refused() -> None:
    for block in (mode.PositionWise(jnp.tanh), make_block().split()[1]):
        with pytest.raises(ValueError, match=r"`block` of `MixtureOfQueries` must have keys"):
            make_layer(block)

    def plain(q: Any, k: Any, v: Any, info: Any) -> Any:
        return q

    layer = make_layer(mode.Attention(DIM, 4, attend=plain, key=jax.random.key(0)))
    with pytest.raises(ValueError, match="`plain` has no argument `index`"):
        layer(hidden_states(0, TOKENS, DIM))


def test_sequential_takes_layers() -> None:
    for layers, rule in (([], "at least one"), ([make_block()], "must hold layers")):
        with pytest.raises(ValueError, match=rule):
            mode.Sequential(layers)
