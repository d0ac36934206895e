"""What a dense model predicts for the text of each step: computed once, kept in files.

Of each distribution, the likeliest tokens are kept, and what is left of 1 stands for all others:
the divergence of two models is then that of what is kept, never more than the whole.
"""

from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

import mode
from mode._types import Scalar
from mode.routing import masked_mean

from ..data import Batch


class Targets(eqx.Module):
    """The likeliest tokens and their log-probabilities, `[batch, tokens, top]`."""

    tokens: Int[Array, "batch tokens top"]
    log_probs: Float[Array, "batch tokens top"]


class Teacher:
    """The dense model's predictions for a training of so many steps, in a folder."""

    def __init__(self, model: mode.Transformer, folder: Path, shape: tuple[int, int, int, int]):
        self.model = model
        folder.mkdir(parents=True, exist_ok=True)
        self._done = _open(folder / "done.npy", shape[:1], np.uint8)
        self._tokens = _open(folder / "tokens.npy", shape, np.uint32)
        self._log_probs = _open(folder / "log_probs.npy", shape, np.float16)

    def targets(self, step: int, batch: Batch) -> Targets:
        """Returns the targets of a step, whose batch is always the same."""
        if not self._done[step]:
            found = _predict(self.model, batch, self._tokens.shape[-1])
            self._tokens[step] = np.asarray(found.tokens)
            self._log_probs[step] = np.asarray(found.log_probs)
            for array in (self._tokens, self._log_probs):
                array.flush()
            self._done[step] = 1  # written last: what is marked is whole
            self._done.flush()
        tokens = jnp.asarray(self._tokens[step].astype(np.int32))
        return Targets(tokens, jnp.asarray(self._log_probs[step].astype(np.float32)))


def _open(path: Path, shape: tuple[int, ...], dtype: type) -> np.memmap:
    if path.exists():
        try:
            array = np.load(path, mmap_mode="r+", allow_pickle=False)
        except ValueError as error:
            raise ValueError(f"{path} is damaged: {error}. Delete its folder.") from error
        if array.shape == shape and array.dtype == dtype:
            return array
        raise ValueError(
            f"{path} must have the shape {shape}, got {array.shape}. Delete its folder."
        )
    return np.lib.format.open_memmap(path, "w+", dtype, shape)


@eqx.filter_jit
def _predict(model: mode.Transformer, batch: Batch, top: int) -> Targets:
    logits, _ = model(batch.inputs, batch.info)
    log_probs, tokens = jax.lax.top_k(jax.nn.log_softmax(logits), top)
    return Targets(tokens, log_probs)


def divergence(
    logits: Float[Array, "batch tokens vocab"], targets: Targets, batch: Batch
) -> Scalar:
    """The mean Kullback-Leibler divergence of a model from its teacher, in nats, over real tokens.

    *Source:* arXiv:1503.02531, section 2, at temperature 1.
    """
    own = jnp.take_along_axis(jax.nn.log_softmax(logits), targets.tokens, axis=-1)
    kept = jnp.sum(jnp.exp(targets.log_probs) * (targets.log_probs - own), axis=-1)
    # The rest: never below what rounding leaves of 1.
    rest, own_rest = (
        jnp.maximum(1 - jnp.sum(jnp.exp(some), axis=-1), 1e-6) for some in (targets.log_probs, own)
    )
    all_others = rest * (jnp.log(rest) - jnp.log(own_rest))
    return masked_mean(kept + all_others, batch.info.valid)
