"""Leading axes of routings: layers are told from what `jax.vmap` or a scan put before them.

Tried of this kind: a batch of as many sequences as there are layers, and of other sizes;
micro-batches of gradient accumulation; both together; layers that are not stacked; stacks of
different depth.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array, Int

import mode
from tests.helpers import assert_close, hidden_states


def model_and_text(batch: int) -> tuple[mode.Transformer, Int[Array, "batch tokens"]]:
    """Two routed layers that are scanned over, and a batch."""
    model = mode.mod_transformer(64, 16, depth=4, num_heads=2, key=jax.random.key(0))
    return model, jax.random.randint(jax.random.key(1), (batch, 32), 0, 64)


@pytest.mark.parametrize("batch", [2, 3, 4])
def test_a_vmapped_model_updates_the_state_of_its_layers(batch: int) -> None:
    """The thresholds are those of the batched call, also where batch and layers are as many."""
    model, tokens = model_and_text(batch)
    expected = mode.routers(mode.update_router_state(model, model(tokens)[1]))[0].state
    got = mode.routers(mode.update_router_state(model, jax.vmap(model)(tokens)[1]))[0].state
    assert_close(got.threshold, expected.threshold)
    assert got.updates.tolist() == [1, 1]
    assert abs(expected.threshold[0, 0] - expected.threshold[1, 0]) > 0.001  # layers differ


def test_micro_batches_are_one_step() -> None:
    """Four sequences in two scanned micro-batches of two, under a vmap over two such batches."""
    model, tokens = model_and_text(8)
    expected = mode.routers(mode.update_router_state(model, model(tokens)[1]))[0].state

    def scanned(rows: Int[Array, "rows tokens"]) -> tuple[mode.Routing, ...]:
        return jax.lax.map(lambda part: model(part)[1], rows.reshape(2, -1, 32))

    for routings in (scanned(tokens), jax.vmap(scanned)(tokens.reshape(2, 4, 32))):
        got = mode.routers(mode.update_router_state(model, routings))[0].state
        assert_close(got.threshold, expected.threshold)


def test_causal_selection_has_the_axes_of_the_routing() -> None:
    """So that it can be compared with the recorded selection."""
    model, tokens = model_and_text(2)
    _, routings = model(tokens)
    model = mode.update_router_state(model, routings)
    _, mapped = jax.vmap(model)(tokens)
    (plain,), (outer,) = (
        mode.causal_selection(model, routings),
        mode.causal_selection(model, mapped),
    )
    np.testing.assert_array_equal(jnp.swapaxes(outer, 0, 1), plain)
    for routing, mask in ((routings[0], plain), (mapped[0], outer)):
        assert mode.selection_accuracy(routing, mask).accuracy > 0.9


def test_metrics_and_losses_count_every_axis() -> None:
    """They are means over all tokens, whatever the axes."""
    model, tokens = model_and_text(2)
    (plain,), (mapped,) = model(tokens)[1], jax.vmap(model)(tokens)[1]
    for function in (mode.routing_metrics, mode.router_z_loss, mode.router_bce):
        leaves = [jax.tree.leaves(function(routing)) for routing in (plain, mapped)]
        for one, other in zip(*leaves, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-6)


def test_a_layer_of_its_own_may_be_vmapped() -> None:
    """Its routing has no axis of layers, so every leading axis is one of groups."""
    block = mode.PositionWise(jnp.tanh)
    layer = mode.MixtureOfDepths(block, 8, capacity=0.25, key=jax.random.key(0))
    x = hidden_states(0, 3, 16, 8)
    states = [
        mode.update_router_state(layer, call(x)[1]).router.state.threshold
        for call in (layer, jax.vmap(layer))
    ]
    assert_close(*states)


def test_routings_of_another_depth_are_refused() -> None:
    """The axis of layers is named, with its sizes."""
    model, tokens = model_and_text(2)
    deeper = mode.mod_transformer(64, 16, depth=6, num_heads=2, key=jax.random.key(0))
    for call in (deeper, jax.vmap(deeper)):
        with pytest.raises(ValueError, match="in the order of the routers"):
            mode.update_router_state(model, call(tokens)[1])


def test_routings_record_the_axes_of_their_call() -> None:
    """Masking, mapping and stacking keep the number."""
    model, tokens = model_and_text(2)
    (plain,), (mapped,) = model(tokens)[1], jax.vmap(model)(tokens)[1]
    assert (plain.group_axes, mapped.group_axes) == (1, 0)
    assert plain.masked(jnp.ones(plain.valid.shape[:-1], bool)).group_axes == 1
