"""Layers under one scan compute what a Python loop over them computes."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array, PyTree

import mode
from tests.helpers import assert_close
from tests.layers import DIM, VOCAB, run, with_selector
from tests.models.cases import IDS, KEY, dense, half, layers_in_order, mixed, model, routed


STACKS: dict[str, list[tuple[list[Any], int]]] = {
    "one layer": [([dense], 1)],
    "a period of one": [([routed], 3)],
    "a period of three": [([dense, routed, half], 2)],
    "several stacks": [([mixed], 1), ([dense, routed], 2), ([dense], 1)],
}


@pytest.mark.parametrize("name", STACKS)
def test_scanned_is_a_python_loop(name: str) -> None:
    """Layer by layer in Python, with the same parameters: the same logits, no routing lost."""
    stacks = STACKS[name]
    scanned = model(stacks=stacks)
    makers = [make for period, repeats in stacks for make in period * repeats]
    assert scanned.depth == len(makers)
    logits, routings = run(scanned, IDS)
    layers = layers_in_order(scanned)
    assert [type(layer) for layer in layers] == [type(make(KEY)) for make in makers]

    @eqx.filter_jit
    def looped(layers: list[Any]) -> tuple[Array, list[mode.Routing]]:
        x = scanned.embedding[IDS] * DIM**0.5
        seen: list[mode.Routing] = []
        for layer in layers:
            x, more = layer(x)
            seen.extend(more)
        return scanned.norm(x) @ scanned.embedding.T, seen

    looped_logits, seen = looped(layers)
    assert_close(looped_logits, logits, scale=10)
    flat: list[mode.Routing] = []
    for stack in scanned.stacks:
        count = len(mode.routers(stack))
        mine, routings = routings[:count], routings[count:]
        for repeat in range(stack.repeats):
            flat.extend(jax.tree.map(lambda leaf, at=repeat: leaf[at], one) for one in mine)
    for one, other in zip(flat, seen, strict=True):
        assert np.array_equal(one.index, other.index)
        assert_close(one.weight, other.weight, scale=10)


def test_every_layer_has_parameters_and_a_router_of_its_own() -> None:
    """Drawn from its own key, and not from its place in a period."""
    layers = layers_in_order(model(dense, routed, repeats=3))
    blocks = {np.asarray(layer.block.inner.weight).tobytes() for layer in layers}
    assert len(blocks) == 6
    assert len({np.asarray(layer.router.scorer.weight).tobytes() for layer in layers[1::2]}) == 3


def test_unstacked_layers_compute_the_same() -> None:
    """Every repeat in a stack of its own, in the same order."""
    scanned = model(dense, routed, repeats=2)
    apart = mode.unstack_layers(scanned)
    assert [stack.repeats for stack in apart.stacks] == [1, 1]
    assert apart.depth == scanned.depth
    logits, (routing,) = run(scanned, IDS)
    again, routings = run(apart, IDS)
    assert_close(again, logits, scale=10)
    assert np.array_equal(jnp.concatenate([one.index for one in routings]), routing.index)


def test_layers_by_number_are_stacked_again() -> None:
    """The same logits, and as few scans as their order allows."""
    scanned = model(stacks=[([dense], 2), ([dense, routed], 2), ([half], 1)])
    layers = mode.list_layers(scanned)
    again = mode.with_layers(scanned, layers)
    assert [(len(stack.layers), stack.repeats) for stack in again.stacks] == [(1, 3), *[(1, 1)] * 4]
    assert_close(run(again, IDS)[0], run(scanned, IDS)[0], scale=10)
    order = [6, 1, 3, 1, 3, 1, 3]
    mixed_up = mode.with_layers(scanned, [layers[number] for number in order])
    assert [(len(stack.layers), stack.repeats) for stack in mixed_up.stacks] == [(1, 1), (2, 3)]
    for place, number in enumerate(order):
        one, other = mode.list_layers(mixed_up)[place], layers[number]
        assert jax.tree.structure(one) == jax.tree.structure(other)
        for leaf, expected in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
            assert np.array_equal(leaf, expected)


@pytest.mark.parametrize("period", [[dense, routed], [mixed]], ids=["mod", "mode"])
def test_remat_changes_no_value_and_no_gradient(period: list[Any]) -> None:
    @eqx.filter_jit
    def gradient(model: mode.Transformer) -> PyTree:
        parameters, rest = eqx.partition(model, mode.is_trainable(model))
        return jax.value_and_grad(lambda p: jnp.sum(jnp.sin(eqx.combine(p, rest)(IDS)[0])))(
            parameters
        )

    plain, remat = (model(*period, repeats=2, remat=remat) for remat in (False, True))
    assert_close(jax.tree.leaves(gradient(remat)), jax.tree.leaves(gradient(plain)), scale=10)
    text = str(jax.make_jaxpr(lambda ids: remat(ids)[0])(IDS))
    assert "remat" in text or "checkpoint" in text


def test_keys_reach_every_layer() -> None:
    """Each layer of a stack draws for itself, and a key draws the same again."""
    stacks = [([dense, routed], 3), ([routed], 1)]
    control = with_selector(mode.RandomChoice(), model(stacks=stacks))
    _, (scanned, last) = run(control, IDS, key=jax.random.key(1))
    draws = [np.asarray(one).tobytes() for one in (*scanned.index, last.index[0])]
    assert len(set(draws)) == 4
    _, (again, _) = run(control, IDS, key=jax.random.key(1))
    assert np.array_equal(scanned.index, again.index)
    _, (other, _) = run(control, IDS, key=jax.random.key(2))
    assert np.any(scanned.index != other.index)


def test_deep_models_compile_like_shallow_ones() -> None:
    """The program has the same size for 48 layers as for 4."""

    def size(depth: int) -> int:
        shapes = eqx.filter_eval_shape(
            lambda key: mode.mod_transformer(VOCAB, DIM, depth, 2, key=key), KEY
        )
        parameters, rest = eqx.partition(shapes, lambda leaf: hasattr(leaf, "shape"))

        def training(parameters: PyTree, ids: Array) -> PyTree:
            return jax.grad(lambda p: jnp.sum(eqx.combine(p, rest)(ids)[0]), allow_int=True)(
                parameters
            )

        return len(jax.jit(training).lower(parameters, IDS).as_text().splitlines())

    assert size(48) == size(4)


def test_every_layer_of_a_stack_has_a_gradient() -> None:
    """The router of each repeat learns."""
    scanned = model(dense, routed, repeats=3)
    parameters, rest = eqx.partition(scanned, mode.is_trainable(scanned))

    @jax.jit
    @jax.grad
    def gradient(parameters: PyTree) -> Array:
        return jnp.sum(jnp.sin(eqx.combine(parameters, rest)(IDS)[0]))

    (router,) = mode.routers(gradient(parameters))
    scorer: Any = router.scorer
    assert np.all(np.any(np.asarray(scorer.weight) != 0, axis=(1, 2)))
