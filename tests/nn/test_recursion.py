"""`Recursion`, `TokenChoiceRecursion` and `Loop` against the oracle."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mode
from tests import reference as ref
from tests.helpers import assert_close, hidden_states, oracle_block, oracle_router, run
from tests.nn import oracles
from tests.nn.cases import DIM, INFOS, TOKENS, make_block, make_experts, numbers
from tests.routing.draws import assert_assigned


infos = pytest.mark.parametrize("info", INFOS.values(), ids=INFOS)
kinds_of_keys = pytest.mark.parametrize("share_keys", [False, True], ids=["own keys", "shared"])


def make_recursion(
    capacities: Any = (0.75, 0.5, 0.25), seed: int = 3, **options: Any
) -> mode.Recursion:
    block = options.pop("block", make_block())
    return mode.Recursion(block, DIM, capacities, key=jax.random.key(seed), **options)


def assert_is_oracle(layer: mode.Recursion, x: Any, info: mode.TokenInfo | None) -> None:
    """Hidden states and the tokens of every round."""
    hidden, routings = run(layer, x, info)
    slots = [routing.index.shape[-1] for routing in routings]
    oracle = oracles.of_recursion(layer, slots)
    expected, assignments = ref.over_groups(oracle, 1, *numbers(x, info))
    for routing, assignment in zip(routings, assignments, strict=True):
        assert_assigned(routing, assignment)
    assert_close(hidden, expected, scale=3)


@infos
@kinds_of_keys
def test_each_round_selects_among_the_tokens_of_the_last(
    share_keys: bool, info: mode.TokenInfo | None
) -> None:
    layer = make_recursion(share_keys=share_keys)
    assert layer.capacities == [0.75, 0.5, 0.25]
    assert_is_oracle(layer, hidden_states(1, 3, TOKENS, DIM), info)


@pytest.mark.optimized
def test_tokens_that_left_stay_as_they_are() -> None:
    """A token that no round selects keeps its bits, and counts as padding in later rounds."""
    x = hidden_states(2, 3, TOKENS, DIM)
    hidden, routings = run(make_recursion((0.5, 0.25)), x)
    left = ~np.asarray(routings[0].selected[..., 0])
    assert np.array_equal(np.asarray(hidden)[left], np.asarray(x)[left])
    assert np.array_equal(routings[1].valid, ~left)


@pytest.mark.parametrize(
    ("capacities", "slots"),
    [
        ((1, 2 / 3, 1 / 3), [12, 8, 4]),
        ((1.0,), [12]),
        ((0.1, 0.1), [1, 1]),
        ((0.5, 0.01, 0.01), [6, 1, 1]),
    ],
)
def test_slots_of_the_rounds(capacities: Any, slots: list[int]) -> None:
    _, routings = run(make_recursion(capacities), hidden_states(3, 2, TOKENS, DIM))
    assert [routing.index.shape[-1] for routing in routings] == slots


@infos
@kinds_of_keys
def test_a_token_runs_as_many_rounds_as_it_chooses(
    share_keys: bool, info: mode.TokenInfo | None
) -> None:
    """The record's experts are the depths; who finds no slot takes part in no round."""
    layer = mode.TokenChoiceRecursion(
        make_block(), DIM, 3, capacity_factor=1.5, share_keys=share_keys, key=jax.random.key(5)
    )
    x = hidden_states(4, 3, TOKENS, DIM)
    hidden, (routing,) = run(layer, x, info)
    oracle = oracles.of_token_choice_recursion(layer, slots=6)
    expected, (assignment,) = ref.over_groups(oracle, 1, *numbers(x, info))
    assert_assigned(routing, assignment)
    assert_close(hidden, expected, scale=3)


def test_a_loop_is_the_dense_layer_several_times() -> None:
    layer = mode.Loop(make_block(), 3)
    dense = mode.Residual(layer.block)
    x = hidden_states(5, 3, TOKENS, DIM)
    expected = x
    for _ in range(3):
        expected, _ = run(dense, expected)
    assert_close(run(layer, x)[0], expected)


def test_early_exit_by_confidence() -> None:
    """A scorer of one's own, and a rule for each token by itself: it goes on while its largest
    feature is below 1.5."""

    def doubt(x: Any) -> Any:
        return 1.5 - jnp.max(jnp.abs(x), axis=-1, keepdims=True)

    layer = make_recursion((1, 1, 1), select=mode.LogitThreshold())
    layer = mode.map_routers(lambda router: replaced(router, "scorer", doubt), layer)
    x = hidden_states(6, 3, TOKENS, DIM)
    _, routings = run(layer, x)
    unsure = np.abs(np.asarray(x)).max(-1) < 1.5
    assert np.array_equal(routings[0].selected[..., 0], unsure)
    assert not np.asarray(routings[1].selected & ~routings[0].selected).any()


