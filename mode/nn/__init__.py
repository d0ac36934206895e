"""Blocks and layers: attention, feed-forwards, Mixture-of-Depths, Mixture-of-Experts and MoDE."""

from ._adapters import Delta as Delta, PositionWise as PositionWise, PreNorm as PreNorm
from ._attention import Attention as Attention
from ._attention_function import (
    AbstractAttentionFunction as AbstractAttentionFunction,
    CausalAttention as CausalAttention,
)
from ._buckets import bucket_sizes as bucket_sizes, run_bucketed as run_bucketed
from ._cache import Cache as Cache, map_caches as map_caches
from ._contracts import (
    AbstractBlock as AbstractBlock,
    AbstractKeyedBlock as AbstractKeyedBlock,
    AbstractLayer as AbstractLayer,
    Block as Block,
    Caches as Caches,
    Keys as Keys,
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
from ._kernels import record_choices as record_choices
from ._layers import (
    Loop as Loop,
    Residual as Residual,
    Sequential as Sequential,
    run_layers as run_layers,
)
from ._mixture_of_depths import MixtureOfDepths as MixtureOfDepths
from ._mixture_of_experts import MixtureOfExperts as MixtureOfExperts
from ._mixture_of_queries import MixtureOfQueries as MixtureOfQueries
from ._mode import (
    integrated_mode_layer as integrated_mode_layer,
    reduced_capacity_moe as reduced_capacity_moe,
    staged_mode_layer as staged_mode_layer,
)
from ._recursion import Recursion as Recursion
from ._rope import (
    AbstractRopeScaling as AbstractRopeScaling,
    LinearRopeScaling as LinearRopeScaling,
    Llama3RopeScaling as Llama3RopeScaling,
    rope as rope,
)
from ._routed_layer import AbstractRoutedLayer as AbstractRoutedLayer
from ._token_choice_recursion import TokenChoiceRecursion as TokenChoiceRecursion
from ._transformer_block import TransformerBlock as TransformerBlock
