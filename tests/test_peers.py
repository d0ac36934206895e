"""Errors of public implementations of Mixture-of-Depths and -Experts, each kept out by a test."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array

import mode

from .helpers import assert_close, padded_info
from .layers import (
    CASES,
    DIM,
    GROUPS,
    TOKENS,
    Case,
    One,
    build,
    depth,
    experts,
    hidden,
    predicted,
    ranked,
    run,
    stack,
    transformer_block,
    with_bias,
    with_selector,
)


KEY = jax.random.key(5)
CHOSEN = TOKENS // 4


class Times(mode.AbstractGate):
    """Every weight is the same number."""

    number: float = eqx.field(static=True)

    def scores(self, logits: Array) -> Array:
        return logits

    def __call__(self, logits: Array, selected: Array) -> Array:
        return jnp.full_like(logits, self.number)


def nothing(x: Array, info: mode.TokenInfo, *, key: Array | None = None) -> Any:
    return jnp.zeros_like(x), ()


def positions(x: Array, info: mode.TokenInfo, *, key: Array | None = None) -> Any:
    """Its update says where each token stood."""
    where = jnp.where(info.valid, info.positions, 0).astype(x.dtype)
    return jnp.broadcast_to(where[..., None], x.shape), ()


@pytest.mark.parametrize("number", [1.0, 7.0, -3.0])
def test_the_residual_is_counted_once(number: float) -> None:
    """Not x + w (x + f(x)): where f is 0, nothing changes."""
    layer = depth(KEY, lambda _: nothing, gate=Times(number))
    assert np.array_equal(run(layer, hidden())[0], hidden())


@pytest.mark.parametrize("number", [1.0, 7.0, -3.0])
def test_the_weight_does_not_scale_the_residual(number: float) -> None:
    """Not w (x + f(x)), not even for a module with its own skip connection."""
    layer = depth(KEY, lambda _: mode.Delta(lambda rows: rows), gate=Times(number))
    assert np.array_equal(run(layer, hidden())[0], hidden())


def test_the_weight_gates_attention_and_feedforward() -> None:
    """Not the feed-forward alone: a weight of 0 leaves no trace of the block."""
    layer = depth(KEY, transformer_block, gate=Times(0.0))
    out, (routing,) = run(layer, hidden())
    assert np.array_equal(out, hidden())
    assert routing.num_filled.tolist() == [CHOSEN] * GROUPS
    doubled, once = (run(depth(KEY, transformer_block, gate=Times(w)), hidden())[0] for w in (2, 1))
    assert_close(doubled - hidden(), 2 * (once - hidden()))


def test_skipped_tokens_keep_their_residual() -> None:
    """Not x * mask."""
    _, (routing,) = run(depth(KEY), hidden())
    out = np.asarray(run(depth(KEY), hidden())[0])
    skipped = ~np.asarray(routing.selected[..., 0])
    assert np.array_equal(out[skipped], np.asarray(hidden())[skipped])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("distinct", [1, 3, 10, TOKENS])
def test_k_tokens_and_not_k_minus_one(dtype: jnp.dtype, distinct: int) -> None:
    """Not `score > k-th score`, which takes k - 1; not `>=`, which takes every tie."""
    scores = jnp.arange(TOKENS) % distinct
    x = jnp.zeros((TOKENS, DIM), dtype).at[:, 0].set(scores.astype(dtype))
    _, (routing,) = run(ranked(depth(KEY)), x)
    best = np.argsort(-np.asarray(scores), kind="stable")[:CHOSEN]
    assert routing.index[0].tolist() == sorted(best.tolist())


def test_distances_are_between_original_positions() -> None:
    """Not rotary angles by rank, and not by order of score."""
    layer = ranked(depth(KEY, transformer_block, gate=One()))
    blank = hidden()[0].at[:, 0].set(-1.0)
    content = hidden()[1, :CHOSEN].at[:, 0].set(jnp.arange(1.0, CHOSEN + 1))

    def at(*places: int) -> np.ndarray:
        place = jnp.array(places)
        return np.asarray(run(layer, blank.at[place].set(content))[0][place])

    near = at(0, 1, 2, 3, 4, 5, 6, 7)
    assert_close(at(20, 21, 22, 23, 24, 25, 26, 27), near)
    assert np.abs(at(0, 2, 4, 6, 8, 10, 12, 14) - near)[1:].max() > 1e-2


def test_the_block_sees_tokens_in_time_order() -> None:
    """Not in the order of their scores, and not through an `argsort` of sorted indices."""
    layer = ranked(depth(KEY, lambda _: positions, gate=One()))
    x = hidden().at[..., 0].set(-jnp.arange(TOKENS, dtype=jnp.float32)[None] % 5)
    out, (routing,) = run(layer, x)
    index = np.asarray(routing.index[:, 0])
    moved = np.take_along_axis(np.asarray(out - x), index[..., None], axis=1)
    assert_close(moved, np.broadcast_to(index[..., None], moved.shape).astype(np.float32))


def test_no_selected_token_sees_a_later_one() -> None:
    """The causal mask holds among the selected, whatever their scores."""
    layer = ranked(depth(KEY, transformer_block, gate=One()))
    x = hidden()[:1].at[..., 0].set(-jnp.arange(TOKENS, dtype=jnp.float32)[None])
    x = x.at[:, CHOSEN - 1, 0].set(5.0)
    noise = jax.random.normal(KEY, (DIM,)).at[0].set(0)
    out, (routing,) = run(layer, x)
    other, _ = run(layer, x.at[:, CHOSEN - 1].add(noise[None]))
    assert routing.index[0, 0].tolist() == list(range(CHOSEN))
    assert np.array_equal(out[:, : CHOSEN - 1], other[:, : CHOSEN - 1])


def test_sequences_do_not_compete() -> None:
    """Not top-k over the flattened batch."""
    mode.testing.assert_batch_independent(experts(KEY), tokens=TOKENS, dim=DIM)
    loud = hidden() * jnp.where(jnp.arange(GROUPS) == 0, 100.0, 1.0)[:, None, None]
    _, (routing,) = run(depth(KEY), loud)
    assert routing.num_filled.tolist() == [CHOSEN] * GROUPS


@pytest.mark.parametrize("gate", [mode.Raw(), mode.Sigmoid(), mode.Tanh()])
def test_a_weight_is_of_its_own_token(gate: mode.AbstractGate) -> None:
    """Not a softmax over the tokens of the sequence."""
    layer = ranked(depth(KEY, gate=gate))
    _, (routing,) = run(layer, hidden())
    last = int(routing.index[0, 0, -1])
    _, (other,) = run(layer, hidden().at[0, last, 0].add(9.0))
    assert np.array_equal(routing.index[0], other.index[0])
    assert np.array_equal(routing.weight[0, 0, :-1], other.weight[0, 0, :-1])


def test_an_experts_weight_is_a_probability_among_experts() -> None:
    """Not a softmax over the expert's tokens, and not over experts of equal rank."""
    layer = experts(KEY, num_noop=1)
    _, (routing,) = run(layer, hidden())
    probability = np.asarray(jax.nn.softmax(routing.logits, -1))[..., :4]
    want = np.take_along_axis(np.swapaxes(probability, -1, -2), np.asarray(routing.index), -1)
    assert_close(routing.weight, want)


