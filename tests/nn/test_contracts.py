"""Every layer of the table under every transform: what holds for all of them."""

import functools
import io

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array, PyTree

import mode
from tests.helpers import assert_close
from tests.layers import (
    CASES,
    DIM,
    GROUPS,
    TOKENS,
    TRACES,
    Case,
    build,
    expected,
    hidden,
    loss,
    run,
    split,
)


every = pytest.mark.parametrize("case", CASES, ids=str)
unbound = pytest.mark.parametrize("case", [case for case in CASES if not case.bound], ids=str)

gradients = eqx.filter_jit(jax.grad(loss, argnums=(0, 2)))


@functools.cache
def expected_gradients(case: Case) -> tuple[PyTree, Array]:
    return gradients(*split(build(case)), hidden())


def test_names_are_unique() -> None:
    assert len({case.name for case in CASES}) == len(CASES)


@every
def test_shapes_are_known_before_anything_runs(case: Case) -> None:
    for tokens in (TOKENS,) if case.bound else (TOKENS, 48):
        shape = jax.ShapeDtypeStruct((GROUPS, tokens, DIM), jnp.float32)
        mode.testing.assert_static_shapes(build(case), shape)


@every
def test_one_trace_serves_every_input(case: Case) -> None:
    expected(case)
    before = TRACES["run"]
    for seed in range(3):
        other = jax.random.normal(jax.random.key(seed + 10), hidden().shape)
        run(build(case), other)
    assert TRACES["run"] == before


@unbound
def test_two_axes_of_groups_are_one(case: Case) -> None:
    """However a batch is laid out, its sequences get what they get in one axis."""
    out, routings = expected(case)
    parts, part_routings = run(build(case), hidden().reshape(2, GROUPS // 2, TOKENS, DIM))
    assert_close(parts.reshape(out.shape), out)
    for one, many in zip(part_routings, routings, strict=True):
        assert one.group_axes == many.group_axes + 1
        leaves = zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True)
        assert_close([leaf.reshape(like.shape) for leaf, like in leaves], jax.tree.leaves(many))


@every
def test_gradients_are_finite_and_reach_every_parameter(case: Case) -> None:
    parameters, of_input = expected_gradients(case)
    assert np.all(np.isfinite(of_input))
    for path, leaf in jax.tree_util.tree_leaves_with_path(parameters):
        assert np.all(np.isfinite(leaf)), path
        name = jax.tree_util.keystr(path)
        # A predictor learns from its own loss alone.
        if "predictor" not in name:
            assert np.any(leaf != 0), f"no gradient reaches {name}"


@unbound
def test_vmap_of_the_gradient_of_a_checkpoint_is_the_gradient_of_the_batch(case: Case) -> None:
    parameters, of_input = expected_gradients(case)
    start, rest = split(build(case))

    def of_group(start: PyTree, x: Array) -> Array:
        return jax.checkpoint(lambda p, x: loss(p, rest, x[None]))(start, x)

    per_group = jax.jit(jax.vmap(jax.grad(of_group, argnums=(0, 1)), (None, 0)))
    mapped, mapped_input = per_group(start, hidden())
    assert_close(jax.tree.map(lambda leaf: jnp.mean(leaf, 0), mapped), parameters, scale=10)
    assert_close(mapped_input / GROUPS, of_input, scale=10)


@every
def test_scan_under_vmap_is_a_python_loop_over_the_batch(case: Case) -> None:
    layer = build(case)

    def twice(x: Array) -> PyTree:
        return jax.lax.scan(lambda x, _: run(layer, x), x, None, length=2)

    last, routings = jax.jit(twice if case.bound else jax.vmap(twice))(hidden())
    first, first_routings = expected(case)
    second, second_routings = run(layer, first)
    assert_close(last, second, scale=10)
    for many, *ones in zip(routings, first_routings, second_routings, strict=True):
        # [groups, steps, *layers, ...] under `vmap`; the layer has the groups after its layers.
        index = np.asarray(many.index)
        index = index if case.bound else np.moveaxis(index, 0, index.ndim - 3)
        np.testing.assert_array_equal(index, [one.index for one in ones])


@every
def test_saved_and_loaded_bit_for_bit(case: Case) -> None:
    layer = build(case)
    file = io.BytesIO()
    eqx.tree_serialise_leaves(file, layer)
    file.seek(0)
    blank = jax.tree.map(lambda leaf: jnp.zeros_like(leaf) if eqx.is_array(leaf) else leaf, layer)
    loaded = eqx.tree_deserialise_leaves(file, blank)
    assert eqx.tree_equal(loaded, layer)
    out, _ = run(loaded, hidden())
    assert np.asarray(out).tobytes() == np.asarray(expected(case)[0]).tobytes()


@every
def test_a_pytree_like_any_other(case: Case) -> None:
    layer = build(case)
    leaves, tree = jax.tree.flatten(layer)
    again = jax.tree.unflatten(tree, leaves)
    assert eqx.tree_equal(again, layer)
    assert hash(jax.tree.structure(again)) == hash(tree)
    arrays, rest = eqx.partition(layer, eqx.is_array)
    assert jax.tree.structure(eqx.combine(arrays, rest)) == tree


@every
def test_a_routing_is_data(case: Case) -> None:
    """Saved and loaded like a model."""
    _, routings = jax.tree.map(np.asarray, expected(case))
    file = io.BytesIO()
    eqx.tree_serialise_leaves(file, routings)
    file.seek(0)
    loaded = eqx.tree_deserialise_leaves(file, jax.tree.map(np.zeros_like, routings))
    assert jax.tree.structure(loaded) == jax.tree.structure(routings)
    for one, other in zip(jax.tree.leaves(loaded), jax.tree.leaves(routings), strict=True):
        assert (one.dtype, one.tobytes()) == (other.dtype, other.tobytes())
    assert len(routings) == len(mode.routers(build(case)))


@every
def test_sharded_over_the_batch_is_one_device(case: Case) -> None:
    assert jax.device_count() == 8
    mesh = jax.make_mesh((8,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    over_batch = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("batch"))
    x = jax.device_put(hidden(), over_batch)
    out, routings = run(build(case), x)
    assert out.sharding.is_equivalent_to(over_batch, out.ndim)
    assert_close((out, routings), expected(case))
