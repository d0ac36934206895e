"""Roles belong to fields and not to their names; they reach every tree that a user shards."""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import PartitionSpec
from jaxtyping import Array, PyTree

from mode.parallel import array_roles, named_shardings, role_field

from .meshes import mesh_of


class Experts(eqx.Module):
    up: Array
    gate: Array | None


class Sparse(eqx.Module):
    experts: Experts = role_field("experts")
    router: Array = role_field("router")
    size: int = eqx.field(static=True, default=3)


class Layers(eqx.Module):
    layers: tuple[Sparse, ...] = role_field("layers", stacked=True)


class Model(eqx.Module):
    embedding: Array
    parts: dict[str, list[Layers]]
    activation: Any


def model() -> Model:
    """Two stacked layers; every array has the size 8 or 16 on its axes, but for that of layers."""
    sparse = Sparse(Experts(jnp.ones((2, 8, 16, 8)), None), jnp.ones((2, 16, 8)))
    return Model(jnp.ones((16, 8)), {"trunk": [Layers((sparse,))]}, jax.nn.gelu)


def specs(tree: PyTree) -> list[PartitionSpec]:
    """The sharding of every array, on 2 x 4 devices."""
    return [leaf.spec for leaf in jax.tree.leaves(named_shardings(tree, mesh_of(data=2, expert=4)))]


EXPECTED = [
    PartitionSpec(("data", "expert")),  # the embedding
    PartitionSpec(None, "expert", "data"),  # experts, behind an axis of layers
    PartitionSpec(),  # the router
]


def test_roles_decide() -> None:
    assert specs(model()) == EXPECTED


def test_every_leaf_has_its_roles_and_stacked_axes() -> None:
    roles = array_roles(model())
    assert len(roles) == len(jax.tree.leaves(model()))
    assert [(array.roles, array.stacked) for array in roles] == [
        ((), 0),
        (("layers", "experts"), 1),
        (("layers", "router"), 1),
        ((), 0),
    ]
    assert roles[1].path == ".parts['trunk'][0].layers[0].experts.up"


def renamed(node: Any) -> Any:
    """A copy of a tree in which every class and every field has another name."""
    if isinstance(node, eqx.Module):
        fields = dataclasses.fields(node)
        names = [f"own_{number}" for number, _ in enumerate(fields)]
        namespace: dict[str, Any] = {"__annotations__": dict.fromkeys(names, Any)}
        for name, field in zip(names, fields, strict=True):
            metadata = {key: value for key, value in field.metadata.items() if key != "converter"}
            namespace[name] = dataclasses.field(metadata=metadata)
        values = [renamed(getattr(node, field.name)) for field in fields]
        return type("Own", (eqx.Module,), namespace)(*values)
    if isinstance(node, tuple | list):
        return type(node)([renamed(child) for child in node])
    if isinstance(node, dict):
        return {f"own_{name}": renamed(child) for name, child in node.items()}
    return node


def test_a_renamed_field_changes_nothing() -> None:
    copy = renamed(model())
    assert copy.own_0.shape == (16, 8)
    assert specs(copy) == EXPECTED


TREES: dict[str, Any] = {
    "shapes": lambda: eqx.filter_eval_shape(model),
    "a tree with None": lambda: eqx.filter(
        model(), lambda leaf: eqx.is_array(leaf) and leaf.ndim > 2
    ),
    "a part": lambda: model().parts,
}


@pytest.mark.parametrize("name", TREES)
def test_trees_with_fewer_arrays(name: str) -> None:
    expected = EXPECTED if name == "shapes" else EXPECTED[1:]
    assert specs(TREES[name]()) == expected


def test_layers_inside_a_scan_have_no_stacked_axis() -> None:
    """What a scan passes to its body is the tuple of layers, without the axis of layers."""
    layers = jax.tree.map(lambda leaf: leaf[0], model().parts["trunk"][0].layers)
    assert specs(layers) == [PartitionSpec("expert", "data"), PartitionSpec()]


OPTIMIZERS: dict[str, optax.GradientTransformation] = {
    "chain": optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3)),
    "masked": optax.masked(optax.adam(1e-3), lambda tree: jax.tree.map(lambda _: True, tree)),
    "multi": optax.multi_transform(
        {"all": optax.adam(1e-3)}, lambda tree: jax.tree.map(lambda _: "all", tree)
    ),
    "skipping": optax.apply_if_finite(optax.adam(1e-3), 3),
    "scheduled": optax.inject_hyperparams(optax.adam)(1e-3),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizers_state_lies_where_the_model_does(name: str) -> None:
    arrays = eqx.filter(model(), eqx.is_array)
    state = eqx.filter_eval_shape(OPTIMIZERS[name].init, arrays)
    sharded = [spec for spec in specs(state) if spec != PartitionSpec()]
    assert sharded == EXPECTED[:2] * 2  # both moments
    assert len(specs(state)) == len(jax.tree.leaves(state))


def test_a_factored_optimizers_state_is_accepted() -> None:
    """Its arrays have fewer axes than the model's; where there is nothing, a single number."""
    arrays = eqx.filter(model(), eqx.is_array)
    optimizer = optax.adafactor(1e-3, min_dim_size_to_factor=4)
    assert specs(eqx.filter_eval_shape(optimizer.init, arrays))


def test_users_add_roles_of_their_own() -> None:
    class Memory(eqx.Module):
        table: Array = role_field("memory", default_factory=lambda: jnp.ones((8, 8)))

    assert [array.roles for array in array_roles([Memory()])] == [("memory",)]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"role": ""}, "`role` must be a name, .* got ''"),
        ({"role": "router", "static": True}, r"must be for a field with arrays, got `static=True`"),
    ],
)
def test_a_role_that_cannot_be_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        role_field(**options)
