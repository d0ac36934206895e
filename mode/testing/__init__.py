"""Assertions for what you composed: a layer, a stack of layers, a whole model.

Every assertion takes your model and your own inputs, padding and packing included. It calls
`model(x, info, key=key)`, which returns `(output, routings)`, as all layers and models here do:

- `x`: hidden states, `[*groups, tokens, dim]`, or token ids, `[*groups, tokens]`, that are not all
  the same;
- `info`: a `TokenInfo` of the same groups and tokens; `None` for sequences without padding;
- `key`: passed to the model; a fixed key by default.

It raises `AssertionError` with what differs and where, and `ValueError` for arguments with which it
would check nothing. Outputs of padding are not compared. `mode.aot` goes further: it compiles a
program for a TPU or a GPU, on any machine.

>>> import jax, jax.numpy as jnp, mode
>>> block = mode.TransformerBlock(32, num_heads=4, key=jax.random.key(0))
>>> layer = mode.MixtureOfDepths(block, 32, capacity=0.125, key=jax.random.key(1))
>>> shape = jax.ShapeDtypeStruct((2, 64, 32), jnp.float32)
>>> mode.testing.assert_static_shapes(layer, shape)  # nothing is allocated
>>> x = jax.random.normal(jax.random.key(2), (2, 64, 32))
>>> info = mode.TokenInfo.packed(jnp.array([[1] * 64, [1] * 40 + [0] * 24]))  # 0 is padding
>>> mode.testing.assert_exact_capacity(layer, x, info)
>>> mode.testing.assert_residual_identity(layer, x, info)
>>> mode.testing.assert_router_gradients(layer, x, info)
>>> mode.testing.assert_batch_independent(layer, x, info)
>>> mode.testing.assert_no_retrace(layer, x, info)
>>> mode.testing.assert_causal(mode.make_causal(layer), x, info)
>>> model = mode.mod_transformer(64, 32, depth=2, num_heads=4, key=jax.random.key(0))
>>> tokens = jax.random.randint(jax.random.key(3), (3, 24), 0, 64)
>>> mode.testing.assert_decodes(mode.make_causal(model), tokens)
"""

from ._decoding import assert_decodes as assert_decodes
from ._independence import (
    assert_batch_independent as assert_batch_independent,
    assert_causal as assert_causal,
    assert_no_retrace as assert_no_retrace,
)
from ._routing import (
    assert_exact_capacity as assert_exact_capacity,
    assert_residual_identity as assert_residual_identity,
    assert_router_gradients as assert_router_gradients,
    assert_static_shapes as assert_static_shapes,
)
