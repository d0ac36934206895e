"""Losses and metrics against the oracle, padding left out."""

import itertools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array

import mode
from tests import reference as ref
from tests.helpers import assert_close, f64, rng, run
from tests.routing.draws import draw_routing, predictor_logits, selector_inputs


TOKENS = 14
ROUTINGS = {
    "depths": draw_routing(0, 1),
    "experts": draw_routing(10, 3, noop=1, slots=5),
    "tokens": draw_routing(20, 3, noop=2, k=2, slots=3),
    "two group axes": draw_routing(30, 2, k=1, groups=(2, 3)),
}
each_routing = pytest.mark.parametrize("name", ROUTINGS)


def parts(routing: mode.Routing) -> tuple[ref.Floats, ref.Ints, ref.Bools, ref.Bools]:
    """What the oracle reads: logits, load, validity and the selected mask."""
    load, valid, index = (np.asarray(z) for z in (routing.load, routing.valid, routing.index))
    selected = ref.over_groups(
        lambda index: ref.selected_mask(index, TOKENS), index.ndim - 2, index
    )
    return f64(routing.logits), load, valid, selected


@each_routing
def test_losses(name: str) -> None:
    """z-loss, load balance and both cross entropies."""
    routing = ROUTINGS[name]
    logits, load, valid, selected = parts(routing)
    assert_close(run(mode.router_z_loss, routing), ref.router_z_loss(logits, valid))
    assert_close(run(mode.router_l1_loss, routing), ref.router_l1_loss(logits, valid))
    assert_close(run(mode.load_balance_loss, routing), ref.load_balance_loss(logits, load, valid))
    expected = ref.selection_bce(logits[..., : routing.num_experts], selected, valid)
    assert_close(run(mode.router_bce, routing), expected)
    expected = ref.selection_bce(f64(predictor_logits(routing)), selected, valid)
    assert_close(run(mode.predictor_bce, routing), expected)


def test_cross_entropies_of_large_logits() -> None:
    """Logits of 1,000 cost 1,000 where they are wrong and nothing where they are right."""
    routing = draw_routing(40, 1)
    right = jnp.where(routing.selected, 1000.0, -1000.0)
    for logits, expected in ((right, 0.0), (-right, 1000.0)):
        changed = eqx.tree_at(lambda r: (r.logits, r.predictor), routing, (logits, logits))
        assert_close(mode.router_bce(changed), expected)
        assert_close(mode.predictor_bce(changed), expected)
        gradient = eqx.filter_grad(mode.router_bce)(changed)
        assert jnp.isfinite(gradient.logits).all()


@each_routing
def test_metrics(name: str) -> None:
    """Coverage, compute, loads, rates and entropy over all groups together."""
    routing = ROUTINGS[name]
    logits, load, valid, selected = parts(routing)
    got = run(mode.routing_metrics, routing)
    experts = routing.num_experts
    requested, filled = load.sum(), (selected & valid[..., None]).sum()
    if logits.shape[-1] == 1:
        logits = np.concatenate([logits, np.zeros_like(logits)], axis=-1)
    assert_close(got.coverage, ref.coverage(selected, valid))
    assert_close(got.compute, filled / valid.sum())
    assert_close(got.load, load.reshape(-1, load.shape[-1]).sum(0) / requested)
    assert_close(got.drop_rate, (load[..., :experts].sum() - filled) / requested)
    assert_close(got.noop_rate, load[..., experts:].sum() / requested)
    assert_close(got.entropy, ref.router_entropy(logits, valid))
    exponentials = np.exp(parts(routing)[0])  # without the choice that stands for "not selected"
    noop = (exponentials[..., experts:].sum(-1) / exponentials.sum(-1))[valid].mean()
    assert_close(got.noop_probability, noop)
    assert (noop > 0) == (routing.logits.shape[-1] > experts)


