"""The check that decoding is the forward pass, for models with blocks of a user's own."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray

from ._decode import prefill, step
from ._decoder import Transformer


def assert_decodes(
    model: Transformer,
    *,
    vocab: int,
    tokens: int = 24,
    batch: int = 3,
    tolerance: float | None = None,
    key: PRNGKeyArray | None = None,
) -> None:
    """Decoding token by token gives the logits of the causal forward pass, for every layer and
    every `extend` in the model, with prompts of different lengths.

    **Arguments:**

    - `model`: deciding token by token: `causal(model)`.
    - `tolerance`: of the logits, as a share of the largest; by default 1e-4, and 0.1 where a layer
        computes in less than float32: rounding may turn a router's choice between two equals.
    """
    text = jax.random.randint(jax.random.key(0) if key is None else key, (batch, tokens), 0, vocab)
    expected = np.asarray(eqx.filter_jit(lambda model, text: model(text)[0])(model, text))
    if tolerance is None:
        tolerance = 1e-4 if jnp.finfo(model.dtype).bits >= 32 else 0.1
    longest = max(1, tokens // 2)
    lengths = jnp.array([1 + (member * 5) % longest for member in range(batch)])
    decoding = prefill(model, text[:, :longest], lengths, max_tokens=tokens)
    members = np.arange(batch)
    for _ in range(tokens - longest + 1):
        place = np.asarray(decoding.length) - 1
        apart = np.abs(np.asarray(decoding.logits) - expected[members, place]).max(axis=-1)
        worst = int(np.argmax(apart))
        if not apart[worst] <= tolerance * np.abs(expected).max():
            raise AssertionError(
                f"after {place[worst] + 1} tokens, of which {int(lengths[worst])} were the prompt, "
                f"the logits of member {worst} are {apart[worst]:.3g} from those of the forward "
                "pass. A block's `extend` must do for new tokens what its `__call__` does."
            )
        if place.max() + 1 < tokens:
            decoding = step(model, decoding, text[members, place + 1])
