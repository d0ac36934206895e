"""On a mesh: the numbers of one device, for every kind of layer, values and gradients."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

import mode
from tests.helpers import assert_close

from .meshes import MESHES, mesh_of
from .models import KEY, KINDS, build, tokens


@eqx.filter_jit
def loss_and_gradient(model: mode.Transformer, tokens: Array) -> tuple[Array, Any, Any]:
    parameters, rest = eqx.partition(model, mode.is_trainable(model))

    def loss(parameters: Any) -> Any:
        logits, routings = eqx.combine(parameters, rest)(tokens[:, :-1], key=KEY)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
        return losses.mean(), (logits, routings)

    (value, (logits, routings)), gradient = jax.value_and_grad(loss, has_aux=True)(parameters)
    return value, (logits, mode.update_router_state(model, routings)), gradient


@pytest.mark.parametrize("mesh_name", MESHES)
def test_a_mesh_changes_no_number(mesh_name: str) -> None:
    """Loss, logits, router state and every gradient of a model that has a layer of every kind; and
    everything lies where it should."""
    axes, rules = MESHES[mesh_name]
    model, mesh = build(*KINDS, repeats=1), mesh_of(**axes)
    value, (logits, moved), gradient = loss_and_gradient(model, tokens())
    with jax.set_mesh(mesh):
        shardings = mode.named_shardings(model, mesh, rules)
        placed = eqx.filter_shard(model, shardings)
        batch_sharding = mode.named_shardings(tokens(), mesh, mode.BATCH_RULES)
        batch = jax.device_put(tokens(), batch_sharding)
        mesh_value, (mesh_logits, mesh_moved), mesh_gradient = loss_and_gradient(placed, batch)
    assert_close(mesh_value, value)
    assert_close(mesh_logits, logits, scale=4)
    arrays = (eqx.filter(tree, eqx.is_array) for tree in (mesh_moved, moved))
    jax.tree.map(assert_close, *arrays)
    jax.tree.map(assert_close, mesh_gradient, gradient)
    both = tuple(axis for axis in ("data", "expert") if axis in axes)
    over = NamedSharding(mesh, PartitionSpec(both))
    assert mesh_logits.sharding.is_equivalent_to(over, 3)
    for leaf, sharding in zip(
        jax.tree.leaves(eqx.filter(placed, eqx.is_array)), jax.tree.leaves(shardings), strict=True
    ):
        assert leaf.sharding == sharding


def test_a_mesh_with_axes_of_a_users_own_is_left_alone() -> None:
    """Parameters may be sharded over such an axis, and nothing is gathered."""
    mesh = mesh_of(model=4)
    model = build("dense")
    rules = (mode.ShardingRule("attention", (None, "model")), mode.ShardingRule(None))
    expected = model(tokens())[0]
    with jax.set_mesh(mesh):
        placed = eqx.filter_shard(model, mode.named_shardings(model, mesh, rules))
        text = str(jax.make_jaxpr(lambda t: placed(t)[0])(tokens()))
        assert "sharding_constraint" not in text
        assert_close(eqx.filter_jit(placed)(tokens())[0], expected, scale=4)


def test_without_a_mesh_nothing_is_constrained() -> None:
    layer = KINDS["moe"](KEY)
    program = jax.make_jaxpr(lambda x: layer(x)[0])(jnp.ones((4, 16, 32)))
    assert "sharding_constraint" not in str(program)
