"""Whole layers against the oracle, with their weights exported to it."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mode
from tests import reference as ref
from tests.helpers import (
    assert_close,
    f64,
    hidden_states,
    oracle_block,
    oracle_experts,
    oracle_function,
    oracle_router,
    packed_info,
    padded_info,
    rng,
    run,
)


DIM = 16
TOKENS = 12

# Plain, padded, and packed documents with padding.
INFOS = {
    "plain": None,
    "padded": padded_info(12, 7, 3, tokens=TOKENS),
    "packed": packed_info((5, 4, 2), (1, 11), (3, 3), tokens=TOKENS),
}
infos = pytest.mark.parametrize("info", INFOS.values(), ids=INFOS)

GATES = {
    "raw": (mode.Raw(), "raw", 1.0),
    "sigmoid": (mode.Sigmoid(), "sigmoid", 1.0),
    "twice sigmoid": (mode.Sigmoid(2.0), "sigmoid", 2.0),
    "tanh": (mode.Tanh(0.5), "tanh", 0.5),
}


def make_block(feedforward=None):
    """Grouped queries and another rotary base than the default."""
    return mode.TransformerBlock(
        DIM,
        4,
        num_kv_heads=2,
        rope_theta=100.0,
        feedforward=feedforward,
        key=jax.random.key(1),
    )


def make_experts(key=2, function=mode.GELU, **options):
    """Three experts."""
    options = {"num_experts": 3, **options}

    def make(key):
        return function(DIM, 24, key=key)

    return mode.MixtureOfExperts(make, DIM, key=jax.random.key(key), **options)


def numbers(x, info):
    """What the oracle reads of a batch: hidden states, validity, positions and segments."""
    info = mode.TokenInfo.plain(x.shape[:-1]) if info is None else info
    return f64(x), *map(np.asarray, (info.valid, info.positions, info.segment_ids))


def matches(routing, assignment):
    """The routing holds the oracle's assignment."""
    np.testing.assert_array_equal(routing.index, assignment.index)
    np.testing.assert_array_equal(routing.load, assignment.load)


@infos
def test_residual_block(info):
    """x + block(x) on real tokens, and padding passes by unchanged."""
    block = make_block()
    x = hidden_states(0, 3, TOKENS, DIM)
    hidden, routings = run(mode.Residual(block), x, info)
    assert routings == ()

    def dense(x, valid, positions, segments):
        update = oracle_block(block)(x, positions, segments)
        return x + np.where(valid[:, None], update, 0)

    assert_close(hidden, ref.over_groups(dense, 1, *numbers(x, info)))


@infos
@pytest.mark.parametrize("gate", GATES)
def test_mixture_of_depths(gate, info):
    """Equation 1 with every gate, original positions and segments, padding left out."""
    gate, name, scale = GATES[gate]
    block = make_block()
    layer = mode.MixtureOfDepths(block, DIM, 0.5, gate=gate, key=jax.random.key(3))
    x = hidden_states(1, 3, TOKENS, DIM)
    hidden, (routing,) = run(layer, x, info)

    def depths(x, valid, positions, segments):
        router = oracle_router(layer.router)[0]
        return ref.mixture_of_depths(
            x, router, oracle_block(block), 0.5, name, valid, positions, segments, scale=scale
        )

    expected, assignment = ref.over_groups(depths, 1, *numbers(x, info))
    matches(routing, assignment)
    assert_close(hidden, expected)


@pytest.mark.parametrize("capacity", [0.01, 0.3, 1.0])
def test_mixture_of_depths_of_one_sequence_at_any_capacity(capacity):
    """From a single token to all of them; a bare [tokens, dim] is one group."""
    block = make_block()
    layer = mode.MixtureOfDepths(block, DIM, capacity, key=jax.random.key(3))
    x = hidden_states(2, 11, DIM)
    hidden, (routing,) = run(layer, x)
    router = oracle_router(layer.router)[0]
    expected, assignment = ref.mixture_of_depths(f64(x), router, oracle_block(block), capacity)
    matches(routing, assignment)
    assert_close(hidden, expected)


