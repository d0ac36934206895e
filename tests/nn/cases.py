"""Inputs of layers, and how the oracle reads them."""

from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

import mode
from tests import reference as ref
from tests.helpers import f64, packed_info, padded_info


DIM, TOKENS = 16, 12

# Plain, padded, and packed documents with padding. One sequence has fewer tokens than slots.
INFOS: dict[str, mode.TokenInfo | None] = {
    "plain": None,
    "padded": padded_info(12, 7, 3, tokens=TOKENS),
    "packed": packed_info((5, 4, 2), (1, 11), (3, 3), tokens=TOKENS),
}


def make_block(feedforward: Any = None) -> mode.TransformerBlock:
    """Grouped queries, and another rotary base than the default."""
    return mode.TransformerBlock(
        DIM, 4, num_kv_heads=2, rope_theta=100.0, feedforward=feedforward, key=jax.random.key(1)
    )


def make_expert(key: PRNGKeyArray) -> mode.GELUFeedForward:
    """A feed-forward whose width is no other size."""
    return mode.GELUFeedForward(DIM, 24, key=key)


def make_experts(seed: int = 2, make: Any = make_expert, **options: Any) -> mode.MixtureOfExperts:
    """Three experts."""
    options = {"num_experts": 3, **options}
    return mode.MixtureOfExperts(make, DIM, key=jax.random.key(seed), **options)


def numbers(
    x: Float[Array, "batch tokens dim"], info: mode.TokenInfo | None
) -> tuple[ref.Floats, ref.Bools, ref.Ints, ref.Ints]:
    """What the oracle reads of a batch: hidden states, validity, positions and segments."""
    info = mode.TokenInfo.plain(x.shape[:-1]) if info is None else info
    return (
        f64(x),
        np.asarray(info.valid),
        np.asarray(info.positions),
        np.asarray(info.segment_ids),
    )
