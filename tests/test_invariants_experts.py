"""What an implementation of experts and MoDE must get right: one test per invariant, 23 to 33."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array, PyTree

import mode

from .helpers import assert_close
from .layers import (
    DIM,
    GROUPS,
    TOKENS,
    expert,
    experts,
    hidden,
    loss,
    ranked,
    run,
    split,
    with_bias,
)


KEY = jax.random.key(4)
INF = float("inf")


class Pooled(eqx.Module):
    """The whole batch as one group."""

    layer: Any

    def __call__(
        self, x: Array, info: mode.TokenInfo | None = None, *, key: Array | None = None
    ) -> PyTree:
        out, routings = self.layer(x.reshape(-1, DIM), key=key)
        return out.reshape(x.shape), routings


def flops(layer: Any) -> mode.Flops:
    return mode.count_flops(layer, jax.ShapeDtypeStruct((2, 64, DIM), jnp.float32))


def count_parameters(tree: PyTree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(eqx.filter(tree, eqx.is_inexact_array)))


def noop_bias(value: float, num_experts: int, num_noop: int) -> Array:
    return jnp.array([0.0] * num_experts + [value] * num_noop)


@pytest.mark.parametrize("factor", [0.5, 1.0, 2.0])
def test_invariant_23_expert_choice_load(factor: float) -> None:
    """Each expert takes exactly k = n c / e tokens; a token gets 0 to e; the loads sum to e k."""
    _, (routing,) = run(experts(KEY, capacity_factor=factor), hidden())
    k = int(TOKENS * factor / 4)
    assert routing.load.tolist() == [[k] * 4] * GROUPS
    assert routing.num_filled.tolist() == [4 * k] * GROUPS
    per_token = np.asarray(routing.selected).sum(-1)
    assert 0 <= per_token.min() < per_token.max() <= 4
    assert np.all(per_token.sum(-1) == 4 * k)


def test_invariant_24_softmax_not_renormalised() -> None:
    """The gate is the softmax probability; one expert has gate 1 everywhere: the dense map."""
    _, (routing,) = run(experts(KEY), hidden())
    ones = jnp.ones((*jnp.moveaxis(routing.index, 1, 0).shape, 1))
    total = mode.combine(ones, routing, onto=jnp.zeros((GROUPS, TOKENS, 1)))
    by_all = np.asarray(routing.selected).all(-1)
    assert np.all(np.asarray(total)[~by_all] < 1)
    probability = jax.nn.softmax(routing.logits, axis=-1)
    assert_close(total[..., 0], jnp.sum(jnp.where(routing.selected, probability, 0), axis=-1))
    one = mode.Residual(mode.MixtureOfExperts(expert, DIM, 1, key=KEY))
    out, (routing,) = run(one, hidden())
    assert np.all(routing.weight == 1)
    only = jax.tree.map(lambda leaf: leaf[0], one.block.experts)
    assert_close(out, hidden() + only(hidden()))


def test_invariant_25_groups_are_explicit() -> None:
    """Each sequence by default, no leak between them; the whole batch where it is asked for."""
    mode.testing.assert_batch_independent(experts(KEY), tokens=TOKENS, dim=DIM)
    with pytest.raises(AssertionError, match="changing the other sequences"):
        mode.testing.assert_batch_independent(Pooled(experts(KEY)), tokens=TOKENS, dim=DIM)
    _, (routing,) = run(Pooled(experts(KEY)), hidden())
    assert routing.num_filled.shape == ()
    assert routing.num_filled == TOKENS * GROUPS


def test_invariant_26_balance_is_one() -> None:
    """The balance loss of token choice is 1 at uniform for any E and k, and of expert choice
    always."""
    for k in (1, 2, 3):
        layer = experts(KEY, select=mode.TokenChoice(k), capacity_factor=float(k))
        # Rotating one-hot tokens: each expert has the same probability and the same load.
        x = 0.1 * jnp.tile(jnp.eye(4, DIM), (TOKENS // 4, 1))
        turned = jnp.array([np.roll([9.0, 6.0, 3.0, 0.0], at).tolist() for at in range(4)])
        weight = jnp.zeros((DIM, 4)).at[:4].set(turned)
        _, (routing,) = run(eqx.tree_at(lambda m: m.block.router.scorer.weight, layer, weight), x)
        assert routing.load.tolist() == [TOKENS * k // 4] * 4
        assert_close(mode.load_balance_loss(routing), jnp.float32(1))
    _, (routing,) = run(experts(KEY), 5 * hidden())
    assert_close(mode.load_balance_loss(routing), jnp.float32(1))
    _, (routing,) = run(experts(KEY, select=mode.TokenChoice(1)), 5 * hidden())
    assert mode.load_balance_loss(routing) > 1.01


def test_invariant_27_staged() -> None:
    """Skipped tokens touch neither attention nor the experts' router, which sees C tokens."""
    layer = ranked(mode.staged_mode(expert, DIM, 2, 2, capacity=0.25, key=KEY))
    out, (of_depth, of_experts) = run(layer, hidden())
    assert of_experts.logits.shape == (GROUPS, TOKENS // 4, 2)
    assert of_experts.index.shape == (GROUPS, 2, TOKENS // 8)
    skipped = ~np.asarray(of_depth.selected)
    noise = jax.random.normal(KEY, hidden().shape).at[..., 0].set(0)
    other, (_, same) = run(layer, hidden() + jnp.where(skipped, noise, 0))
    assert np.array_equal(of_experts.logits, same.logits)
    chosen = ~skipped[..., 0]
    assert np.array_equal(np.asarray(out)[chosen], np.asarray(other)[chosen])


def test_invariant_28_integrated() -> None:
    """Attention sees all; assigned + no-op + dropped = N, *dropped* and *chosen* kept apart."""
    layer = mode.integrated_mode(
        expert, DIM, 2, 3, 1, select=mode.TokenChoice(1), capacity_factor=0.5, key=KEY
    )
    out, (routing,) = run(layer, hidden())
    parts = np.stack([routing.num_filled, routing.num_noop, routing.num_dropped])
    assert np.all(parts.sum(0) == TOKENS)
    assert np.all(parts.sum(1) > 0)
    assert np.all(np.any(np.asarray(out - hidden()) != 0, axis=-1))
    metrics = mode.routing_metrics(routing)
    assert_close(metrics.noop_rate, jnp.float32(parts[1].sum() / (TOKENS * GROUPS)))
    assert_close(metrics.drop_rate, jnp.float32(parts[2].sum() / (TOKENS * GROUPS)))


def test_invariant_29_a_no_op_is_nothing() -> None:
    """It adds 0, has no parameters, FLOPs or limit, and its probability receives gradient."""
    plain, with_noop = (experts(KEY, num_noop=n, select=mode.TokenChoice(1)) for n in (0, 2))
    out, (routing,) = run(with_noop, hidden())
    chosen = np.argmax(routing.logits, -1) >= 4
    assert chosen.any()
    assert np.array_equal(np.asarray(out)[chosen], np.asarray(hidden())[chosen])
    of_experts = [count_parameters(layer.block.experts) for layer in (plain, with_noop)]
    assert of_experts[0] == of_experts[1]
    assert count_parameters(with_noop.block.router.scorer) == DIM * 6
    costs = [flops(layer).parts["mode.GELU"] for layer in (plain, with_noop)]
    assert costs[0] == costs[1]
    _, (all_noop,) = run(with_bias(noop_bias(100.0, 4, 2), with_noop), hidden())
    assert all_noop.num_noop.tolist() == [TOKENS] * GROUPS
    assert all_noop.num_dropped.tolist() == [0] * GROUPS
    gradient = eqx.filter_jit(jax.grad(loss))(*split(with_noop), hidden())
    assert np.all(np.any(np.asarray(gradient.block.router.scorer.weight)[:, 4:] != 0, axis=0))
    # Not compiled: XLA drops the addition of 0 that this is about.
    out, _ = with_bias(noop_bias(100.0, 4, 2), with_noop)(jnp.full_like(hidden(), -0.0))
    assert np.all(np.signbit(out))


@pytest.mark.parametrize("select", [mode.TokenChoice(1), mode.ExpertChoice()])
def test_invariant_30_bias_of_the_no_ops(select: mode.AbstractSelector) -> None:
    """At plus infinity the block is attention only; at minus infinity the assignment is that of
    the ordinary experts."""
    layer = mode.integrated_mode(expert, DIM, 2, 3, 1, select=select, capacity_factor=1.5, key=KEY)
    block = layer.block
    out, (routing,) = run(with_bias(noop_bias(INF, 3, 1), layer), hidden())
    assert not np.any(routing.filled)
    attended, _ = block.attention(block.attention_norm(hidden()), mode.TokenInfo.plain((8, TOKENS)))
    assert_close(out, hidden() + attended)

    ordinary = mode.integrated_mode(
        expert, DIM, 2, 3, 0, select=select, capacity_factor=1.5, key=KEY
    )
    same_router = block.feedforward.router.scorer.weight[:, :3]
    ordinary = eqx.tree_at(
        lambda m: (m.block.feedforward.router.scorer.weight, m.block.feedforward.experts),
        ordinary,
        (same_router, block.feedforward.experts),
    )
    _, (without,) = run(with_bias(noop_bias(-INF, 3, 1), layer), hidden())
    _, (want,) = run(ordinary, hidden())
    assert np.array_equal(without.index, want.index)
    assert without.num_noop.tolist() == [0] * GROUPS
    assert np.all(np.isfinite(without.weight))
    if isinstance(select, mode.TokenChoice):
        finite = eqx.filter_jit(jax.grad(loss))(
            *split(with_bias(noop_bias(-INF, 3, 1), layer)), hidden()
        )
        assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(finite))


def test_invariant_31_the_control_costs_the_same() -> None:
    """Reduced capacity and dropping, at the FLOPs of the integrated model."""
    integrated = mode.integrated_mode(expert, DIM, 2, 6, 2, key=KEY)
    reduced = mode.reduced_capacity_moe(expert, DIM, 2, 6, 2, key=KEY)
    for part in ("mode.GELU", "mode.Attention"):
        assert flops(integrated).parts[part] == flops(reduced).parts[part]
    assert flops(integrated).matmul == pytest.approx(flops(reduced).matmul, rel=0.02)
    assert run(integrated, hidden())[1][0].index.shape == run(reduced, hidden())[1][0].index.shape


def test_invariant_32_selection_bias() -> None:
    """It changes the choice and not the gate, moves by past batches only, and no optimizer has
    it."""
    layer = experts(KEY, select=mode.TokenChoice(2), capacity_factor=2.0)
    bias = jnp.array([0.5, -0.5, 0.0, 0.25])
    _, (routing,) = run(layer, hidden())
    _, (biased,) = run(with_bias(bias, layer), hidden())
    assert np.any(routing.index != biased.index)
    assert np.array_equal(routing.logits, biased.logits)
    probability = np.swapaxes(np.asarray(jax.nn.softmax(biased.logits, -1)), -1, -2)
    seat = np.minimum(biased.index, TOKENS - 1)
    want = np.where(biased.filled, np.take_along_axis(probability, seat, -1), 0)
    assert_close(biased.weight, want)

    state = mode.trainable(layer).block.router.state
    assert (state.bias, state.threshold, state.updates) == (False, False, False)
    moved = mode.update_state(layer, (routing,), bias_rate=0.1)
    load = np.asarray(routing.load).sum(0)
    want = 0.1 * np.sign(load.mean() - load)
    assert_close(moved.block.router.state.bias, want)
    assert not np.any(layer.block.router.state.bias)

    def of_bias(bias: Array) -> Array:
        return jnp.sum(with_bias(bias, layer)(hidden())[0])

    assert not np.any(jax.grad(of_bias)(bias))


def test_invariant_33_equal_training_flops() -> None:
    """Training FLOPs, gradient included, are counted for any arm: a routed model affords more
    layers at the cost of a dense one."""

    def training(depth: int, offset: int) -> int:
        model = mode.mod_decoder(64, 32, depth, 2, capacity=0.125, offset=offset, key=KEY)
        parameters, rest = eqx.partition(model, mode.trainable(model))
        tokens = jax.ShapeDtypeStruct((2, 64), jnp.int32)

        def objective(parameters: PyTree, tokens: Array) -> Array:
            return jnp.sum(eqx.combine(parameters, rest)(tokens)[0])

        return mode.count_flops(jax.value_and_grad(objective), parameters, tokens).total

    dense, routed, deeper = training(6, 6), training(6, 1), training(10, 1)
    # An eighth of half of the layers: (3 + 3/8) / 6 = 0.56 and (5 + 5/8) / 6 = 0.94 of the cost.
    assert routed / dense == pytest.approx(0.5625, abs=0.02)
    assert deeper / dense == pytest.approx(0.9375, abs=0.03)
