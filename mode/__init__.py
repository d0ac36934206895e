"""Mixture-of-Depths, expert-choice Mixture-of-Experts and MoDE, as Equinox layers.

- **Layers**: `Residual`, `MixtureOfDepths`. **Blocks** for them: `TransformerBlock`, `Attention`
  with a `CausalAttention`, `MixtureOfExperts`, `PositionWise`, and `Delta` for modules with their
  own skip connection. MoDE by name: `staged_mode_layer`, `integrated_mode_layer`,
  `reduced_capacity_moe`.
- **Routing**: `Router` makes a `Routing`, the record of the selected tokens. Its parts are a
  selector (`ExpertChoice`, `TokenChoice`, `RandomChoice`, `Strided`, `Replay`, `QuantileThreshold`,
  `PredictorThreshold`, `LogitThreshold`), a gate (`IdentityGate`, `SigmoidGate`, `TanhGate`,
  `SoftmaxGate`, `SelectedSoftmaxGate`) and a `Predictor`. `dispatch` and `combine` move tokens by
  it; `token_capacity` says how many.
- **Models**: `Transformer`, `mod_transformer`, `interleave`; `TokenInfo` for packed documents.
- **Training**: `is_trainable`, `update_router_state`, the losses `router_z_loss`,
  `load_balance_loss`, `router_bce`, `predictor_bce`; `routing_metrics`, `selection_accuracy`;
  `count_flops`.
- **Causal models**: `make_causal`, `causal_selection`.
- **Decoding**: `prefill`, `decode_step`, `decode_tokens`, `generate` with a `Sampler`,
  `continue_generation`; `unstack_layers`; `Cache` shows how a block of your own decodes.
- **Surgery**: `routers`, `map_routers`, `map_router_routings`.
- **Sharding**: `named_shardings` with a `ShardingRule` per role; `role_field`.
- **Checks**: `mode.testing`. **Compilers of devices that are not there**: `mode.aot`.
"""

import importlib
from importlib.metadata import version as _version
from types import ModuleType
from typing import TYPE_CHECKING

from ._capacity import Capacity as Capacity, token_capacity as token_capacity
from ._linear import Linear as Linear, RMSNorm as RMSNorm
from ._token_info import TokenInfo as TokenInfo
from .decoding import (
    DecodeState as DecodeState,
    Generation as Generation,
    Sampler as Sampler,
    continue_generation as continue_generation,
    decode_step as decode_step,
    decode_tokens as decode_tokens,
    generate as generate,
    prefill as prefill,
    rewind as rewind,
)
from .flops import Flops as Flops, count_flops as count_flops
from .models import (
    LayerStack as LayerStack,
    Transformer as Transformer,
    interleave as interleave,
    mod_transformer as mod_transformer,
    stack_layers as stack_layers,
    unstack_layers as unstack_layers,
)
from .nn import (
    AbstractAttentionFunction as AbstractAttentionFunction,
    AbstractBlock as AbstractBlock,
    AbstractLayer as AbstractLayer,
    Attention as Attention,
    Cache as Cache,
    CausalAttention as CausalAttention,
    Delta as Delta,
    GELUFeedForward as GELUFeedForward,
    MixtureOfDepths as MixtureOfDepths,
    MixtureOfExperts as MixtureOfExperts,
    PositionWise as PositionWise,
    Residual as Residual,
    SwiGLUFeedForward as SwiGLUFeedForward,
    TransformerBlock as TransformerBlock,
    integrated_mode_layer as integrated_mode_layer,
    reduced_capacity_moe as reduced_capacity_moe,
    rope as rope,
    staged_mode_layer as staged_mode_layer,
)
from .parallel import (
    BATCH_RULES as BATCH_RULES,
    DECODE_RULES as DECODE_RULES,
    PARAMETER_RULES as PARAMETER_RULES,
    ShardingRule as ShardingRule,
    named_shardings as named_shardings,
    role_field as role_field,
)
from .routing import (
    AbstractGate as AbstractGate,
    AbstractSelector as AbstractSelector,
    AbstractThreshold as AbstractThreshold,
    AbstractTokenSelector as AbstractTokenSelector,
    Assignment as Assignment,
    ExpertChoice as ExpertChoice,
    IdentityGate as IdentityGate,
    LogitThreshold as LogitThreshold,
    Predictor as Predictor,
    PredictorThreshold as PredictorThreshold,
    QuantileThreshold as QuantileThreshold,
    RandomChoice as RandomChoice,
    Replay as Replay,
    Router as Router,
    RouterState as RouterState,
    Routing as Routing,
    RoutingInputs as RoutingInputs,
    RoutingMetrics as RoutingMetrics,
    SelectedSoftmaxGate as SelectedSoftmaxGate,
    SelectionAccuracy as SelectionAccuracy,
    SigmoidGate as SigmoidGate,
    SoftmaxGate as SoftmaxGate,
    Strided as Strided,
    TanhGate as TanhGate,
    TokenChoice as TokenChoice,
    causal_selection as causal_selection,
    combine as combine,
    dispatch as dispatch,
    dispatch_info as dispatch_info,
    first_come_first_served as first_come_first_served,
    is_trainable as is_trainable,
    load_balance_loss as load_balance_loss,
    make_causal as make_causal,
    map_router_routings as map_router_routings,
    map_routers as map_routers,
    predictor_bce as predictor_bce,
    router_bce as router_bce,
    router_z_loss as router_z_loss,
    routers as routers,
    routing_metrics as routing_metrics,
    selection_accuracy as selection_accuracy,
    update_router_state as update_router_state,
)


if TYPE_CHECKING:
    from . import aot as aot, testing as testing


__version__ = _version("mode-jax")


def __getattr__(name: str) -> ModuleType:
    # Imported when they are first used: chex, and what compilers need, are not free.
    if name in ("aot", "testing"):
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
