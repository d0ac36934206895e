"""What an implementation of Mixture-of-Depths must get right: one test per invariant, 1 to 22."""

import functools
import inspect

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array, PyTree

import mode
from mode._precision import cast_parameters

from .helpers import assert_close, padded_info
from .layers import (
    DIM,
    GROUPS,
    TOKENS,
    VOCAB,
    One,
    depth,
    experts,
    hidden,
    loss,
    predicted,
    ranked,
    run,
    split,
    stack,
    transformer_block,
)


KEY = jax.random.key(3)
CHOSEN = TOKENS // 4


def test_invariant_01_dense_equivalence() -> None:
    """Capacity = S and gate fixed to 1: output equals the dense block, also gradients."""
    routed = depth(KEY, transformer_block, capacity=1.0, gate=One())
    dense = mode.Residual(routed.block)
    assert_close(run(routed, hidden())[0], run(dense, hidden())[0])
    gradient = eqx.filter_jit(jax.grad(loss, argnums=(0, 2)))
    got, got_input = gradient(*split(routed), hidden())
    want, want_input = gradient(*split(dense), hidden())
    assert_close((got.block, got_input), (want.block, want_input))
    assert not np.any(got.router.scorer.weight)


@pytest.mark.parametrize("select", [mode.ExpertChoice(), mode.RandomChoice(), mode.Strided()])
def test_invariant_02_exactly_c_tokens(select: mode.AbstractSelector) -> None:
    """Exactly C tokens per sequence per routed block, ties included, lowest index first."""
    layer = depth(KEY, select=select)
    mode.testing.assert_exact_capacity(layer, tokens=TOKENS, dim=DIM)
    tied = eqx.tree_at(lambda m: m.router.scorer.weight, layer, replace_fn=jnp.zeros_like)
    mode.testing.assert_exact_capacity(tied, tokens=TOKENS, dim=DIM)
    if isinstance(select, mode.ExpertChoice):
        _, (routing,) = run(tied, hidden())
        assert np.all(np.asarray(routing.index) == np.arange(CHOSEN))


def test_invariant_03_in_time_order_and_written_once() -> None:
    """Gathered indices ascending, unique; the scatter writes each once."""

    def ones(x: Array, info: mode.TokenInfo, *, key: Array | None = None) -> PyTree:
        return jnp.ones_like(x), ()

    layer = depth(KEY, lambda _: ones, gate=One())
    x = jnp.round(hidden())
    out, (routing,) = layer(x)
    assert np.all(np.diff(routing.index, axis=-1) > 0)
    written = np.broadcast_to(routing.selected, out.shape)
    assert np.array_equal(np.asarray(out - x), written.astype(np.float32))


def test_invariant_04_original_positions() -> None:
    """Positions and masks from original positions: insert unselected tokens between the selected
    ones, and attention uses the new, true distances."""
    layer = ranked(depth(KEY, transformer_block, capacity=0.25, gate=One()))
    x = hidden()[0]
    low, high = x.at[:, 0].set(-1.0), x[:8].at[:, 0].set(1.0)
    for places in ([0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 5, 6, 17, 20, 30, 31]):
        place = jnp.array(places)
        out, (routing,) = run(layer, low.at[place].set(high))
        assert routing.index.tolist() == [places]
        there = mode.TokenInfo(place, jnp.ones(8, int))
        update, _ = layer.block(high, there)
        assert_close(out[place], high + update)
        if places[-1] == 31:
            by_rank, _ = layer.block(high, mode.TokenInfo.plain((8,)))
            assert np.abs(update - by_rank).max() > 1e-2


