"""Mixture-of-Depths, expert-choice Mixture-of-Experts and MoDE, as Equinox layers.

- **Layers**: `Residual`, `MixtureOfDepths`. **Blocks** for them: `TransformerBlock`, `Attention`,
  `MixtureOfExperts`, `PositionWise`, and `Delta` for modules with their own skip connection.
  MoDE by name: `staged_mode`, `integrated_mode`, `reduced_capacity_moe`.
- **Routing**: `Router` makes a `Routing`, the record of who was taken. Its parts are a selector
  (`ExpertChoice`, `TokenChoice`, `RandomChoice`, `Strided`, `Threshold`, `Replay`), a gate (`Raw`,
  `Sigmoid`, `Tanh`, `Softmax`, `SelectedSoftmax`) and a `Predictor`. `dispatch` and `combine` move
  tokens by it; `token_capacity` says how many.
- **Models**: `Transformer`, `mod_decoder`, `every_other`; `TokenInfo` for packed documents.
- **Training**: `trainable`, `update_state`, the losses `router_z_loss`, `load_balance_loss`,
  `router_bce`, `predictor_bce`; `routing_metrics`, `agreement`; `count_flops`.
- **Causal**: `causal` and its rules, `ByQuantile`, `ByPredictor`, `ByLogit`.
- **Decoding**: `prefill`, `step`, `sample`, `generate` with a `Sampler`; `unrolled`, `entered`;
  `Past` says how a block of one's own joins.
- **Surgery**: `routers`, `map_routers`, `for_each_router`. **Checks**: `mode.testing`.
"""

from importlib.metadata import version as _version

from . import testing as testing
from ._adapt import Delta as Delta, PositionWise as PositionWise
from ._attention import (
    causal_attention as causal_attention,
    plain_attention as plain_attention,
    rope as rope,
)
from ._block import (
    AbstractBlock as AbstractBlock,
    AbstractLayer as AbstractLayer,
    Residual as Residual,
)
from ._cache import Added as Added, Cache as Cache, Decoding as Decoding, Past as Past
from ._capacity import token_capacity as token_capacity
from ._causal import causal as causal, causal_membership as causal_membership
from ._decode import (
    prefill as prefill,
    step as step,
    unrolled as unrolled,
)
from ._decoder import (
    Stack as Stack,
    Transformer as Transformer,
    every_other as every_other,
    mod_decoder as mod_decoder,
)
from ._depth import MixtureOfDepths as MixtureOfDepths
from ._dispatch import combine as combine, dispatch as dispatch, dispatch_info as dispatch_info
from ._entered import Entered as Entered, entered as entered
from ._experts import MixtureOfExperts as MixtureOfExperts
from ._flops import Flops as Flops, count_flops as count_flops, repeats_of as repeats_of
from ._gate import (
    AbstractGate as AbstractGate,
    Raw as Raw,
    SelectedSoftmax as SelectedSoftmax,
    Sigmoid as Sigmoid,
    Softmax as Softmax,
    Tanh as Tanh,
)
from ._generate import Generation as Generation, generate as generate, sample as sample
from ._info import TokenInfo as TokenInfo
from ._linear import GELU as GELU, Linear as Linear, RMSNorm as RMSNorm, SwiGLU as SwiGLU
from ._losses import (
    load_balance_loss as load_balance_loss,
    predictor_bce as predictor_bce,
    router_bce as router_bce,
    router_z_loss as router_z_loss,
)
from ._metrics import (
    Agreement as Agreement,
    RoutingMetrics as RoutingMetrics,
    agreement as agreement,
    routing_metrics as routing_metrics,
)
from ._mode import (
    integrated_mode as integrated_mode,
    reduced_capacity_moe as reduced_capacity_moe,
    staged_mode as staged_mode,
)
from ._router import Predictor as Predictor, Router as Router
from ._routing import RouterState as RouterState, Routing as Routing
from ._sample import Sampler as Sampler
from ._select import (
    AbstractSelector as AbstractSelector,
    AbstractTokenwise as AbstractTokenwise,
    ExpertChoice as ExpertChoice,
    RandomChoice as RandomChoice,
    Replay as Replay,
    Request as Request,
    Selection as Selection,
    Strided as Strided,
    TokenChoice as TokenChoice,
    first_come as first_come,
)
from ._sharding import (
    BATCH as BATCH,
    DECODING as DECODING,
    PARAMETERS as PARAMETERS,
    Rule as Rule,
    placement as placement,
)
from ._state import (
    for_each_router as for_each_router,
    map_routers as map_routers,
    routers as routers,
    trainable as trainable,
    update_state as update_state,
)
from ._threshold import (
    AbstractRule as AbstractRule,
    ByLogit as ByLogit,
    ByPredictor as ByPredictor,
    ByQuantile as ByQuantile,
    Threshold as Threshold,
)
from ._transformer import Attention as Attention, TransformerBlock as TransformerBlock


__version__ = _version("mode-jax")
