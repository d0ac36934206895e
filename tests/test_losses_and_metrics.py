"""Losses and metrics against the oracle, padding left out."""

import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mode
from tests import reference as ref
from tests.helpers import assert_close, f64, rng, run


TOKENS = 14


def draw_routing(seed, experts, noop=0, k=None, slots=4, groups=(3,), predictor=False):
    """A routing of random logits with padding, one group of which is padding only."""
    shape = (*groups, TOKENS, experts + noop)
    logits = jnp.asarray(2 * rng(seed).normal(size=shape), jnp.float32)
    valid = rng(seed + 1).random(shape[:-1]) < 0.7
    valid[(-1,) * len(groups)] = False
    guess = jnp.asarray(rng(seed + 2).normal(size=(*shape[:-1], experts)), jnp.float32)
    select = mode.ExpertChoice() if k is None else mode.TokenChoice(k)
    chosen = run(
        select,
        mode.Request(
            scores=logits,
            logits=logits,
            predictor=None,
            threshold=jnp.zeros(experts),
            valid=jnp.asarray(valid),
            slots=slots,
        ),
    )
    return mode.Routing(
        index=chosen.index,
        weight=jnp.zeros(chosen.index.shape),
        logits=logits,
        detached_logits=logits,
        load=chosen.load,
        valid=jnp.asarray(valid),
        predictor=guess if predictor else None,
    )


ROUTINGS = {
    "depths": draw_routing(0, 1),
    "experts": draw_routing(10, 3, noop=1, slots=5),
    "tokens": draw_routing(20, 3, noop=2, k=2, slots=3),
    "two group axes": draw_routing(30, 2, k=1, groups=(2, 3)),
}
each_routing = pytest.mark.parametrize("routing", ROUTINGS.values(), ids=ROUTINGS)


def parts(routing):
    """What the oracle reads: logits, load, validity and who was selected."""
    logits, load, valid = (np.asarray(z) for z in (routing.logits, routing.load, routing.valid))
    selected = ref.over_groups(
        lambda index: ref.selected_mask(index, TOKENS), valid.ndim - 1, np.asarray(routing.index)
    )
    return f64(logits), load, valid, selected


@each_routing
def test_losses(routing):
    """z-loss, load balance and membership cross entropy."""
    logits, load, valid, selected = parts(routing)
    experts = routing.num_experts
    assert_close(run(mode.router_z_loss, routing), ref.router_z_loss(logits, valid))
    assert_close(run(mode.load_balance_loss, routing), ref.load_balance_loss(logits, load, valid))
    expected = ref.membership_bce(logits[..., :experts], selected, valid)
    assert_close(run(mode.router_bce, routing), expected)


def test_predictor_loss():
    """The same cross entropy, of the predictor's logits."""
    routing = draw_routing(40, 2, predictor=True)
    _, _, valid, selected = parts(routing)
    expected = ref.membership_bce(f64(routing.predictor), selected, valid)
    assert_close(run(mode.predictor_bce, routing), expected)


@each_routing
def test_metrics(routing):
    """Coverage, compute, loads, rates and entropy over all groups together."""
    logits, load, valid, selected = parts(routing)
    got = run(mode.routing_metrics, routing)
    experts = routing.num_experts
    asked, filled = load.sum(), (selected & valid[..., None]).sum()
    if logits.shape[-1] == 1:
        logits = np.concatenate([logits, np.zeros_like(logits)], axis=-1)
    assert_close(got.coverage, ref.coverage(selected, valid))
    assert_close(got.compute, filled / valid.sum())
    assert_close(got.load, load.reshape(-1, load.shape[-1]).sum(0) / asked)
    assert_close(got.drop_rate, (load[..., :experts].sum() - filled) / asked)
    assert_close(got.noop_rate, load[..., experts:].sum() / asked)
    assert_close(got.entropy, ref.router_entropy(logits, valid))


@each_routing
def test_agreement(routing):
    """Precision, recall and accuracy over real tokens, predictions on padding ignored."""
    logits, _, valid, selected = parts(routing)
    predicted = logits[..., : routing.num_experts] > 0
    got = run(mode.agreement, routing, jnp.asarray(predicted))
    precision, recall = ref.precision_recall(predicted, selected, valid)
    assert_close((got.precision, got.recall), (precision, recall))
    assert_close(got.accuracy, (predicted == selected)[valid].mean())
    assert 0 < precision < 1


