"""The constraints inside layers move what they say: seen in the shardings of compiled programs."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from mode.parallel import (
    PARAMETER_RULES,
    all_gather_parameters,
    named_shardings,
    role_field,
    shard_batch,
    to_experts,
    to_groups,
)

from .meshes import mesh_of


BOTH = ("data", "expert")


class Layer(eqx.Module):
    weight: Array
    experts: Array = role_field("experts")
    router: Array = role_field("router")


def layer() -> Layer:
    return Layer(jnp.ones((16, 8)), jnp.ones((8, 16, 4)), jnp.ones((16, 8)))


def sharding_after(
    function: Callable[[Any], Any], tree: Any, before: Any, axes: dict[str, int]
) -> list[PartitionSpec]:
    """The shardings that the compiler gives the results of `function`."""
    mesh = mesh_of(**axes)
    with jax.set_mesh(mesh):
        shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), before)
        placed = jax.device_put(tree, shardings)
        return [leaf.sharding.spec for leaf in jax.tree.leaves(jax.jit(function)(placed))]


def test_parameters_are_gathered_and_experts_stay() -> None:
    """Each device gets whole arrays, and all of its own experts."""
    mesh = mesh_of(data=2, expert=4)
    with jax.set_mesh(mesh):
        placed = jax.device_put(layer(), named_shardings(layer(), mesh, PARAMETER_RULES))
        spread = [placed.weight.sharding.spec, placed.experts.sharding.spec]
        assert spread == [PartitionSpec(BOTH), PartitionSpec("expert", "data")]
        result = jax.jit(all_gather_parameters)(placed)
    for array, spec in (
        (result.weight, PartitionSpec()),
        (result.experts, PartitionSpec("expert")),
        (result.router, PartitionSpec()),
    ):
        assert array.sharding.is_equivalent_to(NamedSharding(mesh, spec), array.ndim)


def test_gathering_looks_past_stacked_axes() -> None:
    class Stack(eqx.Module):
        layers: Layer = role_field("layers", stacked=True)

    mesh = mesh_of(expert=4)
    stack = Stack(jax.tree.map(lambda leaf: jnp.stack([leaf] * 4), layer()))
    with jax.set_mesh(mesh):
        result = jax.jit(all_gather_parameters)(stack).layers.experts
    over = NamedSharding(mesh, PartitionSpec(None, "expert"))
    assert result.sharding.is_equivalent_to(over, result.ndim)


def test_values_that_are_not_arrays_pass() -> None:
    tree = (jnp.ones((8, 8)), jax.nn.relu, None)
    with jax.set_mesh(mesh_of(data=8)):
        assert all_gather_parameters(tree)[1:] == (jax.nn.relu, None)


def test_arrays_on_one_device_pass_outside_of_a_program() -> None:
    x = jnp.ones((8, 3, 5))
    with jax.set_mesh(mesh_of(data=8)):
        assert shard_batch(x) is x
        whole, over = (
            NamedSharding(mesh_of(data=8), PartitionSpec(axis)) for axis in (None, "data")
        )
        result = shard_batch(jax.device_put(x, whole))
    assert result.sharding.is_equivalent_to(over, 3)


WHERE: dict[str, tuple[Callable[[Any], Any], tuple[int, ...], PartitionSpec, PartitionSpec]] = {
    "a whole batch": (shard_batch, (8, 3, 5), PartitionSpec(), PartitionSpec(BOTH)),
    "slots of the groups": (
        to_experts,
        (4, 8, 3, 5),
        PartitionSpec(None, BOTH),
        PartitionSpec("expert", "data"),
    ),
    "updates of the experts": (
        to_groups,
        (4, 8, 3, 5),
        PartitionSpec("expert", "data"),
        PartitionSpec(None, BOTH),
    ),
}


@pytest.mark.parametrize("name", WHERE)
def test_activations_move(name: str) -> None:
    function, shape, before, after = WHERE[name]
    axes = {"data": 2, "expert": 4}
    (spec,) = sharding_after(function, jnp.ones(shape), before, axes)
    mesh = mesh_of(**axes)
    assert NamedSharding(mesh, spec).is_equivalent_to(NamedSharding(mesh, after), len(shape))


@pytest.mark.parametrize("function", [to_experts, to_groups])
def test_an_exchange_is_one_collective(function: Callable[[Array], Array]) -> None:
    """And so is its gradient."""
    mesh = mesh_of(data=2, expert=4)
    _, shape, before, _ = WHERE[
        "slots of the groups" if function is to_experts else "updates of the experts"
    ]
    x = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, before))
    with jax.set_mesh(mesh):
        forward = jax.jit(function).lower(x).compile().as_text()
        gradient = jax.jit(jax.grad(lambda x: jnp.sum(jnp.sin(function(x)))))
        both = gradient.lower(x).compile().as_text()
    assert (forward or "").count(" all-to-all(") == 1
    assert (both or "").count(" all-to-all(") == 2
    assert "all-gather" not in (forward or "") + (both or "")


ALONE: dict[str, tuple[Callable[[Any], Any], tuple[int, ...], dict[str, int] | None]] = {
    "no mesh": (shard_batch, (8, 3, 5), None),
    "one sequence": (shard_batch, (3, 5), {"data": 8}),
    "a batch that is not divisible": (shard_batch, (6, 3, 5), {"data": 8}),
    "one group": (to_experts, (8, 3, 5), {"expert": 8}),
    "experts and groups that are not divisible": (to_experts, (6, 6, 3, 5), {"expert": 8}),
    "axes of a user's own": (shard_batch, (8, 3, 5), {"model": 8}),
    "parameters under axes of a user's own": (
        all_gather_parameters,
        (8, 8),
        {"data": 2, "model": 4},
    ),
}


@pytest.mark.parametrize("name", ALONE)
def test_left_to_the_partitioner(name: str) -> None:
    function, shape, axes = ALONE[name]
    x = jnp.ones(shape)
    if axes is None:
        program = jax.make_jaxpr(function)(x)
    else:
        with jax.set_mesh(mesh_of(**axes)):
            program = jax.make_jaxpr(function)(x)
    assert "sharding_constraint" not in str(program)
