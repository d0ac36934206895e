"""Kinds of parameters: matrices and vectors told apart however often they are stacked."""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax.tree_util import keystr, tree_leaves_with_path

import mode
from tests.layers import expert


def model() -> mode.Transformer:
    """Dense and routed layers with norms, experts, routers and predictors, some of them stacked."""
    staged = lambda key: mode.staged_mode_layer(expert, 16, 2, 4, key=key)  # noqa: E731
    block = lambda key: mode.TransformerBlock(16, 2, key=key)  # noqa: E731
    dense = lambda key: mode.Residual(block(key))  # noqa: E731

    def depth(key: jax.Array) -> mode.MixtureOfDepths:
        one, two, three = jax.random.split(key, 3)
        predictor = mode.Predictor(16, key=two)
        return mode.MixtureOfDepths(block(one), 16, predictor=predictor, key=three)

    stacks = [([dense, depth], 3), ([staged], 1)]
    return mode.Transformer(32, 16, stacks=stacks, tied=False, key=jax.random.key(0))


def test_every_array_by_its_name() -> None:
    """The names of the fields say the same; no array is left out."""
    tree = model()
    kinds = tree_leaves_with_path(mode.parameter_kinds(tree))
    leaves = tree_leaves_with_path(eqx.filter(tree, eqx.is_array))
    assert len(kinds) >= len(leaves) > 30
    seen = {keystr(path): kind for path, kind in kinds}
    for path, leaf in leaves:
        name = keystr(path)
        if ".router" in name:
            expected = "router"
        elif name.endswith((".embedding", ".head.weight")):
            expected = name.split(".")[1]
        else:
            expected = "vector" if "norm" in name else "matrix"
        assert seen[name] == expected, (name, leaf.shape)
    assert {"matrix", "vector", "embedding", "head", "router"} == set(seen.values()) - {None}


def test_stacking_changes_no_kind() -> None:
    """A layer by itself, three of them stacked, and experts of both."""
    make = lambda key: mode.staged_mode_layer(expert, 16, 2, 4, key=key)  # noqa: E731
    alone = make(jax.random.key(0))
    stacked = mode.stack_layers([make], 3, key=jax.random.key(0))
    kinds = [jax.tree.leaves(mode.parameter_kinds(tree)) for tree in (alone, stacked)]
    assert kinds[0] == kinds[1]


def test_optimizers_take_it() -> None:
    """Decay reaches the matrices alone; muon orthogonalises every matrix and nothing else."""
    tree = model()
    parameters = eqx.filter(tree, mode.is_trainable(tree))
    kinds = mode.parameter_kinds(parameters)
    zeros = jax.tree.map(jnp.zeros_like, parameters)
    decays = jax.tree.map(lambda kind: kind == "matrix", kinds)
    adamw = optax.adamw(1.0, weight_decay=0.5, mask=lambda _: decays)
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = adamw.update(zeros, adamw.init(parameters), parameters)
    for kind, update in zip(jax.tree.leaves(kinds), jax.tree.leaves(updates), strict=True):
        assert bool(jnp.any(update)) == (kind == "matrix")
    axes = optax.contrib.MuonDimensionNumbers(-2, -1)
    numbers = jax.tree.map(lambda kind: axes if kind == "matrix" else None, kinds)
    muon = optax.contrib.muon(1.0, muon_weight_dimension_numbers=lambda _: numbers)
    gradient = jax.tree.map(
        lambda leaf: jax.random.normal(jax.random.key(leaf.size), leaf.shape), parameters
    )
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        updates, _ = muon.update(gradient, muon.init(parameters), parameters)
    for kind, update in zip(jax.tree.leaves(kinds), jax.tree.leaves(updates), strict=True):
        if kind == "matrix":
            values = jnp.linalg.svd(update, compute_uv=False)
            assert jnp.max(values) < 3 * jnp.min(values) + 0.5  # near a multiple of a rotation