def test_agreement_of_trivial_rules():
    """Never taking a token is right 7 times in 8 and finds none; the truth itself is perfect."""
    routing = draw_routing(50, 1, slots=2)
    all_real = eqx.tree_at(lambda r: r.valid, routing, jnp.ones((3, TOKENS), bool))
    index = jnp.tile(jnp.arange(0, 16, 8, dtype=jnp.int32), (3, 1, 1))
    routing = eqx.tree_at(lambda r: r.index, all_real, index)
    never = run(mode.agreement, routing, jnp.zeros((3, TOKENS, 1), bool))
    assert_close((never.precision, never.recall, never.accuracy), (0, 0, 12 / 14))
    truth = run(mode.agreement, routing, routing.selected)
    assert_close((truth.precision, truth.recall, truth.accuracy), (1, 1, 1))


@pytest.mark.parametrize("select", ["tokens", "experts"])
@pytest.mark.parametrize("choices", [1, 2, 3, 5, 8])
def test_load_balance_is_one_at_perfect_balance(select, choices):
    """For any number of choices, any k, and with padding, equal loads and probabilities give 1."""
    tokens = 2 * choices
    # Cyclic shifts of one row of logits: every choice is at every rank equally often.
    ranks = (np.arange(tokens)[:, None] + np.arange(choices)) % choices
    logits = np.concatenate([0.5 * ranks, rng(60).normal(size=(3, choices))])[None]
    valid = np.arange(tokens + 3)[None] < tokens
    for k in range(1, choices + 1):
        rule = mode.TokenChoice(k) if select == "tokens" else mode.ExpertChoice()
        request = mode.Request(
            scores=jnp.asarray(logits, jnp.float32),
            logits=jnp.asarray(logits, jnp.float32),
            predictor=None,
            threshold=jnp.zeros(choices),
            valid=jnp.asarray(valid),
            slots=2 * k,
        )
        chosen = run(rule, request)
        assert chosen.load.tolist() == [[2 * k] * choices]
        routing = mode.Routing(
            chosen.index,
            jnp.zeros(chosen.index.shape),
            request.logits,
            request.logits,
            chosen.load,
            request.valid,
            None,
        )
        assert_close(run(mode.load_balance_loss, routing), 1.0)


def test_load_balance_grows_with_imbalance():
    """All tokens asking for one of four choices with certainty costs four times as much."""
    logits = jnp.zeros((1, TOKENS, 4)).at[..., 1].set(40.0)
    routing = draw_routing(70, 4, k=1, groups=(1,))
    routing = eqx.tree_at(
        lambda r: (r.logits, r.load, r.valid),
        routing,
        (logits, jnp.asarray([[0, TOKENS, 0, 0]], jnp.int32), jnp.ones((1, TOKENS), bool)),
    )
    assert_close(run(mode.load_balance_loss, routing), 4.0)


FUNCTIONS = [
    mode.router_z_loss,
    mode.load_balance_loss,
    mode.router_bce,
    mode.predictor_bce,
    mode.routing_metrics,
    lambda routing: mode.agreement(routing, routing.predictor > 0),
]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_padding_counts_for_nothing(function):
    """Whatever stands in padded positions, the numbers and their gradients are the same."""
    routing = draw_routing(80, 3, noop=1, k=2, predictor=True)

    def fields(r):
        return (r.logits, r.predictor)

    @jax.jit
    def outcome(logits, predictor):
        def value(logits, predictor):
            out = function(eqx.tree_at(fields, routing, (logits, predictor)))
            return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(out)), out

        return jax.grad(value, (0, 1), has_aux=True)(logits, predictor)

    noise = jnp.where(routing.valid[..., None], 0, 50.0)
    before = outcome(routing.logits, routing.predictor)
    after = outcome(routing.logits + noise, routing.predictor + noise)
    for one, other in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        assert np.isfinite(one).all()
        np.testing.assert_array_equal(one, other)
    assert not any(np.asarray(leaf)[~np.asarray(routing.valid)].any() for leaf in before[0])