def test_mixture_of_depths_at_full_capacity_and_weight_one_is_the_dense_block():
    """With r = 1 everywhere the layer is x + f(x), and so are its gradients."""
    block = make_block()
    layer = mode.MixtureOfDepths(block, DIM, 1.0, key=jax.random.key(3))
    x = hidden_states(3, 2, TOKENS, DIM).at[..., 0].set(1.0)
    ones = jnp.zeros((DIM, 1)).at[0].set(1.0)
    layer = eqx.tree_at(lambda m: m.router.scorer.weight, layer, ones)

    @eqx.filter_jit
    @eqx.filter_value_and_grad
    def loss(model, x):
        return jnp.sum(jnp.sin(model(x)[0]))

    value, gradient = loss(layer, x)
    expected, dense_gradient = loss(mode.Residual(block), x)
    assert_close(value, expected, scale=10)
    assert_close(jax.tree.leaves(gradient.block), jax.tree.leaves(dense_gradient), scale=10)


@pytest.mark.parametrize("rule", ["strided", "threshold"])
def test_mixture_of_depths_with_another_selector(rule):
    """The layer does not care who chose."""
    block = make_block()
    info = INFOS["packed"]
    x = hidden_states(4, 3, TOKENS, DIM)
    if rule == "strided":
        select, slots = mode.Strided(), 4

        def oracle(scores, valid):
            return ref.strided(valid, 1, slots)
    else:
        select, slots = mode.Threshold(mode.ByLogit(), 0.25), 3

        def oracle(scores, valid):
            return ref.threshold(scores, valid, slots)

    layer = mode.MixtureOfDepths(block, DIM, 1 / 3, select=select, key=jax.random.key(3))
    hidden, (routing,) = run(layer, x, info)
    assert routing.index.shape == (3, 1, slots)

    def depths(x, valid, positions, segments):
        router = oracle_router(layer.router)[0]
        return ref.mixture_of_depths(
            x,
            router,
            oracle_block(block),
            1 / 3,
            "raw",
            valid,
            positions,
            segments,
            select=oracle,
        )

    expected, assignment = ref.over_groups(depths, 1, *numbers(x, info))
    matches(routing, assignment)
    assert_close(hidden, expected)


EXPERT_GATES = {
    "softmax": mode.Softmax(),
    "selected_softmax": mode.SelectedSoftmax(),
    "raw": mode.Raw(),
    "sigmoid": mode.Sigmoid(),
}


@pytest.mark.parametrize("gate", EXPERT_GATES)
@pytest.mark.parametrize("k", [None, 1, 2])
def test_mixture_of_experts(gate, k):
    """Expert and token choice with every gate, no-ops, a selection bias, padding and drops."""
    if gate == "selected_softmax" and k == 1:
        gate = "softmax"
    select = mode.ExpertChoice() if k is None else mode.TokenChoice(k)
    layer = make_experts(
        select=select, gate=EXPERT_GATES[gate], num_noop=2, capacity_factor=1.0, router_std=1.0
    )
    bias = rng(5).normal(size=5).astype(np.float32)
    layer = eqx.tree_at(lambda m: m.router.state.bias, layer, jnp.asarray(bias))
    info = INFOS["padded"]
    x = hidden_states(6, 3, TOKENS, DIM)
    update, (routing,) = run(layer, x, info)

    def choose(scores, valid):
        if k is None:
            return ref.expert_choice(scores, valid, 3, 4)
        return ref.token_choice(scores, valid, 3, 4, k)

    def experts(x, valid):
        functions = oracle_experts(layer.experts)
        router = oracle_router(layer.router)
        return ref.mixture_of_experts(x, router, functions, choose, gate, valid, bias=f64(bias))

    expected, assignment = ref.over_groups(experts, 1, *numbers(x, info)[:2])
    matches(routing, assignment)
    assert_close(update, expected)
    index = np.asarray(routing.index)
    for group in range(3):
        logits = ref.router_logits(f64(x[group]), oracle_router(layer.router))
        assert_close(routing.weight[group], ref.combine_weights(logits, index[group], gate))