def test_a_choice_that_is_masked_counts_nothing() -> None:
    """A scorer may give minus infinity to an expert; the entropy is that of the others."""
    routing = draw_routing(44, 2, noop=1)
    masked = eqx.tree_at(lambda r: r.logits, routing, routing.logits.at[..., 0].set(-jnp.inf))
    got = mode.routing_metrics(masked)
    valid = np.asarray(routing.valid)
    assert_close(got.entropy, ref.router_entropy(f64(routing.logits)[..., 1:], valid))
    assert jnp.isfinite(got.noop_probability)


@each_routing
def test_selection_accuracy(name: str) -> None:
    """Precision, recall and accuracy over real tokens, predictions on padding ignored."""
    routing = ROUTINGS[name]
    logits, _, valid, selected = parts(routing)
    predicted = logits[..., : routing.num_experts] > 0
    got = run(mode.selection_accuracy, routing, jnp.asarray(predicted))
    precision, recall = ref.precision_recall(predicted, selected, valid)
    assert_close((got.precision, got.recall), (precision, recall))
    assert_close(got.accuracy, (predicted == selected)[valid].mean())
    assert 0 < precision < 1


def test_selection_accuracy_of_trivial_rules() -> None:
    """A rule that selects nothing is right 6 times in 7, with no recall; the truth is perfect."""
    index = jnp.tile(jnp.arange(0, 16, 8, dtype=jnp.int32), (3, 1, 1))
    routing = eqx.tree_at(
        lambda r: (r.index, r.valid), draw_routing(50, 1), (index, jnp.ones((3, TOKENS), bool))
    )
    never = run(mode.selection_accuracy, routing, jnp.zeros((3, TOKENS, 1), bool))
    assert_close((never.precision, never.recall, never.accuracy), (0, 0, 12 / 14))
    truth = run(mode.selection_accuracy, routing, routing.selected)
    assert_close((truth.precision, truth.recall, truth.accuracy), (1, 1, 1))


@pytest.mark.parametrize("select", ["tokens", "experts"])
@pytest.mark.parametrize("choices", [1, 2, 3, 5, 8])
def test_load_balance_is_one_at_perfect_balance(select: str, choices: int) -> None:
    """For any number of choices, any k, and with padding, equal loads and probabilities give 1."""
    tokens = 2 * choices
    # Cyclic shifts of one row of logits: every choice is at every rank equally often.
    ranks = (np.arange(tokens)[:, None] + np.arange(choices)) % choices
    logits = np.concatenate([0.5 * ranks, rng(60).normal(size=(3, choices))])[None]
    valid = np.arange(tokens + 3)[None] < tokens
    for k in {1, (choices + 1) // 2, choices}:
        rule = mode.TokenChoice(k) if select == "tokens" else mode.ExpertChoice()
        inputs = selector_inputs(logits, valid, choices, 2 * k)
        assignment = rule(inputs)
        assert assignment.load.tolist() == [[2 * k] * choices]
        routing = mode.Routing(
            index=assignment.index,
            weight=jnp.zeros(assignment.index.shape),
            logits=inputs.logits,
            load=assignment.load,
            valid=inputs.valid,
            predictor=None,
        )
        assert_close(run(mode.load_balance_loss, routing), 1.0)


def test_load_balance_grows_with_imbalance() -> None:
    """All tokens requesting one of four choices with certainty costs four times as much."""
    logits = jnp.zeros((1, TOKENS, 4)).at[..., 1].set(40.0)
    routing = draw_routing(70, 4, k=1, groups=(1,))
    routing = eqx.tree_at(
        lambda r: (r.logits, r.load, r.valid),
        routing,
        (logits, jnp.asarray([[0, TOKENS, 0, 0]], jnp.int32), jnp.ones((1, TOKENS), bool)),
    )
    assert_close(run(mode.load_balance_loss, routing), 4.0)


def predicted_accuracy(routing: mode.Routing) -> mode.SelectionAccuracy:
    """The accuracy of the predictor's logits."""
    return mode.selection_accuracy(routing, predictor_logits(routing) > 0)


FUNCTIONS: list[Callable[[mode.Routing], Any]] = [
    mode.router_z_loss,
    mode.router_l1_loss,
    mode.load_balance_loss,
    mode.router_bce,
    mode.predictor_bce,
    mode.routing_metrics,
    predicted_accuracy,
]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_padding_counts_for_nothing(function: Callable[[mode.Routing], Any]) -> None:
    """Whatever stands in padded positions, the numbers and their gradients are the same."""
    routing = draw_routing(80, 3, noop=1, k=2)

    def fields(r: mode.Routing) -> tuple[Array, Array]:
        return (r.logits, predictor_logits(r))

    @jax.jit
    def outcome(logits: Array, predictor: Array) -> tuple[tuple[Array, Array], Any]:
        def value(logits: Array, predictor: Array) -> tuple[Array, Any]:
            out = function(eqx.tree_at(fields, routing, (logits, predictor)))
            return sum((jnp.sum(leaf) for leaf in jax.tree.leaves(out)), jnp.zeros(())), out

        return jax.grad(value, (0, 1), has_aux=True)(logits, predictor)

    noise = jnp.where(routing.valid[..., None], 0, 50.0)
    before = outcome(*fields(routing))
    after = outcome(*(leaf + noise for leaf in fields(routing)))
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        assert np.isfinite(old).all()
        np.testing.assert_array_equal(old, new)
    assert not any(np.asarray(leaf)[~np.asarray(routing.valid)].any() for leaf in before[0])


@pytest.mark.parametrize("function", FUNCTIONS)
def test_nothing_but_padding_is_zero(function: Callable[[mode.Routing], Any]) -> None:
    """Without a real token the result is 0, not NaN."""
    routing = draw_routing(90, 2, groups=(1,))
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(run(function, routing)))