def test_padding_takes_no_slot_by_its_score() -> None:
    info = padded_info(*[20] * GROUPS, tokens=TOKENS)
    x = jnp.where(info.valid[..., None], hidden(), 1e6)
    for layer in (ranked(depth(KEY)), ranked(experts(KEY))):
        _, (routing,) = run(layer, x, info)
        assert not np.any(routing.selected[:, 20:])


@pytest.mark.parametrize(
    "case",
    [case for case in CASES if case.name in ("mod", "mod_strided", "moe_noop_top_1", "stack")],
    ids=str,
)
def test_the_router_learns(case: Case) -> None:
    """Not from indices alone, and not through a softmax over one expert."""
    mode.testing.assert_router_gradients(build(case), tokens=TOKENS, dim=DIM, groups=(GROUPS,))


def test_targets_stay_in_their_row() -> None:
    """Not flat indices without the batch's offset: logits that say exactly who was taken in each
    row have no loss, and those of the row before have."""
    _, (routing,) = run(depth(KEY), hidden())

    def knowing(mask: Array) -> Array:
        logits = jnp.where(mask, 30.0, -30.0)
        return mode.router_bce(eqx.tree_at(lambda r: r.logits, routing, logits))

    assert knowing(routing.selected) < 1e-6
    assert knowing(jnp.roll(routing.selected, 1, axis=0)) > 1


def test_the_predictor_reads_the_input_of_its_layer() -> None:
    """Not the block's output, which is not there when the decision is taken."""
    layer = predicted(KEY)
    _, (routing,) = run(layer, hidden())
    assert_close(routing.predictor, layer.router.predictor(hidden()))


def test_the_predictor_decides_and_the_router_weighs() -> None:
    """Not the predictor's sigmoid as the weight."""
    layer = mode.causal(predicted(KEY), by=mode.ByPredictor())
    _, (routing,) = run(layer, hidden())
    assert np.array_equal(routing.selected, routing.predictor > 0)
    logits = np.pad(np.asarray(routing.logits[..., 0]), ((0, 0), (0, 1)))
    assert_close(
        routing.weight[:, 0], np.take_along_axis(logits, np.asarray(routing.index[:, 0]), 1)
    )


@pytest.mark.parametrize("tokens", [1, 2, 7])
def test_short_sequences_have_a_slot(tokens: int) -> None:
    """Not k = int(c T) = 0."""
    _, (routing,) = run(depth(KEY, capacity=0.125), hidden()[:, :tokens])
    assert routing.num_filled.tolist() == [1] * GROUPS


def test_a_decoded_token_may_pass_by() -> None:
    """Not top-1 of a sequence of one, which sends every generated token through every block."""
    layer = mode.causal(ranked(depth(KEY, transformer_block)))
    x = hidden()[:, :1].at[..., 0].set(-1.0)
    assert np.array_equal(run(layer, x)[0], x)
    assert np.any(run(layer, x.at[..., 0].set(1.0))[0] != x)


