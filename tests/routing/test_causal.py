"""`make_causal`: which selectors it replaces and by what, and that nothing sees the future."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mode
from tests.helpers import hidden_states
from tests.routing.draws import DIM, GATES, make_router


def causal_select(
    select: mode.AbstractSelector, *, with_predictor: bool = False, **options: Any
) -> mode.AbstractSelector:
    """The selector of a router after `make_causal`."""
    router = make_router(1, select=select)
    if not with_predictor:
        router = eqx.tree_at(lambda r: r.predictor, router, None)
    causal = mode.make_causal(router, **options)
    kept = [(r.scorer, r.predictor, r.state) for r in (causal, router)]
    for new, old in zip(*map(jax.tree.leaves, kept), strict=True):
        assert new is old
    return causal.select


def test_the_default_threshold() -> None:
    """The predictor decides for a router that has one, the quantile for any other."""
    assert causal_select(mode.ExpertChoice()) == mode.QuantileThreshold()
    assert causal_select(mode.ExpertChoice(), with_predictor=True) == mode.PredictorThreshold()
    narrow = causal_select(mode.ExpertChoice(), max_capacity=0.5)
    assert narrow == mode.QuantileThreshold(0.5)
    own = causal_select(mode.ExpertChoice(), with_predictor=True, max_capacity=None)
    assert own == mode.PredictorThreshold(None)


def test_a_given_threshold_counts_as_it_is() -> None:
    """Its own max_capacity too."""
    select = causal_select(mode.ExpertChoice(), threshold=mode.LogitThreshold(0.25))
    assert select == mode.LogitThreshold(0.25)


def test_thresholds_are_replaced_and_other_causal_selectors_kept() -> None:
    """So `make_causal` of a causal model changes its threshold."""
    record = make_router(2)(hidden_states(0, 6, DIM), mode.TokenInfo.plain((6,)))
    for select in (mode.Strided(), mode.RandomChoice(), mode.TokenChoice(2), mode.Replay(record)):
        assert eqx.tree_equal(causal_select(select), select)
        changed = causal_select(select, threshold=mode.LogitThreshold())
        assert eqx.tree_equal(changed, select)
    for select in (mode.LogitThreshold(), mode.PredictorThreshold(0.5)):
        assert causal_select(select) == mode.QuantileThreshold()


def test_causal_selection_of_a_kept_selector_is_the_recorded_one() -> None:
    """Without another draw, and whatever the logits are: also of `RandomChoice` and `Replay`."""
    x, info = hidden_states(9, 2, 12, DIM), mode.TokenInfo.plain((2, 12))
    random = make_router(3, select=mode.RandomChoice())
    routing = random(x, info, key=jax.random.key(0))
    replaying = make_router(4, select=mode.Replay(routing))
    for router in (random, replaying):
        for threshold in (None, mode.LogitThreshold()):
            (mask,) = mode.causal_selection(router, (routing,), threshold=threshold)
            np.testing.assert_array_equal(mask, routing.selected)


def test_selectors_say_whether_they_are_causal_and_how_many_slots_they_need() -> None:
    """`is_causal` and `max_capacity` of every selector."""
    routing = make_router(0)(jnp.ones((6, DIM)), mode.TokenInfo.plain((6,)))
    expected = [
        (mode.ExpertChoice(), False, None),
        (mode.RandomChoice(), True, None),
        (mode.Strided(), True, None),
        (mode.Replay(routing), True, None),
        (mode.TokenChoice(2), True, None),
        (mode.QuantileThreshold(), True, 1.0),
        (mode.PredictorThreshold(0.5), True, 0.5),
        (mode.LogitThreshold(max_capacity=None), True, None),
    ]
    for select, is_causal, max_capacity in expected:
        assert (select.is_causal, select.max_capacity) == (is_causal, max_capacity)


def test_a_selector_without_its_attributes_cannot_be_made() -> None:
    """The abstract class names what is missing."""

    class Unfinished(mode.AbstractTokenSelector):
        def requested_mask(self, inputs: mode.RoutingInputs) -> jax.Array:
            return inputs.scores > 0

    with pytest.raises(TypeError, match="max_capacity"):
        Unfinished()  # pyright: ignore[reportAbstractUsage]


class Latest(mode.AbstractSelector):
    """A user's own rule, which is not causal: the last tokens."""

    is_causal = False
    max_capacity = None

    def __call__(
        self, inputs: mode.RoutingInputs, *, key: jax.Array | None = None
    ) -> mode.Assignment:
        row = jnp.arange(inputs.num_tokens - inputs.slots, inputs.num_tokens, dtype=jnp.int32)
        shape = (*inputs.valid.shape[:-1], inputs.num_experts)
        load = jnp.full(shape, inputs.slots, jnp.int32)
        return mode.Assignment(
            jnp.broadcast_to(row, (*shape, inputs.slots)), inputs.pad_noop_load(load)
        )


