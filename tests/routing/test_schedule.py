"""Capacities that change: of all routers, of each, and over a training."""

import re
from fractions import Fraction
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import pytest

import mode


def make_model(capacity: Any = 0.125, depth: int = 4) -> mode.Transformer:
    return mode.mod_transformer(
        16, 8, depth=depth, num_heads=2, capacity=capacity, key=jax.random.key(0)
    )


def staged_model() -> mode.Transformer:
    """Routers of depths at 1/4 and of two experts at 1/2, in one layer."""

    def make(key: jax.Array) -> mode.MixtureOfDepths:
        expert = lambda key: mode.GELUFeedForward(8, 8, key=key)  # noqa: E731
        return mode.staged_mode_layer(expert, 8, 2, 2, capacity=0.25, key=key)

    return mode.Transformer(16, 8, [make], 2, key=jax.random.key(0))


def capacities(model: Any) -> list[Fraction]:
    return [router.capacity for router in mode.routers(model)]


def test_equal_ratios_from_the_start_to_the_own_capacity() -> None:
    """1, 1/2, 1/4 and 1/8 in stages of a tenth; the last holds to the end."""
    schedule = mode.capacity_schedule(make_model(), steps=1000)
    assert schedule == {0: (1,), 100: (Fraction(1, 2),), 200: (Fraction(1, 4),), 300: (0.125,)}


def test_each_layer_falls_to_its_own_capacity() -> None:
    """Those that have more than the start keep what they have."""
    model = make_model([0.04, 0.5, 0.8], depth=6)
    schedule = mode.capacity_schedule(model, 100, start=0.64, until=0.5, stages=2)
    first, middle, last = schedule.values()
    assert list(schedule) == [0, 25, 50]
    assert list(map(float, first)) == [0.64, 0.64, 0.8]
    assert list(map(float, middle)) == pytest.approx([0.16, (0.64 * 0.5) ** 0.5, 0.8], rel=1e-5)
    assert list(last) == capacities(model)


def test_experts_keep_their_capacity() -> None:
    """A schedule is of depths; a staged MoDE has both kinds of routers."""
    model = staged_model()
    assert capacities(model) == [Fraction(1, 4), Fraction(1, 2)]
    for depth, experts in mode.capacity_schedule(model, 100).values():
        assert depth >= Fraction(1, 4)
        assert experts == Fraction(1, 2)


def test_a_training_in_stages() -> None:
    """The loop of a user: slots of every stage, thresholds, and the structure at the end."""
    model = make_model(0.25)
    structure = jax.tree.structure(model)
    optimizer = optax.adam(1e-3)
    moments = optimizer.init(eqx.filter(model, mode.is_trainable(model)))
    tokens = jax.random.randint(jax.random.key(1), (2, 16), 0, 16)
    schedule = mode.capacity_schedule(model, steps=6, until=0.5, stages=1)
    assert list(schedule) == [0, 3]
    slots, updates, traces = [], [], []

    @eqx.filter_jit
    def train_step(model: Any, moments: Any) -> tuple[Any, Any, Any]:
        traces.append(None)
        parameters, rest = eqx.partition(model, mode.is_trainable(model))

        def loss(parameters: Any) -> Any:
            logits, routings = eqx.combine(parameters, rest)(tokens)
            return logits.var(), routings

        gradient, routings = jax.grad(loss, has_aux=True)(parameters)
        with jax.numpy_dtype_promotion("standard"):
            change, moments = optimizer.update(gradient, moments)
        model = eqx.combine(eqx.apply_updates(parameters, change), rest)
        return mode.update_router_state(model, routings), moments, routings

    for step in range(6):
        if step in schedule:
            model, moments = mode.with_capacity((model, moments), schedule[step])
        model, moments, (routing,) = train_step(model, moments)
        slots.append(routing.index.shape[-1])
        updates.append(int(mode.routers(model)[0].state.updates[0]))
    assert slots == [16, 16, 16, 4, 4, 4]
    assert updates == [1, 2, 3, 1, 2, 3]
    assert len(traces) == 2
    assert jax.tree.structure(model) == structure


def test_capacities_of_each_router() -> None:
    """In the order of `routers`; one that does not change keeps its thresholds."""
    model = staged_model()
    seen = mode.map_routers(
        lambda r: eqx.tree_at(lambda r: r.state.updates, r, r.state.updates + 5), model
    )
    changed = mode.with_capacity(seen, [0.5, 0.5])
    assert capacities(changed) == [Fraction(1, 2), Fraction(1, 2)]
    assert [int(r.state.updates[0]) for r in mode.routers(changed)] == [0, 5]
    assert capacities(seen) == [Fraction(1, 4), Fraction(1, 2)]  # a copy was changed
    assert capacities(mode.with_capacity(model, 0.75)) == [Fraction(3, 4)] * 2


def test_a_model_without_routers() -> None:
    """Has nothing to schedule."""
    dense = mode.Transformer(
        16,
        8,
        [lambda key: mode.Residual(mode.TransformerBlock(8, 2, key=key))],
        key=jax.random.key(0),
    )
    schedule = mode.capacity_schedule(dense, 10)
    assert set(schedule.values()) == {()}
    assert jax.tree.structure(mode.with_capacity(dense, ())) == jax.tree.structure(dense)


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({"steps": 0}, "`steps` must be at least 1, got 0"),
        ({"stages": 0}, "`stages` must be at least 1, got 0"),
        ({"stages": 17}, "`stages` must be at most 16, got 17"),
        ({"stages": 100}, "`stages` must be at most 16, got 100"),
        ({"until": 1.0}, "`until` must be a fraction of the training, above 0 and below 1, got 1"),
        ({"until": 1.5}, "below 1, got 1.5"),
        ({"until": 0.0}, "above 0"),
        ({"until": float("nan")}, "got nan"),
        ({"until": -0.1}, "got -0.1"),
        ({"until": 0.02}, "at least one step, got 0.02 of 100 steps for 3 stages"),
        ({"start": 0.0}, "`capacity` must be above 0"),
        ({"start": 1.5}, "at most 1"),
    ],
)
def test_schedules_out_of_range(options: dict[str, Any], rule: str) -> None:
    """A ramp longer than the training, one that compiles every step, and numbers that are none."""
    with pytest.raises(ValueError, match=re.escape(rule)):
        mode.capacity_schedule(make_model(), **{"steps": 100, **options})


@pytest.mark.parametrize("capacity", [[0.5, 0.5, 0.5], [], [0.5, float("inf")], [0.5, 0]])
def test_capacities_that_do_not_fit(capacity: Any) -> None:
    """One for each router, finite and positive."""
    with pytest.raises(ValueError, match=r"^`capacity` must be"):
        mode.with_capacity(staged_model(), capacity)


def test_a_schedule_changes_shapes_and_never_numbers_of_the_other_layers() -> None:
    """Parameters are the very arrays of the model."""
    model = make_model()
    changed = mode.with_capacity(model, mode.capacity_schedule(model, 100)[0])
    old, new = (eqx.filter(m, mode.is_trainable(m)) for m in (model, changed))
    assert all(a is b for a, b in zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True))
    _, (routing,) = changed(jnp.zeros((1, 32), int))
    assert routing.index.shape[-1] == 32