def test_tokens_are_gathered_and_not_masked() -> None:
    """A mask computes everything and then throws it away."""
    block, like = transformer_block(KEY), jax.ShapeDtypeStruct((2, 64, DIM), jnp.float32)
    dense = mode.count_flops(mode.Residual(block), like)
    routed = mode.count_flops(mode.MixtureOfDepths(block, DIM, 0.125, key=KEY), like)
    assert routed.parts["mode.SwiGLU"] * 8 == dense.parts["mode.SwiGLU"]
    assert routed.total < dense.total / 6


def test_experts_outputs_are_not_scrambled_over_the_batch() -> None:
    """Expert e multiplies by e + 1; every token of every row gets what its own experts give."""
    layer = experts(KEY, gate=mode.Sigmoid(), capacity_factor=2.0)
    scale = jnp.arange(1.0, 5.0)

    class Scales(eqx.Module):
        by: Array

        def __call__(self, vector: Array) -> Array:
            return self.by * vector

    layer = eqx.tree_at(lambda m: m.block.experts, layer, Scales(scale))
    out, (routing,) = run(layer, hidden())
    weight = jnp.where(routing.selected, jax.nn.sigmoid(routing.logits), 0)
    factor = 1 + jnp.sum(weight * scale[None, None], axis=-1, keepdims=True)
    assert len({tuple(row.ravel().tolist()) for row in np.asarray(routing.index)}) == GROUPS
    assert_close(out, factor * hidden())


def test_calls_do_not_count() -> None:
    """Not a capacity that warms up with the number of calls, those of a checkpoint included."""
    layer = depth(KEY)
    before = jax.tree.leaves(layer)
    shapes = {layer(hidden())[1][0].index.shape for _ in range(3)}
    assert shapes == {(GROUPS, 1, CHOSEN)}
    assert eqx.tree_equal(before, jax.tree.leaves(layer))


def test_every_layer_has_its_own_router() -> None:
    """Not one router for all layers."""
    (router,) = mode.routers(stack(KEY, depth=6))
    first, second, third = np.asarray(router.scorer.weight)
    assert not np.array_equal(first, second)
    assert not np.array_equal(second, third)


def test_empty_slots_are_no_keys() -> None:
    """Not zero rows inside an unmasked window: softmax mass would leak to them."""
    layer = depth(KEY, transformer_block, capacity=0.5, gate=One())
    out, (routing,) = run(layer, hidden(), padded_info(*[3] * GROUPS, tokens=TOKENS))
    assert routing.num_filled.tolist() == [3] * GROUPS
    update, _ = layer.block(hidden()[:, :3], mode.TokenInfo.plain((GROUPS, 3)))
    assert_close(out[:, :3], hidden()[:, :3] + update)


def test_what_an_expert_makes_of_an_empty_slot_is_not_read() -> None:
    """Not a product with a weight of 0: 0 * NaN is NaN."""
    layer = experts(KEY, select=mode.TokenChoice(1), capacity_factor=2.0)
    layer = eqx.tree_at(lambda m: m.block.experts, layer, lambda vector: 1 / vector)
    out, (routing,) = run(layer, hidden())
    assert not np.all(routing.filled)
    assert np.all(np.isfinite(out))


def test_a_no_op_is_not_expert_zero() -> None:
    """Not a null id remapped to an expert with weight 0, which still computes and takes slots."""
    layer = experts(KEY, num_noop=1, select=mode.TokenChoice(1))
    _, (routing,) = run(with_bias(jnp.array([0, 0, 0, 0, jnp.inf]), layer), hidden())
    assert not np.any(routing.filled)
    assert routing.num_noop.tolist() == [TOKENS] * GROUPS


def test_a_second_choice_evicts_no_first() -> None:
    """Not every first choice before every second one, by which later tokens evict earlier ones."""
    layer = experts(KEY, select=mode.TokenChoice(2), capacity_factor=0.75)
    mode.testing.assert_causal(layer, tokens=TOKENS, dim=DIM)
    _, (routing,) = run(layer, hidden())
    assert np.all(routing.num_dropped > 0)


def test_padding_is_in_no_loss() -> None:
    """Not the balance and z-losses of a batch that depend on how far it was padded."""
    for layer in (predicted(KEY), experts(KEY, select=mode.TokenChoice(2))):
        everyone = with_selector(mode.Threshold(mode.ByLogit()), layer)
        _, (short,) = run(everyone, hidden()[:, :20])
        _, (padded,) = run(everyone, hidden(), padded_info(*[20] * GROUPS, tokens=TOKENS))
        for one in (mode.router_z_loss, mode.load_balance_loss, mode.router_bce):
            assert_close(jax.jit(one)(padded), jax.jit(one)(short))


def test_no_routing_is_lost() -> None:
    """Not losses collected through globals: each routed layer's record is returned."""
    _, (routing,) = run(stack(KEY, depth=6), hidden())
    assert routing.index.shape[:2] == (3, GROUPS)