def test_shared_experts_see_every_token_with_weight_one():
    """The routed sum plus each shared expert's output."""
    layer = make_experts(function=mode.SwiGLU, num_shared=2, num_experts=4, capacity_factor=0.5)
    x = hidden_states(7, 2, TOKENS, DIM)
    update, _ = run(layer, x)

    def experts(x):
        functions = oracle_experts(layer.experts)

        def choose(scores, valid):
            return ref.expert_choice(scores, valid, 4, 1)

        routed, _ = ref.mixture_of_experts(x, oracle_router(layer.router), functions, choose)
        return routed + sum(shared(x) for shared in oracle_experts(layer.shared))

    assert_close(update, ref.over_groups(experts, 1, f64(x)))


def test_a_single_expert_at_capacity_one_is_its_feedforward():
    """e = 1 gives the weight 1 to every token: the dense feed-forward."""
    layer = make_experts(num_experts=1)
    x = hidden_states(8, 2, TOKENS, DIM)
    update, _ = run(layer, x)
    assert_close(update, oracle_experts(layer.experts)[0](f64(x)))


@infos
def test_staged_mode(info):
    """Depth first; attention and the expert router see the tokens that stay, and no others."""

    def make(key):
        return mode.GELU(DIM, 24, key=key)

    layer = mode.staged_mode(make, DIM, 4, 3, capacity=0.5, key=jax.random.key(4))
    x = hidden_states(9, 3, TOKENS, DIM)
    hidden, (depth, experts) = run(layer, x, info)
    inner = layer.block.feedforward
    assert (depth.index.shape, experts.index.shape) == ((3, 1, 6), (3, 3, 2))

    def feedforward(x):
        def choose(scores, valid):
            return ref.expert_choice(scores, valid, 3, 2)

        functions = oracle_experts(inner.experts)
        return ref.mixture_of_experts(x, oracle_router(inner.router), functions, choose)[0]

    def staged(x, valid, positions, segments):
        block = oracle_block(layer.block, feedforward)
        router = oracle_router(layer.router)[0]
        return ref.mixture_of_depths(x, router, block, 0.5, "raw", valid, positions, segments)

    expected, assignment = ref.over_groups(staged, 1, *numbers(x, info))
    matches(depth, assignment)
    assert_close(hidden, expected)


@infos
@pytest.mark.parametrize("k", [None, 1])
def test_integrated_mode(k, info):
    """Attention for every token; the feed-forward of those that an expert took."""
    select = mode.ExpertChoice() if k is None else mode.TokenChoice(k)

    def make(key):
        return mode.GELU(DIM, 24, key=key)

    layer = mode.integrated_mode(make, DIM, 4, 3, 1, select=select, key=jax.random.key(5))
    x = hidden_states(10, 3, TOKENS, DIM)
    hidden, (routing,) = run(layer, x, info)
    experts = layer.block.feedforward
    assert routing.index.shape == (3, 3, 3)

    def choose(scores, valid):
        if k is None:
            return ref.expert_choice(scores, valid, 3, 3)
        return ref.token_choice(scores, valid, 3, 3, k)

    def integrated(x, valid, positions, segments):
        functions = oracle_experts(experts.experts)
        router = oracle_router(experts.router)

        def feedforward(normed):
            return ref.mixture_of_experts(normed, router, functions, choose, valid=valid)[0]

        update = oracle_block(layer.block, feedforward)(x, positions, segments)
        return x + np.where(valid[:, None], update, 0)

    assert_close(hidden, ref.over_groups(integrated, 1, *numbers(x, info)))


