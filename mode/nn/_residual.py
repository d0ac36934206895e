"""The dense layer: a block applied to every token."""

import jax
import jax.numpy as jnp

from .._token_info import TokenInfo
from .._types import Hidden, Key
from ._cache import Cache
from ._contracts import AbstractLayer, Block, Caches, Routings, check_block, run_block


class Residual(AbstractLayer):
    r"""A block applied to every token: $x + f(x)$. The dense layer.

    Padding passes by unchanged, and the block sees zeros in its place, so that no number in the
    padding can reach a real token or a gradient.

    **Arguments:**

    - `block`: any block.

    **Raises:** `ValueError` for a layer, or a module that cannot be called as a block; at the call,
    for a block whose result is not an update of the shape of `x` and a tuple of routings.

    >>> import jax, jax.numpy as jnp, mode
    >>> block = mode.TransformerBlock(32, num_heads=4, key=jax.random.key(0))
    >>> hidden, routings = mode.Residual(block)(jnp.ones((4, 64, 32)))
    >>> hidden.shape, routings
    ((4, 64, 32), ())
    """

    block: Block

    def __check_init__(self):
        check_block("block", self.block)

    def extend(
        self, x: Hidden, info: TokenInfo, cache: Caches, *, key: Key = None
    ) -> tuple[Hidden, Routings, Cache]:
        """Maps hidden states, `[*groups, tokens, dim]`, to hidden states. See `AbstractLayer`."""
        assert isinstance(cache, Cache)
        with jax.named_scope("mode.Residual"):
            real = info.valid[..., None]
            update, routings, entries = run_block(
                "block", self.block, jnp.where(real, x, 0), info, cache, key
            )
            hidden = jnp.where(real, x + update.astype(x.dtype), x)
            return hidden, routings, Cache.of_tokens(entries, info, cache.max_tokens)