@pytest.mark.parametrize("function", FUNCTIONS)
def test_nothing_but_padding_is_zero(function):
    """No real token anywhere gives 0, not NaN."""
    routing = draw_routing(90, 2, groups=(1,), predictor=True)
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(run(function, routing)))


def test_losses_are_means():
    """Repeating the groups changes nothing."""
    once = draw_routing(100, 3, noop=1, k=2, groups=(2, 2), predictor=True)
    twice = jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf]), once)
    for function in FUNCTIONS:
        assert_close(run(function, twice), jax.tree.map(np.asarray, run(function, once)))


def make_layer(**options):
    """A small MoD layer over hidden states."""
    keys = jax.random.split(jax.random.key(0), 3)
    block = mode.PositionWise(mode.GELU(8, 8, key=keys[0]))
    predictor = mode.Predictor(8, key=keys[1])
    return mode.MixtureOfDepths(block, 8, 0.25, predictor=predictor, key=keys[2], **options)


@pytest.mark.parametrize("loss", ["trunk", "stopped", "predictor"])
def test_where_the_gradient_of_a_membership_loss_ends(loss):
    """The router's loss moves router and trunk, or the router alone; the predictor's, itself."""
    function = {
        "trunk": mode.router_bce,
        "stopped": lambda routing: mode.router_bce(routing, stop_trunk=True),
        "predictor": mode.predictor_bce,
    }[loss]

    @jax.jit
    def gradient(x):
        layer = make_layer()
        both = (layer, x)
        return eqx.filter_grad(lambda both: function(both[0](both[1])[1][0]))(both)

    layer, x = gradient(jnp.asarray(rng(110).normal(size=(2, 16, 8)), jnp.float32))
    moved = {
        "scorer": np.asarray(layer.router.scorer.weight).any(),
        "predictor": any(np.asarray(p).any() for p in jax.tree.leaves(layer.router.predictor)),
        "block": any(np.asarray(p).any() for p in jax.tree.leaves(layer.block)),
        "trunk": np.asarray(x).any(),
    }
    expected = {"trunk": ["scorer", "trunk"], "stopped": ["scorer"], "predictor": ["predictor"]}
    assert [name for name, does in moved.items() if does] == expected[loss]


def test_a_watching_predictor_changes_no_bit():
    """Hidden states and gradients of everything else are those of the model without it."""
    watched = make_layer()
    alone = eqx.tree_at(lambda m: m.router.predictor, watched, None)
    x = jnp.asarray(rng(120).normal(size=(2, 16, 8)), jnp.float32)

    @eqx.filter_jit
    def outcome(layer):
        def loss(layer):
            hidden, (routing,) = layer(x)
            extra = 0.0 if routing.predictor is None else mode.predictor_bce(routing)
            return jnp.sum(jnp.sin(hidden)) + extra, hidden

        gradient, hidden = eqx.filter_grad(loss, has_aux=True)(layer)
        return gradient.block, gradient.router.scorer, hidden

    pairs = zip(*(jax.tree.leaves(outcome(layer)) for layer in (watched, alone)), strict=True)
    assert all(np.asarray(one).tobytes() == np.asarray(other).tobytes() for one, other in pairs)


def test_the_losses_are_one_sided_where_they_should_be():
    """z-loss falls with smaller logits, the cross entropy with better ones."""
    routing = ROUTINGS["experts"]

    def scaled(factor):
        return eqx.tree_at(lambda r: r.logits, routing, factor * routing.logits)

    sizes = [float(mode.router_z_loss(scaled(factor))) for factor in (4.0, 2.0, 1.0)]
    assert all(one > other for one, other in itertools.pairwise(sizes))
    right = jnp.where(routing.selected, 5.0, -5.0)
    right = jnp.concatenate([right, jnp.zeros((*right.shape[:-1], 1))], axis=-1)
    assert mode.router_bce(eqx.tree_at(lambda r: r.logits, routing, right)) < 0.01
    assert mode.router_bce(eqx.tree_at(lambda r: r.logits, routing, -right)) > 4
