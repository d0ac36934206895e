"""Parameters in bfloat16: the same results, half of the bytes, routers as they were."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mode
from mode.parallel import array_roles
from tests.helpers import rng


def make(dtype: jnp.dtype | type) -> mode.Transformer:
    make_expert = lambda key: mode.SwiGLUFeedForward(16, key=key)  # noqa: E731
    key = jax.random.key(0)
    layers = [
        lambda key: mode.Residual(mode.TransformerBlock(16, 2, key=key)),
        lambda key: mode.staged_mode_layer(make_expert, 16, 2, 4, capacity=0.5, key=key),
    ]
    return mode.Transformer(32, 16, layers, 2, dtype=dtype, key=key)


def test_activations_in_bfloat16_make_no_difference_of_it() -> None:
    """Layers cast at each use what is now cast once, so that every number is the same."""
    model = make(jnp.bfloat16)
    cast = mode.cast_parameters(model, jnp.bfloat16)
    tokens = jnp.asarray(rng(0).integers(0, 32, (2, 24)))
    (got, routed), (expected, wanted) = (eqx.filter_jit(m)(tokens) for m in (cast, model))
    np.testing.assert_array_equal(got, expected)
    for one, other in zip(jax.tree.leaves(routed), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(one, other)
    mode.testing.assert_decodes(
        mode.make_causal(mode.cast_parameters(make(jnp.float32), "float32")), tokens
    )


def test_only_routers_stay_wide() -> None:
    for model in (make(jnp.bfloat16), eqx.filter_eval_shape(lambda: make(jnp.bfloat16))):
        cast = mode.cast_parameters(model, jnp.bfloat16)
        roles = array_roles(cast)
        for leaf, before, array in zip(
            jax.tree.leaves(cast), jax.tree.leaves(model), roles, strict=True
        ):
            if hasattr(leaf, "dtype") and jnp.issubdtype(before.dtype, jnp.floating):
                wide = "router" in array.roles
                assert leaf.dtype == (before.dtype if wide else jnp.bfloat16), array.path
        assert any("router" in array.roles for array in roles)


def test_a_dtype_of_integers_is_refused() -> None:
    with pytest.raises(ValueError, match="`dtype` must be a floating dtype"):
        mode.cast_parameters(make(jnp.float32), jnp.int8)