class Even(mode.AbstractTokenSelector):
    """A user's own rule, which is causal: tokens whose first logit rounds to an even number."""

    max_capacity = 0.5

    def requested_mask(self, inputs: mode.RoutingInputs) -> jax.Array:
        return jnp.round(inputs.logits[..., : inputs.num_experts]) % 2 == 0


def test_selectors_of_a_users_own() -> None:
    """Replaced or kept by what they say; their max_capacity sets the slots."""
    assert causal_select(Latest()) == mode.QuantileThreshold()
    assert isinstance(causal_select(Even()), Even)
    info = mode.TokenInfo.plain((8,))
    x = hidden_states(3, 8, DIM)
    latest = make_router(4, select=Latest(), capacity=0.25)(x, info)
    assert latest.index.tolist() == [[6, 7]] * 3
    router = make_router(4, select=Even(), capacity=0.25)
    even = router(x, info)
    assert even.index.shape == (3, 4)
    (mask,) = mode.causal_selection(router, (even,))
    np.testing.assert_array_equal(mask, even.selected)
    used = jnp.full(3, 3, jnp.int32)
    assert (router(x, info, slots=4, used=used).num_filled <= 3).all()


@pytest.mark.optimized
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize(
    "select",
    [
        mode.TokenChoice(2),
        mode.QuantileThreshold(),
        mode.QuantileThreshold(0.25),
        mode.PredictorThreshold(),
        mode.LogitThreshold(),
    ],
    ids=str,
)
def test_later_tokens_change_nothing(select: mode.AbstractSelector, gate: str) -> None:
    """Index, weight and logits of earlier tokens are the same bits, whatever follows them."""
    router = make_router(5, num_noop=1, select=select, gate=GATES[gate][0])
    x, info = hidden_states(6, 2, 12, DIM), mode.TokenInfo.plain((2, 12))
    before = router(x, info)
    for cut in (1, 6, 11):
        after = router(x.at[:, cut:].multiply(-3.0), info)
        np.testing.assert_array_equal(after.selected[:, :cut], before.selected[:, :cut])
        np.testing.assert_array_equal(after.logits[:, :cut], before.logits[:, :cut])
        early = np.asarray(before.index) < cut
        np.testing.assert_array_equal(
            np.asarray(after.weight)[early], np.asarray(before.weight)[early]
        )


def test_expert_choice_sees_the_future() -> None:
    """The other side: a better token later takes the slot of an earlier one."""
    router = make_router(7, num_experts=1, capacity=1 / 12)
    x, info = hidden_states(8, 1, 12, DIM), mode.TokenInfo.plain((1, 12))
    first = int(router(x, info).index[0, 0, 0])
    better = x.at[0, 11].set(10 * x[0, first] * jnp.sign(router(x, info).logits[0, first, 0]))
    assert int(router(better, info).index[0, 0, 0]) != first or first == 11
