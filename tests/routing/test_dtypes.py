"""Every dtype through every gate: routers compute in float32 or wider, and keep what they get."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array

import mode
from tests.helpers import assert_close, hidden_states
from tests.routing.draws import DIM, GATES, make_router


gates = pytest.mark.parametrize("gate", GATES)
narrow = pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bf16", "f16"])
INFO = mode.TokenInfo.plain((2, 12))


def inputs() -> Array:
    """Numbers that every dtype holds exactly, so that routers see the same in all of them."""
    return hidden_states(1, 2, 12, DIM).astype(jnp.bfloat16).astype(jnp.float16).astype(jnp.float32)


def layer(router: mode.Router, x: Array) -> Array:
    """x plus the weighted tokens that the router selects."""
    routing = router(x, INFO)
    return mode.combine(mode.dispatch(x, routing), routing, onto=x)


@gates
@narrow
def test_narrow_activations(gate: str, dtype: jnp.dtype) -> None:
    """The routing is that of float32; the output has the dtype of the input."""
    router = make_router(1, num_noop=1, gate=GATES[gate][0])
    routing, wide = router(inputs().astype(dtype), INFO), router(inputs(), INFO)
    assert eqx.tree_equal(routing, wide)
    out = layer(router, inputs().astype(dtype))
    assert out.dtype == dtype
    assert_close(out, layer(router, inputs()))


@gates
def test_double_precision(gate: str) -> None:
    """float64 in, float64 logits and weights out; router state stays float32."""
    router = make_router(2, num_noop=1, gate=GATES[gate][0])
    narrow = router(inputs(), INFO)
    with jax.enable_x64(True):
        wide = router(inputs().astype(jnp.float64), INFO)
        assert wide.predictor is not None
        for leaf in (wide.logits, wide.weight, wide.predictor):
            assert leaf.dtype == jnp.float64
            assert np.any(np.asarray(leaf) != np.asarray(leaf).astype(np.float32))
        assert wide.index.dtype == wide.load.dtype == jnp.int32
        np.testing.assert_array_equal(wide.index, narrow.index)
        assert_close(np.asarray(wide.weight, np.float32), np.asarray(narrow.weight), scale=10)
        moved = mode.update_router_state(router, (wide,)).state
        assert moved.threshold.dtype == moved.bias.dtype == jnp.float32
        assert layer(router, inputs().astype(jnp.float64)).dtype == jnp.float64


@gates
@narrow
def test_gradients_have_the_dtype_of_the_parameters(gate: str, dtype: jnp.dtype) -> None:
    """float32 for the router, the activations' dtype for the activations."""
    router = make_router(3, num_noop=1, gate=GATES[gate][0])
    parameters, rest = eqx.partition(router, mode.is_trainable(router))

    def objective(parameters: mode.Router, x: Array) -> Array:
        return jnp.sum(jnp.sin(layer(eqx.combine(parameters, rest), x).astype(jnp.float32)))

    of_parameters, of_input = jax.eval_shape(
        jax.grad(objective, argnums=(0, 1)), parameters, inputs().astype(dtype)
    )
    assert of_input.dtype == dtype
    assert {leaf.dtype for leaf in jax.tree.leaves(of_parameters)} == {jnp.dtype("float32")}
