"""Documents as packed byte sequences and batches, the same ones for the same seed.

Documents are laid end to end and cut into sequences, so that no slot is wasted. A sequence numbers
its documents from 1; `TokenInfo` keeps attention inside each.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

import mode

from .corpus import (
    DOCUMENT_START as DOCUMENT_START,
    Corpus as Corpus,
    Documents as Documents,
    read_corpus as read_corpus,
    read_documents as read_documents,
)


if TYPE_CHECKING:
    import grain

Sample = dict[str, Int[np.ndarray, "*batch sample"]]


class Sequences:
    """Documents cut into sequences: a random access source for grain.

    Sample `i` holds `length + 1` tokens from `i * length` on, as the last target of a sequence is
    the first input of the next: every byte is a target once. The last sample ends in padding.
    """

    def __init__(self, documents: Documents, length: int):
        self.documents = documents
        self.length = length

    def __len__(self) -> int:
        return -(-(len(self.documents.tokens) - 1) // self.length)

    def __getitem__(self, index: int) -> Sample:
        first = index * self.length
        tokens = self.documents.tokens[first : first + self.length + 1].astype(np.int32)
        positions = np.arange(first, first + len(tokens))
        document = np.searchsorted(self.documents.starts, positions, side="right")
        segment_ids = (document - document[0] + 1).astype(np.int32)
        padding = (0, self.length + 1 - len(tokens))
        return {"tokens": np.pad(tokens, padding), "segment_ids": np.pad(segment_ids, padding)}


def batches(
    documents: Documents, *, length: int, batch: int, seed: int, part: int = 0, parts: int = 1
) -> "grain.DatasetIterator[Sample]":
    """Makes an endless, shuffled stream of batches, in another order every epoch.

    It reads `part` of so many equal `parts` of every batch: together they are the batch, and no
    sequence is read in two of them. `get_state()` and `set_state(state)` of the result save and
    restore its position, which is the same for all parts.
    """
    import grain

    dataset = grain.MapDataset.source(Sequences(documents, length)).seed(seed)
    dataset = dataset.shuffle().repeat().batch(batch // parts, drop_remainder=True)[part::parts]
    # Read in the calling thread: cutting a batch from memory takes a fraction of a millisecond,
    # less than a queue would, and a small machine has no core to spare for it.
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)))


def held_out_batches(
    documents: Documents, *, length: int, batch: int, sequences: int
) -> list[Sample]:
    """Takes at most `sequences` sequences, each once, evenly spread over the documents.

    They come in whole batches; where there are fewer than one batch, it is filled with padding.
    """
    source = Sequences(documents, length)
    count = min(sequences, len(source))
    count = max(count // batch * batch, min(count, batch))
    positions = np.linspace(0, len(source) - 1, count).round().astype(int)
    samples = [source[int(position)] for position in positions]
    samples += [jax.tree.map(np.zeros_like, samples[0])] * (-count % batch)
    rows = range(0, len(samples), batch)
    return [jax.tree.map(lambda *x: np.stack(x), *samples[row : row + batch]) for row in rows]


class Batch(eqx.Module):
    """Inputs, their targets, shifted by one token, and positions and documents of the inputs.

    A weight is 1 where the target is in the document of its input, and 0 where it does not count.
    """

    inputs: Int[Array, "batch tokens"]
    targets: Int[Array, "batch tokens"]
    weights: Float[Array, "batch tokens"]
    info: mode.TokenInfo

    @staticmethod
    def of(sample: Mapping[str, Int[Array | np.ndarray, "batch sample"]]) -> "Batch":
        """Makes a batch from `length + 1` tokens and their segment ids."""
        tokens, segment_ids = jnp.asarray(sample["tokens"]), jnp.asarray(sample["segment_ids"])
        before, after = segment_ids[:, :-1], segment_ids[:, 1:]
        weights = ((before == after) & (after != 0)).astype(jnp.float32)
        return Batch(tokens[:, :-1], tokens[:, 1:], weights, mode.TokenInfo.packed(before))


def shape_of_batch(length: int, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
    """The shape of a batch, for what only needs shapes."""
    like = jax.ShapeDtypeStruct((batch, length + 1), jnp.int32)
    return {"tokens": like, "segment_ids": like}
