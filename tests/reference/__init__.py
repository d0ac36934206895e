"""The oracle: Mixture-of-Depths and its relatives as slow NumPy loops, written from the papers.

Everything is float64 and handles one group (one sequence) unless it says otherwise: `x` is
`[tokens, dim]` and `valid` is `[tokens]`, False on padding. `over_groups` adds leading axes.

- MoD: Raposo et al. 2024, arXiv:2404.02258.
- MoR: Bae et al. 2025, "Mixture-of-Recursions", arXiv:2507.10524.
- EC: Zhou et al. 2022, "Mixture-of-Experts with Expert Choice Routing", arXiv:2202.09368.
"""

from .assignment import (
    Assignment as Assignment,
    Block as Block,
    Bools as Bools,
    Floats as Floats,
    Gate as Gate,
    Ints as Ints,
    Selector as Selector,
    expert_choice as expert_choice,
    selected_mask as selected_mask,
    simplest_fraction as simplest_fraction,
    strided as strided,
    threshold as threshold,
    token_capacity as token_capacity,
    token_choice as token_choice,
)
from .gates import (
    combine_weights as combine_weights,
    logsumexp as logsumexp,
    router_logits as router_logits,
    selection_scores as selection_scores,
    sigmoid as sigmoid,
    softmax as softmax,
)
from .layers import (
    mixture_of_depths as mixture_of_depths,
    mixture_of_experts as mixture_of_experts,
    mixture_of_queries as mixture_of_queries,
    over_groups as over_groups,
    recursion as recursion,
    token_choice_recursion as token_choice_recursion,
)
from .losses import (
    balancing_bias as balancing_bias,
    coverage as coverage,
    load_balance_loss as load_balance_loss,
    precision_recall as precision_recall,
    router_entropy as router_entropy,
    router_l1_loss as router_l1_loss,
    router_z_loss as router_z_loss,
    running_quantile as running_quantile,
    selection_bce as selection_bce,
)
from .sampling import sampling_distribution as sampling_distribution
from .transformer import (
    AttentionOptions as AttentionOptions,
    BlockParams as BlockParams,
    attention_score as attention_score,
    causal_attention as causal_attention,
    gelu as gelu,
    gelu_feedforward as gelu_feedforward,
    rms_norm as rms_norm,
    rope as rope,
    swiglu_feedforward as swiglu_feedforward,
    transformer_block_delta as transformer_block_delta,
)
