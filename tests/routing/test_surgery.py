"""All routers of a model: which leaves train, which move, and in what order routers come."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree

import mode
from tests.helpers import hidden_states
from tests.routing.draws import DIM, make_router


def test_no_optimizer_moves_router_state() -> None:
    """AdamW with weight decay changes every parameter and leaves state, bit for bit, alone."""
    router = make_router(20, select=mode.TokenChoice(2), gate=mode.SoftmaxGate())
    optimizer = optax.adamw(1e-2, weight_decay=0.1)
    parameters, rest = eqx.partition(router, mode.is_trainable(router))
    x, info = hidden_states(21, 2, 10, DIM), mode.TokenInfo.plain((2, 10))

    @jax.jit
    def step(parameters: PyTree, opt_state: PyTree) -> tuple[PyTree, PyTree]:
        def loss(parameters: PyTree) -> Array:
            routing = eqx.combine(parameters, rest)(x, info)
            return mode.predictor_bce(routing) + mode.load_balance_loss(routing)

        gradient = jax.grad(loss)(parameters)
        with jax.numpy_dtype_promotion("standard"):  # optax counts steps in integers
            updates, opt_state = optimizer.update(gradient, opt_state, parameters)
        return eqx.apply_updates(parameters, updates), opt_state

    moved, opt_state = parameters, optimizer.init(parameters)
    for _ in range(2):
        moved, opt_state = step(moved, opt_state)
    after = eqx.combine(moved, rest).state
    for old, new in zip(jax.tree.leaves(router.state), jax.tree.leaves(after), strict=True):
        assert np.asarray(old).tobytes() == np.asarray(new).tobytes()
    for old, new in zip(jax.tree.leaves(parameters), jax.tree.leaves(moved), strict=True):
        assert not np.array_equal(old, new)


def test_update_router_state_moves_nothing_but_state() -> None:
    """All other leaves are the very arrays that were passed in."""
    router = make_router(22)
    routing = router(hidden_states(23, 10, DIM), mode.TokenInfo.plain((10,)))
    model = {"layers": [router, jnp.ones(3)], "name": "any tree"}
    moved = mode.update_router_state(model, (routing,))
    old, new = (eqx.filter(tree, mode.is_trainable(tree)) for tree in (model, moved))
    pairs = zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True)
    assert all(before is after for before, after in pairs)
    assert jax.tree.structure(model) == jax.tree.structure(moved)
    assert moved["layers"][0].state.updates == 1


def test_is_trainable_of_shapes_is_that_of_arrays() -> None:
    """And it is true for the scorer and the predictor alone."""
    router = make_router(24)
    shapes = eqx.filter_eval_shape(lambda: router)
    assert jax.tree.leaves(mode.is_trainable(shapes)) == jax.tree.leaves(mode.is_trainable(router))
    filtered = eqx.filter(router, mode.is_trainable(router))
    assert len(jax.tree.leaves(filtered)) == 3
    assert jax.tree.leaves(filtered.state) == []


def test_routers_are_found_and_mapped_in_order() -> None:
    """`routers`, `map_routers` and `map_router_routings` agree on the order."""
    model = {"b": make_router(1, num_experts=2), "a": [make_router(2), make_router(3)]}
    assert [router.num_experts for router in mode.routers(model)] == [3, 3, 2]
    swapped = mode.map_routers(lambda r: eqx.tree_at(lambda r: r.select, r, mode.Strided()), model)
    assert all(isinstance(r.select, mode.Strided) for r in mode.routers(swapped))
    assert swapped["b"].scorer.weight is model["b"].scorer.weight
    routings = tuple(r(jnp.ones((4, DIM)), mode.TokenInfo.plain((4,))) for r in mode.routers(model))
    widths = mode.map_router_routings(
        lambda router, routing: (router.num_experts, routing.num_experts), model, routings
    )
    assert widths == [(3, 3), (3, 3), (2, 2)]