def test_invariant_04_original_segments() -> None:
    """Documents packed in one sequence stay apart among the selected tokens."""
    layer = ranked(depth(KEY, transformer_block, gate=One()))
    segments = jnp.repeat(jnp.array([1, 2]), TOKENS // 2)
    x = hidden()[0].at[:, 0].set(-1.0).at[::4, 0].set(1.0)
    out, _ = run(layer, x, mode.TokenInfo.packed(segments))
    other, _ = run(layer, x.at[0, 1:].add(1.0), mode.TokenInfo.packed(segments))
    changed = np.any(np.asarray(out != other), axis=-1)
    assert changed[: TOKENS // 2 : 4].all()
    assert not changed[TOKENS // 2 :].any()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_invariant_05_skipped_tokens_bit_identical(dtype: jnp.dtype) -> None:
    """Skipped tokens go bit-identical through the block."""
    layer = depth(KEY, transformer_block)
    mode.testing.assert_residual_identity(layer, tokens=TOKENS, dim=DIM, dtype=dtype)


def test_invariant_06_selected_tokens() -> None:
    """Selected token: x + r * delta, delta = attention + feed-forward; no double residual."""
    layer = depth(KEY, transformer_block)
    x, block = hidden()[0], layer.block
    out, (routing,) = run(layer, x)
    place = np.asarray(routing.index[0])
    there = mode.TokenInfo(jnp.asarray(place), jnp.ones(CHOSEN, int))
    attended, _ = block.attention(block.attention_norm(x[place]), there)
    fed, _ = block.feedforward(block.feedforward_norm(x[place] + attended), there)
    r = (x[place] @ layer.router.scorer.weight)[:, 0]
    assert_close(routing.weight[0], r)
    assert_close(out[place], x[place] + r[:, None] * (attended + fed))


def test_invariant_07_skipped_tokens_are_no_keys() -> None:
    """Perturb a skipped token that stays skipped: the selected outputs are unchanged."""
    layer = ranked(depth(KEY, transformer_block))
    out, (routing,) = run(layer, hidden())
    skipped = ~np.asarray(routing.selected)
    noise = jax.random.normal(KEY, hidden().shape).at[..., 0].set(0)
    other, (same,) = run(layer, hidden() + jnp.where(skipped, noise, 0))
    assert np.array_equal(routing.index, same.index)
    chosen = ~skipped[..., 0]
    assert np.array_equal(np.asarray(out)[chosen], np.asarray(other)[chosen])


def test_invariant_08_selection_is_per_sequence() -> None:
    """The result of a row is independent of other rows; vmapped equals batched."""
    mode.testing.assert_batch_independent(depth(KEY, transformer_block), tokens=TOKENS, dim=DIM)


def test_invariant_09_gradient_through_the_selected_only() -> None:
    """The loss reaches the router through selected tokens only; agrees with finite differences."""
    layer, x = depth(KEY), hidden()[0]
    _, (routing,) = run(layer, x)
    selected = routing.selected

    def reading(weight: Array, mask: Array, x: Array = x) -> Array:
        routed = eqx.tree_at(lambda m: m.router.scorer.weight, layer, weight)
        return jnp.sum(jnp.where(mask, jnp.sin(cast_parameters(routed, x.dtype)(x)[0]), 0))

    weight = layer.router.scorer.weight
    gradient = jax.jit(jax.grad(reading))
    assert not np.any(gradient(weight, ~selected))
    assert np.any(gradient(weight, selected))
    with jax.enable_x64(True):
        wide, step = x.astype(jnp.float64), 1e-6
        there = weight.astype(jnp.float64)
        towards = jnp.cos(jnp.arange(DIM, dtype=jnp.float64))[:, None]
        exact = jnp.sum(gradient(there, selected, wide) * towards)
        ahead, behind = (reading(there + s * towards, selected, wide) for s in (step, -step))
        np.testing.assert_allclose((ahead - behind) / (2 * step), exact, rtol=1e-6)


def test_invariant_10_capacity_is_a_python_int() -> None:
    """C is a Python int at trace time, by a documented rule; no recompile between steps."""
    for tokens, share, want in [(32, 0.25, 8), (4, 0.125, 1), (33, 0.25, 8), (10, 0.99, 9)]:
        got = mode.token_capacity(tokens, share)
        assert type(got) is int
        assert got == want == max(1, min(tokens, int(share * tokens)))
    mode.testing.assert_no_retrace(depth(KEY), tokens=TOKENS, dim=DIM)
    mode.testing.assert_static_shapes(depth(KEY), tokens=(4, 33), dim=DIM)


def test_invariant_11_router_in_float32() -> None:
    """Router score, gates and losses in float32 even under bfloat16."""
    layer = predicted(KEY, gate=mode.Sigmoid())
    x = hidden().astype(jnp.bfloat16)
    _, (routing,) = run(layer, x)
    _, (wide,) = run(layer, x.astype(jnp.float32))
    for name in ("logits", "weight", "predictor", "detached_logits"):
        assert getattr(routing, name).dtype == jnp.float32
        assert np.array_equal(getattr(routing, name), getattr(wide, name))
    losses = (mode.router_z_loss, mode.load_balance_loss, mode.router_bce, mode.predictor_bce)
    assert all(one(routing).dtype == jnp.float32 for one in losses)


def test_invariant_12_every_other_layer() -> None:
    """Every other layer by default, dense first; configurable; scanned over pairs."""
    layers = stack(KEY, depth=6)
    assert [type(one) for one in layers.layers] == [mode.Residual, mode.MixtureOfDepths]
    assert layers.repeats == 3
    makers = mode.every_other(transformer_block, depth, 7, every=3, offset=2)
    assert [place for place, make in enumerate(makers) if make is depth] == [2, 5]


def test_invariant_13_padding_is_never_selected() -> None:
    """If real tokens < C, the remaining slots are empty with weight 0."""
    lengths = (32, 9, 8, 7, 3, 1, 0, 32)
    _, (routing,) = run(depth(KEY), hidden(), padded_info(*lengths, tokens=TOKENS))
    assert routing.num_filled.tolist() == [min(CHOSEN, length) for length in lengths]
    assert np.all(routing.index[~np.asarray(routing.filled)] == TOKENS)
    assert not np.any(routing.weight[~np.asarray(routing.filled)])
    assert not np.any(routing.selected & ~routing.valid[..., None])


def test_invariant_14_flops_scale_with_capacity() -> None:
    """Linear FLOPs scale with C/S, attention scores with its square: the compiler's own count."""
    dim, tokens = 64, 256

    def compiled(layer: PyTree, tokens: int = tokens) -> float:
        x = jax.ShapeDtypeStruct((2, tokens, dim), jnp.float32)
        return jax.jit(lambda x: layer(x)[0]).lower(x).compile().cost_analysis()["flops"]

    feedforward = mode.PositionWise(mode.GELU(dim, key=KEY))
    attention = mode.Attention(dim, 4, key=KEY)
    routed = compiled(mode.MixtureOfDepths(feedforward, dim, 0.25, key=KEY))
    assert routed == pytest.approx(compiled(mode.Residual(feedforward)) / 4, rel=0.05)
    routed = compiled(mode.MixtureOfDepths(attention, dim, 0.25, key=KEY))
    assert routed == pytest.approx(compiled(mode.Residual(attention), tokens // 4), rel=0.05)
    # Without what is linear, four projections of two sequences, the square of the capacity is left.
    projections = 2 * tokens * 8 * dim * dim
    scores = compiled(mode.Residual(attention)) - projections
    assert (routed - projections / 4) / scores < 0.25 / 2


def test_invariant_15_random_control() -> None:
    """The control selects exactly C by Gaussian scores and needs an explicit key."""
    layer = depth(KEY, select=mode.RandomChoice())
    with pytest.raises(ValueError, match="`key` is needed"):
        layer(hidden())
    keys = jax.random.split(KEY, 400)
    draws = jax.jit(jax.vmap(lambda key, x: layer(x, key=key)[1][0].selected, (0, None)))
    taken = np.asarray(draws(keys, hidden()[0]))[..., 0]
    assert np.all(taken.sum(-1) == CHOSEN)
    assert np.array_equal(taken, np.asarray(draws(keys, hidden()[1]))[..., 0])
    assert np.abs(taken.mean(0) - 0.25).max() < 5 * (0.25 * 0.75 / 400) ** 0.5


def test_invariant_16_router_bce() -> None:
    """Targets are the top-k mask, the gradient into the router is non-zero and may stop there."""
    layer = depth(KEY)

    def auxiliary(router: mode.Router, x: Array, stop: bool) -> Array:
        _, (routing,) = eqx.tree_at(lambda m: m.router, layer, router)(x)
        return mode.router_bce(routing, stop_trunk=stop)

    for stop in (False, True):
        gradient = eqx.filter_grad(lambda both: auxiliary(*both, stop))  # noqa: B023
        of_router, of_trunk = gradient((layer.router, hidden()))
        assert np.any(of_router.scorer.weight)
        assert np.any(of_trunk) != stop
    _, (routing,) = run(layer, hidden())
    p, target = jax.nn.sigmoid(routing.logits), routing.selected
    by_hand = -jnp.mean(jnp.where(target, jnp.log(p), jnp.log1p(-p)))
    assert_close(mode.router_bce(routing), by_hand)


def test_invariant_17_predictor_is_only_a_spectator() -> None:
    """Loss and gradients of trunk and router are identical with and without a predictor."""
    layer_key, predictor_key = jax.random.split(KEY)
    without = depth(layer_key)
    watched = depth(layer_key, predictor=mode.Predictor(DIM, key=predictor_key))
    assert np.array_equal(run(without, hidden())[0], run(watched, hidden())[0])

    @eqx.filter_jit
    @jax.grad
    def gradient(parameters: PyTree, rest: PyTree, weight: float) -> Array:
        out, (routing,) = eqx.combine(parameters, rest)(hidden())
        auxiliary = 0 if routing.predictor is None else weight * mode.predictor_bce(routing)
        return jnp.sum(jnp.sin(out)) + auxiliary

    alone = gradient(*split(without), jnp.float32(1))
    both = gradient(*split(watched), jnp.float32(1))
    assert np.any(both.router.predictor.up.weight)
    assert eqx.tree_equal(alone, eqx.tree_at(lambda m: m.router.predictor, both, None))


RULES = [mode.ByQuantile(), mode.ByLogit(), mode.ByPredictor()]


@functools.cache
def decoder() -> mode.Transformer:
    """A dense layer and a routed one, whose threshold has seen some tokens."""
    model = mode.mod_decoder(VOCAB, DIM, 2, 2, capacity=0.25, predictor=True, key=KEY)
    tokens = jax.random.randint(KEY, (GROUPS, TOKENS), 0, VOCAB)
    return eqx.filter_jit(mode.update_state)(model, run(model, tokens)[1])


def test_invariant_18_top_k_leaks() -> None:
    """Expected: under training top-k, later tokens change earlier outputs."""
    with pytest.raises(AssertionError, match="sees the future"):
        mode.testing.assert_causal(decoder(), vocab=VOCAB, tokens=TOKENS)
    with pytest.raises(AssertionError, match="sees the future"):
        mode.testing.assert_causal(experts(KEY), dim=DIM, tokens=TOKENS)


@pytest.mark.parametrize("by", RULES)
@pytest.mark.parametrize("limit", [1.0, None])
def test_invariant_18_causal_rules_do_not_leak(by: mode.AbstractRule, limit: float | None) -> None:
    """Under predictor or threshold routing, changing token t+1.. leaves outputs <= t identical."""
    model = mode.causal(decoder(), by=by, limit=limit)
    mode.testing.assert_causal(model, vocab=VOCAB, tokens=TOKENS)
    _, (routing,) = run(model, jax.random.randint(KEY, (2, TOKENS), 0, VOCAB))
    assert 0 < routing.num_filled.sum() < 2 * TOKENS


def test_invariant_19_a_prefix_is_a_prefix() -> None:
    """Step by step equals teacher-forced under threshold routing, as decoding relies on."""
    model = mode.causal(decoder())
    tokens = jax.random.randint(KEY, (2, TOKENS), 0, VOCAB)
    whole, _ = run(model, tokens)
    for length in (1, 2, 9):
        assert_close(run(model, tokens[:, :length])[0], whole[:, :length])


def test_invariant_20_one_token_is_not_top_1_of_1() -> None:
    """A length-1 sequence is processed only if its own margin is above 0."""
    layer = ranked(depth(KEY))
    x = hidden()[:, :1].at[:, 0, 0].set(jnp.array([1.0, -1.0, 2.0, 0.0, -2.0, 3.0, -3.0, 0.5]))
    assert run(layer, x)[1][0].num_filled.tolist() == [1] * GROUPS
    _, (routing,) = run(mode.causal(layer), x)
    assert routing.num_filled.tolist() == [1, 0, 1, 0, 0, 1, 0, 1]


def test_invariant_21_no_silent_drop() -> None:
    """Overflow is explicit: what a full expert turned away is counted, the earliest are kept."""
    layer = ranked(depth(KEY, select=mode.Threshold(mode.ByLogit(), limit=0.25)))
    _, (routing,) = run(layer, jnp.abs(hidden()))
    assert routing.num_dropped.tolist() == [TOKENS - CHOSEN] * GROUPS
    assert np.all(np.asarray(routing.index) == np.arange(CHOSEN))
    assert mode.routing_metrics(routing).drop_rate == 1 - 0.25


def test_invariant_22_precision_and_recall() -> None:
    """87.5 % is the trivial accuracy at 12.5 %; the causal loss stands beside the top-k loss."""
    _, (routing,) = run(depth(KEY, capacity=0.125), hidden())
    never = mode.agreement(routing, jnp.zeros_like(routing.selected))
    assert (never.accuracy, never.precision, never.recall) == (0.875, 0, 0)
    perfect = mode.agreement(routing, routing.selected)
    assert (perfect.accuracy, perfect.precision, perfect.recall) == (1, 1, 1)
    model, tokens = decoder(), jax.random.randint(KEY, (2, TOKENS), 0, VOCAB)
    logits, routings = run(model, tokens)
    assert np.any(logits != run(mode.causal(model), tokens)[0])
    (guess,) = mode.causal_membership(model, routings)
    assert guess.shape == (1, 2, TOKENS, 1)


def test_docstrings_warn_of_the_future() -> None:
    """A selector that looks ahead says so where it is read."""
    assert "not causal" in inspect.getdoc(mode.ExpertChoice)
    assert "future" in inspect.getdoc(mode.MixtureOfExperts)
    assert mode.ExpertChoice.looks_ahead
    assert not mode.Threshold.looks_ahead
