"""Blocks and layers: attention, feed-forwards, Mixture-of-Depths, Mixture-of-Experts and MoDE."""

from ._adapters import Delta as Delta, PositionWise as PositionWise
from ._attention import Attention as Attention, rope as rope
from ._attention_function import (
    AbstractAttentionFunction as AbstractAttentionFunction,
    CausalAttention as CausalAttention,
)
from ._buckets import bucket_sizes as bucket_sizes, run_bucketed as run_bucketed
from ._cache import Cache as Cache, map_caches as map_caches
from ._contracts import (
    AbstractBlock as AbstractBlock,
    AbstractLayer as AbstractLayer,
    Block as Block,
    Caches as Caches,
    Layer as Layer,
    Routings as Routings,
    check_layer as check_layer,
)
from ._experts import (
    Expert as Expert,
    GELUFeedForward as GELUFeedForward,
    MakeExpert as MakeExpert,
    SwiGLUFeedForward as SwiGLUFeedForward,
)
from ._mixture_of_depths import MixtureOfDepths as MixtureOfDepths, Residual as Residual
from ._mixture_of_experts import MixtureOfExperts as MixtureOfExperts
from ._mode import (
    integrated_mode_layer as integrated_mode_layer,
    reduced_capacity_moe as reduced_capacity_moe,
    staged_mode_layer as staged_mode_layer,
)
from ._transformer_block import TransformerBlock as TransformerBlock
