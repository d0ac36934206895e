"""The state of a generation: all that the next step needs, the model apart."""

import dataclasses
from typing import Any

import equinox as eqx
import jax
from jaxtyping import Array, Float, PyTree

from .._types import Sequences
from ..parallel import role_field


@dataclasses.dataclass(frozen=True)
class ModelStructure:
    """What two models must share to go on from each other's caches: structure and shapes.

    Kept in a state, so that a step knows without another trace whether its model fits.
    """

    tree: Any
    shapes: tuple[tuple[str, tuple[int, ...]], ...]

    @staticmethod
    def of(model: PyTree) -> "ModelStructure":
        """The structure of a model."""
        arrays = jax.tree_util.tree_leaves_with_path(eqx.filter(model, eqx.is_array))
        shapes = tuple((jax.tree_util.keystr(path), leaf.shape) for path, leaf in arrays)
        return ModelStructure(jax.tree.structure(model), shapes)


class DecodeState(eqx.Module):
    """The state of a generation, for a batch of sequences.

    `decode_step` and `continue_generation` write its arrays in place (they are donated): go on from
    their results.

    **Attributes:**

    - `logits`: `[batch, vocab]`, of the next token of each sequence; float32 or wider.
    - `length`: `[batch]`, tokens of each sequence so far.
    - `caches`: for each stack of the model, one `Cache` per layer of its period, with a leading
        axis of repeats.
    - `max_tokens`: how many tokens a sequence may have in all.
    - `structure`: of the model that it belongs to.
    """

    logits: Float[Array, "batch vocab"]
    length: Sequences
    max_tokens: int = eqx.field(static=True)
    structure: ModelStructure = eqx.field(static=True)
    caches: tuple[Any, ...] = role_field("caches", stacked=True)
