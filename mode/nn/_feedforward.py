"""Feed-forward networks, which serve as an expert (one vector) and on whole sequences alike."""

import equinox as eqx
import jax
from jaxtyping import Array, Float, PRNGKeyArray

from .._linear import Linear


class SwiGLUFeedForward(eqx.Module):
    r"""`(silu(x @ gate) * (x @ up)) @ down`, on the last axis. arXiv:2002.05202, equation 6.

    **Arguments:**

    - `dim`: features in and out.
    - `hidden`: features inside; by default 8/3 of `dim`, which has the parameters and the FLOPs of
        a `GELUFeedForward` four times as wide as `dim`.
    """

    gate: Linear
    up: Linear
    down: Linear

    def __init__(self, dim: int, hidden: int | None = None, *, key: PRNGKeyArray):
        hidden = 8 * dim // 3 if hidden is None else hidden
        gate_key, up_key, down_key = jax.random.split(key, 3)
        self.gate = Linear(dim, hidden, key=gate_key)
        self.up = Linear(dim, hidden, key=up_key)
        self.down = Linear(hidden, dim, key=down_key)

    def __call__(self, x: Float[Array, "*axes dim"]) -> Float[Array, "*axes dim"]:
        with jax.named_scope("mode.SwiGLUFeedForward"):
            return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class GELUFeedForward(eqx.Module):
    """`gelu(x @ up) @ down`, on the last axis, in the tanh form. arXiv:1606.08415.

    **Arguments:**

    - `dim`: features in and out.
    - `hidden`: features inside; by default 4 times `dim`.
    """

    up: Linear
    down: Linear

    def __init__(self, dim: int, hidden: int | None = None, *, key: PRNGKeyArray):
        hidden = 4 * dim if hidden is None else hidden
        up_key, down_key = jax.random.split(key)
        self.up = Linear(dim, hidden, key=up_key)
        self.down = Linear(hidden, dim, key=down_key)

    def __call__(self, x: Float[Array, "*axes dim"]) -> Float[Array, "*axes dim"]:
        with jax.named_scope("mode.GELUFeedForward"):
            return self.down(jax.nn.gelu(self.up(x)))