@infos
def test_early_exit_by_the_size_of_the_update(info: mode.TokenInfo | None) -> None:
    """A token runs another round while the round before changed it by a tenth or more."""
    least = 0.1
    layer = make_recursion((1, 1, 1), select=mode.UpdateThreshold(least))
    x = hidden_states(7, 3, TOKENS, DIM) * np.geomspace(0.1, 30, 3 * TOKENS).reshape(3, TOKENS, 1)
    x = x.astype(jnp.float32)
    hidden, routings = run(layer, x, info)
    assert isinstance(layer.block, mode.TransformerBlock)
    block = oracle_block(layer.block)

    def recursion(x: Any, valid: Any, positions: Any, segments: Any) -> Any:
        inside, rounds = valid, []
        for router in layer.routers:
            rounds.append(inside)
            index = np.flatnonzero(inside)
            weight = ref.combine_weights(
                ref.router_logits(x, oracle_router(router)), index[None], "sigmoid", 1.0
            )[0]
            after = x.copy()
            if index.size:
                update = block(x[index], positions[index], segments[index], weight)
                after[index] += weight[:, None] * update
            change = np.linalg.norm(after - x, axis=-1) / np.linalg.norm(x, axis=-1)
            inside, x = inside & (change >= least), after
        return x, np.stack(rounds, axis=-1)

    expected, rounds = ref.over_groups(recursion, 1, *numbers(x, info))
    selected = np.stack([routing.selected[..., 0] for routing in routings], axis=-1)
    assert np.array_equal(selected, rounds)
    assert 0 < selected[..., 2].sum() < selected[..., 1].sum() < selected[..., 0].sum()
    assert_close(hidden, expected, scale=30)


def test_the_size_of_an_update_needs_rounds() -> None:
    layer = mode.MixtureOfDepths(
        make_block(), DIM, select=mode.UpdateThreshold(0.1), key=jax.random.key(0)
    )
    with pytest.raises(ValueError, match="needs the rounds of a `Recursion`"):
        layer(hidden_states(0, TOKENS, DIM))


@pytest.mark.parametrize("least", [0.0, -1.0, float("nan"), float("inf"), "0.1", None])
@pytest.mark.usefixtures("without_type_checks")
def test_bad_sizes_of_an_update(least: Any) -> None:
    with pytest.raises(ValueError, match="`least` of `UpdateThreshold` must be a number above 0"):
        mode.UpdateThreshold(least)


def replaced(router: mode.Router, name: str, value: Any) -> mode.Router:
    return eqx.tree_at(
        lambda r: getattr(r, name), router, value, is_leaf=lambda n: n is getattr(router, name)
    )


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize(
    ("make", "rule"),
    [
        (lambda: make_recursion((0.5, 0.75)), "none larger than the one before"),
        (lambda: make_recursion((1.5,)), "none larger"),
        (lambda: make_recursion((0.5, 0.0)), "above 0"),
        (lambda: make_recursion(()), "one fraction for each round"),
        (lambda: make_recursion(0.5), "one fraction for each round"),
        (lambda: make_recursion((0.5, float("nan"))), "`capacities` must"),
        (lambda: make_recursion(block=make_block(make_experts())), "no router of its own"),
        (lambda: mode.Loop(make_block(make_experts()), 2), "no router of its own"),
        (lambda: mode.Loop(make_block(), 0), "`repeats` must be at least 1"),
        (lambda: mode.TokenChoiceRecursion(make_block(), DIM, 0, key=jax.random.key(0)), "repeats"),
        (
            lambda: make_recursion(block=mode.PositionWise(jnp.tanh), share_keys=True),
            "keys of its own",
        ),
        (lambda: make_recursion(gate=mode.SoftmaxGate()), "must not be a softmax"),
        (lambda: make_recursion(select=mode.TokenChoice(1)), "must not be `TokenChoice`"),
    ],
)
def test_bad_arguments(make: Any, rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        make()


def test_what_changes_the_width_is_refused() -> None:
    layer = make_recursion(block=mode.PositionWise(lambda x: x[:3]))
    with pytest.raises(ValueError, match=r"shape"):
        layer(hidden_states(0, TOKENS, DIM))


def test_a_depth_is_chosen_by_the_token() -> None:
    layer = mode.TokenChoiceRecursion(make_block(), DIM, 2, key=jax.random.key(0))
    other = mode.map_routers(lambda r: replaced(r, "select", mode.LogitThreshold()), layer)
    with pytest.raises(ValueError, match=r"must be `TokenChoice\(1\)`"):
        other(hidden_states(0, TOKENS, DIM))
    assert isinstance(mode.routers(mode.make_causal(layer))[0].select, mode.TokenChoice)