@pytest.mark.parametrize("function", FUNCTIONS)
def test_losses_are_means(function: Callable[[mode.Routing], Any]) -> None:
    """Repeating the groups changes nothing, nor does an axis of stacked layers."""
    once = draw_routing(100, 3, noop=1, k=2, groups=(2, 2))
    expected = jax.tree.map(np.asarray, run(function, once))
    twice = jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf]), once)
    assert_close(run(function, twice), expected)
    layers = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf, leaf]), once)
    assert_close(run(function, layers), expected)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_results_have_the_dtype_of_the_logits(function: Callable[[mode.Routing], Any]) -> None:
    """float32 of a float32 router, float64 of a float64 router."""
    routing = draw_routing(110, 3)
    for leaf in jax.tree.leaves(function(routing)):
        assert leaf.dtype == jnp.float32
    with jax.enable_x64(True):
        wide = jax.tree.map(
            lambda leaf: leaf.astype(jnp.float64) if eqx.is_inexact_array(leaf) else leaf, routing
        )
        for leaf in jax.tree.leaves(function(wide)):
            assert leaf.dtype == jnp.float64


def test_the_losses_fall_where_they_should() -> None:
    """z-loss falls with smaller logits, the cross entropy with better ones."""
    routing = ROUTINGS["experts"]

    def scaled(factor: float) -> mode.Routing:
        return eqx.tree_at(lambda r: r.logits, routing, factor * routing.logits)

    sizes = [float(mode.router_z_loss(scaled(factor))) for factor in (4.0, 2.0, 1.0)]
    assert all(larger > smaller for larger, smaller in itertools.pairwise(sizes))
    right = jnp.where(routing.selected, 5.0, -5.0)
    right = jnp.concatenate([right, jnp.zeros((*right.shape[:-1], 1))], axis=-1)
    assert mode.router_bce(eqx.tree_at(lambda r: r.logits, routing, right)) < 0.01
    assert mode.router_bce(eqx.tree_at(lambda r: r.logits, routing, -right)) > 4
