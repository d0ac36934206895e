"""A training that begins with more slots: its stages, and its cost."""

import dataclasses
from fractions import Fraction
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import mode
from mode.lab import arms, budget
from mode.lab.options import Recipe, Size, check_options
from mode.lab.step import routing_cost, stages
from tests.lab.helpers import repeating_texts
from tests.lab.runs import trained


SIZE = Size(dim=8, depth=2, heads=1, length=32, batch=2, experts=2, noop=1, capacity=0.25)
RAMP = Recipe(ramp=0.5, ramp_stages=2)


def test_stages_of_a_recipe() -> None:
    """None without a ramp or routers; fewer where the training is short."""
    model = arms.arm_named("mod").shapes(SIZE)
    own = (Fraction(1, 4),)
    assert stages(Recipe(), model, 100) == {0: own}
    assert list(stages(RAMP, model, 100)) == [0, 25, 50]
    assert stages(RAMP, model, 100)[0] == (1,)
    assert list(stages(RAMP, model, 2)) == [0, 1]
    assert stages(RAMP, model, 1) == {0: own}
    assert stages(RAMP, arms.arm_named("dense").shapes(SIZE), 100) == {0: ()}
    staged = arms.arm_named("mode-staged").shapes(SIZE)
    depths, experts = zip(*stages(RAMP, staged, 100).values(), strict=True)
    assert list(map(float, depths)) == [1.0, 0.5, 0.25]
    assert len(set(experts)) == 1


def test_a_ramp_pays_for_what_it_uses() -> None:
    """The mean over stages of a quarter, a quarter and a half; an arm without routers pays none."""
    arm = arms.arm_named("mod")

    def at(capacity: float) -> float:
        size = dataclasses.replace(SIZE, capacity=capacity)
        return budget.flops_per_step(arm, size, Recipe())

    mean = at(1.0) / 4 + at(0.5) / 4 + at(0.25) / 2
    assert budget.flops_per_step(arm, SIZE, RAMP) == pytest.approx(mean, rel=1e-3)
    dense = arms.arm_named("dense")
    same = budget.flops_per_step(dense, SIZE, RAMP)
    assert same == budget.flops_per_step(dense, SIZE, Recipe())


def test_the_cost_is_of_depths_alone() -> None:
    """The mean absolute logit of routers with one choice, times the recipe's number."""
    model = arms.arm_named("mode-staged").build(SIZE, key=jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (2, 32), 0, 257)
    _, routings = model(tokens)
    (depth,) = [r for r in routings if r.logits.shape[-1] == 1]
    expected = 0.5 * np.abs(np.asarray(depth.logits, np.float64)).mean()
    got = routing_cost(Recipe(router_cost=0.5), routings)
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    assert routing_cost(Recipe(router_cost=0.5), ()) == 0


def test_a_cost_makes_weights_smaller(tmp_path: Path) -> None:
    """It is trained with: a large one leaves small logits."""
    texts = repeating_texts(tmp_path)
    models = [trained(texts, "mod", SIZE, Recipe(router_cost=c)).model for c in (0.0, 10.0)]
    tokens = jax.random.randint(jax.random.key(1), (4, 32), 97, 122)
    free, costly = (np.abs(np.asarray(model(tokens)[1][0].logits)).mean() for model in models)
    assert costly < 0.9 * free


def test_left_out_is_the_dense_model_without_the_routed_layers() -> None:
    """Half of the layers, and no router."""
    size = dataclasses.replace(SIZE, depth=6)
    left_out, dense, mod = (arms.arm_named(n).shapes(size) for n in ("left-out", "dense", "mod"))
    assert (left_out.depth, dense.depth, mod.depth) == (3, 6, 6)
    assert mode.routers(left_out) == []


@pytest.mark.parametrize(
    ("field", "value"),
    [("router_cost", v) for v in (-0.1, float("nan"), float("inf"))]
    + [("ramp", v) for v in (-0.1, 1.0, 1.5, float("nan"))]
    + [("ramp_stages", v) for v in (0, 17, -1)],
)
def test_numbers_out_of_range_are_refused(field: str, value: Any) -> None:
    """A negative cost, a ramp longer than the training, and one that compiles all the time."""
    with pytest.raises(ValueError, match=rf"^`{field}` must be .*, got {value}"):
        check_options(dataclasses.replace(Recipe(), **{field: value}))
