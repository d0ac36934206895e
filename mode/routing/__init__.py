"""Routing: which tokens go to which expert, and with what weight.

Read in the order of the data: the scorer and its gate (`_router`, `_gates`), the selector
(`_selector` and the rules beside it), the record of the decision (`_record`), and the gather and
scatter that move tokens by it (`_dispatch`). `_state_update` follows each training step.
"""

from ._calibrate import calibrate_thresholds as calibrate_thresholds
from ._causal import causal_selection as causal_selection, make_causal as make_causal
from ._dispatch import combine as combine, dispatch as dispatch, dispatch_info as dispatch_info
from ._gates import (
    AbsoluteGate as AbsoluteGate,
    AbstractGate as AbstractGate,
    IdentityGate as IdentityGate,
    SelectedSoftmaxGate as SelectedSoftmaxGate,
    SigmoidGate as SigmoidGate,
    SoftmaxGate as SoftmaxGate,
    StraightThroughGate as StraightThroughGate,
    TanhGate as TanhGate,
)
from ._losses import (
    load_balance_loss as load_balance_loss,
    masked_mean as masked_mean,
    predictor_bce as predictor_bce,
    router_bce as router_bce,
    router_l1_loss as router_l1_loss,
    router_z_loss as router_z_loss,
)
from ._metrics import (
    RoutingMetrics as RoutingMetrics,
    SelectionAccuracy as SelectionAccuracy,
    routing_metrics as routing_metrics,
    selection_accuracy as selection_accuracy,
)
from ._predictor import Predictor as Predictor
from ._record import (
    RouterState as RouterState,
    Routing as Routing,
    Routings as Routings,
    selected_mask as selected_mask,
)
from ._router import Router as Router
from ._schedule import capacity_schedule as capacity_schedule, with_capacity as with_capacity
from ._selector import (
    AbstractSelector as AbstractSelector,
    AbstractTokenSelector as AbstractTokenSelector,
    Assignment as Assignment,
    RoutingInputs as RoutingInputs,
    first_come_first_served as first_come_first_served,
)
from ._sequence_selectors import (
    ExpertChoice as ExpertChoice,
    RandomChoice as RandomChoice,
    Replay as Replay,
    Strided as Strided,
)
from ._state_update import update_router_state as update_router_state
from ._surgery import (
    count_parameters as count_parameters,
    is_trainable as is_trainable,
    map_router_routings as map_router_routings,
    map_routers as map_routers,
    routers as routers,
)
from ._token_selectors import (
    AbstractThreshold as AbstractThreshold,
    LogitThreshold as LogitThreshold,
    PredictorThreshold as PredictorThreshold,
    QuantileThreshold as QuantileThreshold,
    TokenChoice as TokenChoice,
    UpdateThreshold as UpdateThreshold,
)
