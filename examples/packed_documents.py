"""Pack documents and padding: the result of a document does not depend on its neighbours."""

import jax
import jax.numpy as jnp

import mode


dim = 32
k1, k2, k3 = jax.random.split(jax.random.key(0), 3)
block = mode.TransformerBlock(dim, num_heads=4, key=k1)
layer = mode.MixtureOfDepths(block, dim, capacity=0.25, key=k2)
x = jax.random.normal(k3, (16, dim))

segments = jnp.array([1] * 7 + [2] * 6 + [0] * 3)  # two documents, then padding
hidden, (routing,) = layer(x, mode.TokenInfo.packed(segments))
print("segments of the selected tokens:", segments[routing.index[0]].tolist())
print("padding came back unchanged:", bool((hidden[13:] == x[13:]).all()))

dense = mode.Residual(block)
packed, _ = dense(x, mode.TokenInfo.packed(segments))
alone, _ = dense(x[7:13])
print("the second document, packed and alone, differs by", float(abs(packed[7:13] - alone).max()))
