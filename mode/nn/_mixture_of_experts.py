"""Mixture-of-Experts: many feed-forwards, of which each token uses few."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from .._capacity import Capacity, exact_fraction
from .._checks import check_count, check_hidden
from .._token_info import TokenInfo
from .._types import ExpertLogits, Hidden, Key
from ..parallel import role_field, to_experts, to_groups
from ..routing import (
    AbstractGate,
    AbstractSelector,
    ExpertChoice,
    Router,
    Routing,
    SelectedSoftmaxGate,
    SoftmaxGate,
    TokenChoice,
    combine,
    dispatch,
)
from ._cache import Cache
from ._contracts import AbstractBlock, BlockResult
from ._experts import Expert, MakeExpert, check_make_expert, run_experts, run_experts_bucketed
from ._free_experts import FreeExperts


class MixtureOfExperts(AbstractBlock):
    r"""Routes tokens to experts: $\sum_e w_{ie} f_e(x_i)$ over the experts that selected token $i$,
    and 0 for a token that none selected.

    **Arguments:**

    - `make_expert`: builds one expert from a key. An expert maps one vector, `[dim]`, to one of its
        size, as `eqx.nn.MLP` and `GELUFeedForward` do, and gets a key where it has a parameter
        `key`. All experts are one stacked module.
    - `dim`: features of the hidden states.
    - `num_experts`: experts that compute.
    - `capacity_factor`: slots per token, over all experts. Each has
        `token_capacity(tokens, capacity_factor / num_experts)`, so a factor of 1 costs what one
        expert on every token costs, whatever the number of experts, no-ops or `k`.
    - `num_noop`: no-op experts. They have no parameters, slots or FLOPs, and compete in the gate.
        Under `ExpertChoice` they only move probability; under `TokenChoice` choosing one uses one
        of the token's `k` choices.
    - `num_copy`, `num_constant`: more choices that cost next to nothing, behind the no-ops: a copy
        expert returns the token, a constant one a mix of it and a learned vector. They need
        `TokenChoice` and a gate over all choices, such as `SoftmaxGate()`.
    - `experts_per_token`: how many of its `k` choices a token spends on real experts, on average:
        `update_router_state` steers the biases of all others so that it is this number. By default
        all choices are balanced alike.
    - `num_shared`: further experts that see every token with weight 1.
    - `select`: `ExpertChoice()`, which sees the future in a decoder (`make_causal` replaces it), or
        `TokenChoice(k)`, which does not.
    - `gate`: from logits to weights; by default the softmax over all choices, not renormalised.
    - `predictor`: as `MixtureOfDepths` takes it, with `num_experts` logits a token.
    - `router_std`: standard deviation of the router's initial weights.

    `router.state.bias` is the selection bias of loss-free balancing (arXiv:2408.15664): it changes
    which tokens are selected, never the weights, and only `update_router_state` moves it.

    **Raises:** `ValueError` for a number out of range or a `make_expert` that does not build maps
    of `[dim]` to `[dim]` from a key; at the call, for a capacity factor that leaves an expert less
    than one whole slot: `tokens * capacity_factor / num_experts` must be at least 1.

    >>> import equinox as eqx, jax, jax.numpy as jnp, mode
    >>> make_expert = lambda key: eqx.nn.MLP(32, 32, 128, 1, jax.nn.gelu, key=key)
    >>> experts = mode.MixtureOfExperts(
    ...     make_expert, 32, num_experts=8, capacity_factor=2.0, key=jax.random.key(0)
    ... )
    >>> hidden, (routing,) = mode.Residual(experts)(jnp.ones((4, 64, 32)))
    >>> routing.index.shape
    (4, 8, 16)

    *Source:* arXiv:2202.09368, section 3 ($k = n c / e$); no-op experts, arXiv:2404.02258, section
    4.3. *Relative to the paper:* the expert-choice paper pools the tokens of the whole batch; here
    they compete inside their group only, so that no sequence affects another.
    """

    router: Router
    free: FreeExperts | None
    shared: Expert | None
    experts: Expert = role_field("experts")

    def __init__(
        self,
        make_expert: MakeExpert,
        dim: int,
        num_experts: int,
        *,
        capacity_factor: Capacity = 1.0,
        num_noop: int = 0,
        num_copy: int = 0,
        num_constant: int = 0,
        experts_per_token: float | None = None,
        num_shared: int = 0,
        select: AbstractSelector = ExpertChoice(),
        gate: AbstractGate = SoftmaxGate(),
        predictor: Callable[..., ExpertLogits] | None = None,
        router_std: float = 0.02,  # nearly undecided: a softmax is sure of itself soon enough
        key: PRNGKeyArray,
    ):
        num_experts = check_count("num_experts", num_experts, 1)
        num_noop = check_count("num_noop", num_noop, 0)
        num_shared = check_count("num_shared", num_shared, 0)
        num_free = check_count("num_copy", num_copy, 0)
        num_free += check_count("num_constant", num_constant, 0)
        check_make_expert(make_expert, dim)
        router_key, expert_key, shared_key = jax.random.split(key, 3)
        free_key = jax.random.fold_in(key, 3)
        make_experts = eqx.filter_vmap(make_expert)
        self.router = Router(
            dim,
            num_experts,
            num_noop=num_noop + num_free,
            experts_per_token=experts_per_token,
            capacity=exact_fraction("capacity_factor", capacity_factor) / num_experts,
            select=select,
            gate=gate,
            predictor=predictor,
            std=router_std,
            key=router_key,
        )
        self.free = FreeExperts(dim, num_copy, num_constant, key=free_key) if num_free else None
        self._check_free()
        self.experts = make_experts(jax.random.split(expert_key, num_experts))
        self.shared = make_experts(jax.random.split(shared_key, num_shared)) if num_shared else None

    def extend(self, x: Hidden, info: TokenInfo, cache: Cache, *, key: Key = None) -> BlockResult:
        """Returns the update and `(routing,)`. See `AbstractBlock`.

        The entries say which experts selected a token: so many of their slots are used. After
        earlier tokens, each expert computes about the tokens that it selected.
        """
        check_hidden(x, self.router.dim)
        total = x.shape[-2] if cache.max_tokens is None else cache.max_tokens
        self._check_slots(total)
        self._check_free()  # the selector and the gate may have been swapped since
        keys = (None, None, None) if key is None else jax.random.split(key, 3)
        with jax.named_scope("mode.MixtureOfExperts"):
            slots, used = self.router.slots(total), None
            if cache.info is not None:
                earlier = cache.entries & cache.info.valid[..., None]
                used = jnp.sum(earlier, axis=-2, dtype=jnp.int32)
            routing = self.router(x, info, slots=slots, used=used, key=keys[0])
            inputs = dispatch(x, routing)
            if cache.is_empty:
                updates = to_groups(run_experts(self.experts, to_experts(inputs), keys[1]))
            else:
                capacity = self.router.capacity
                updates = run_experts_bucketed(self.experts, inputs, routing.filled, capacity)
            # Adding -0.0 changes no number; adding 0.0 would change a skipped token's -0.0.
            update = combine(updates, routing, onto=jnp.full_like(x, -0.0))
            # Zeros for padding: a NaN there would reach the gradients of parameters.
            real = jnp.where(info.valid[..., None], x, 0)
            if self.free is not None:
                update += self.free(real, self._free_weights(routing))
            if self.shared is not None:
                update += run_experts(self.shared, real, keys[2], same_inputs=True).sum(0)
            return update, (routing,), routing.selected

    def _free_weights(self, routing: Routing) -> Float[Array, "*groups tokens free"]:
        assert self.free is not None
        choices = self.router.choices(routing)
        weights = jnp.where(choices, self.router.gate(routing.logits, choices), 0)
        return weights[..., weights.shape[-1] - self.free.count :]

    def _check_free(self) -> None:
        if self.free is None:
            return
        select, gate = self.router.select, self.router.gate
        if not isinstance(select, TokenChoice):
            raise ValueError(
                "`select` must be a `TokenChoice` with `num_copy` or `num_constant`, which a token "
                f"has to choose, got {select}."
            )
        if isinstance(gate, SelectedSoftmaxGate):
            raise ValueError(
                "`gate` must give weights over all choices with `num_copy` or `num_constant`, got "
                f"{gate}, which knows the experts alone. Use `SoftmaxGate()`."
            )

    def _check_slots(self, num_tokens: int) -> None:
        slots, num_experts = num_tokens * self.router.capacity, self.router.num_experts
        if slots < 1 and self.router.select.max_capacity is None:
            factor = float(self.router.capacity * num_experts)
            raise ValueError(
                "`capacity_factor` must leave every expert at least one whole slot: tokens * "
                f"capacity_factor / num_experts >= 1, got {num_tokens} * {factor:g} / "
                f"{num_experts} = {float(slots):g}. Use a capacity factor of at least "
                f"{num_experts / num_tokens:g}, fewer experts or longer groups."
            )