@pytest.mark.parametrize("infinity", [np.inf, -np.inf])
@pytest.mark.parametrize("select", [mode.ExpertChoice(), mode.TokenChoice(1)])
def test_a_no_op_that_always_or_never_wins(infinity, select):
    """Its bias at plus infinity: token choice computes nothing. At minus infinity: a plain MoE."""
    layer = make_experts(num_noop=1, select=select)
    biased = eqx.tree_at(lambda m: m.router.state.bias, layer, jnp.zeros(4).at[-1].set(infinity))
    x = hidden_states(11, 2, TOKENS, DIM)
    update, (routing,) = run(biased, x)
    if infinity > 0:
        # Every expert's score is minus infinity: nobody may be taken under either rule.
        assert not np.asarray(update).any()
        assert routing.num_filled.tolist() == [0, 0]
        return
    plain = eqx.tree_at(
        lambda m: (m.router.scorer.weight, m.router.state.bias),
        make_experts(select=select),
        (layer.router.scorer.weight[:, :3], jnp.zeros(3)),
    )
    _, (expected,) = run(plain, x)
    np.testing.assert_array_equal(routing.index, expected.index)
    assert routing.num_noop.tolist() == [0, 0]


def test_everything_in_float64():
    """With 64-bit numbers on, layers compute in the width of their input, to 1e-9."""
    with jax.enable_x64(True):
        block = make_block()
        layer = mode.MixtureOfDepths(block, DIM, 0.5, gate=mode.Sigmoid(), key=jax.random.key(3))
        moe = make_experts(num_noop=1)
        x = jnp.asarray(rng(12).normal(size=(3, TOKENS, DIM)), jnp.float64)
        info = INFOS["packed"]
        hidden, (routing,) = run(layer, x, info)
        update, _ = run(moe, hidden, info)
    assert hidden.dtype == update.dtype == routing.weight.dtype == jnp.float64

    def both(x, valid, positions, segments):
        router = oracle_router(layer.router)[0]
        hidden, _ = ref.mixture_of_depths(
            x, router, oracle_block(block), 0.5, "sigmoid", valid, positions, segments
        )

        def choose(scores, valid):
            return ref.expert_choice(scores, valid, 3, 4)

        functions = oracle_experts(moe.experts)
        update, _ = ref.mixture_of_experts(
            hidden, oracle_router(moe.router), functions, choose, valid=valid
        )
        return hidden, update

    assert_close((hidden, update), ref.over_groups(both, 1, *numbers(x, info)))


def test_delta_routes_a_module_with_a_skip_connection_of_its_own():
    """f(X) = M(X) - X: no residual is counted twice."""
    weight = hidden_states(13, DIM, DIM) / 4

    def module(x):
        return x + jnp.tanh(jnp.cumsum(x, axis=0) @ weight)

    layer = mode.MixtureOfDepths(mode.Delta(module), DIM, 0.5, key=jax.random.key(3))
    x = hidden_states(14, 3, TOKENS, DIM)
    hidden, _ = run(layer, x)

    def depths(x):
        def update(x, positions, segments):
            return np.tanh(np.cumsum(x, axis=0) @ f64(weight))

        return ref.mixture_of_depths(x, oracle_router(layer.router)[0], update, 0.5)[0]

    assert_close(hidden, ref.over_groups(depths, 1, f64(x)))


@pytest.mark.parametrize("function", [mode.GELU, mode.SwiGLU])
def test_position_wise_block(function):
    """A function of one token, on every token."""
    function = function(DIM, 24, key=jax.random.key(6))
    x = hidden_states(15, 2, TOKENS, DIM)
    hidden, routings = mode.Residual(mode.PositionWise(function))(x)
    assert routings == ()
    assert_close(hidden, f64(x) + oracle_function(function)(f64(x)))
