"""The router: scorer, selector, gate and an optional predictor."""

from collections.abc import Callable
from fractions import Fraction

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from .._capacity import Capacity, exact_fraction, token_capacity
from .._checks import check_instance
from .._dtypes import float32_or_wider
from .._linear import Linear
from .._token_info import TokenInfo
from .._types import ExpertLogits, Hidden, Key, Logits, SlotIndex, TokenMask
from ..parallel import role_field
from ._gates import AbstractGate
from ._record import RouterState, Routing, selected_mask
from ._router_checks import check_assignment, check_follows, check_gradient, check_target
from ._selector import AbstractSelector, AbstractTokenSelector, RoutingInputs


class Router(eqx.Module):
    r"""Turns hidden states into a `Routing`.

    $\text{logits} = W x$ in float32 or wider, whatever the dtype of the activations; the selector
    compares `gate.scores(logits + bias)`; the weights are `gate(logits)`, without the bias.

    **Arguments:**

    - `dim`: features of the hidden states.
    - `num_experts`: experts that compute.
    - `num_noop`: no-op experts, which have no parameters, slots or FLOPs, and compete in the gate.
    - `capacity`: slots of each expert per token of a group.
    - `select`: the selector, which assigns tokens to slots.
    - `gate`: maps logits to weights.
    - `predictor`: maps `[*groups, tokens, dim]` to `[*groups, tokens, experts]`, or `None`.
    - `experts_per_token`: how many experts a token requests on average, to which
        `update_router_state` steers the biases of no-ops; `None` balances all choices alike.
    - `among`: fraction of the group's tokens that come to the router, at least `capacity`; below 1
        where others left before, as in `Recursion`. They are not `valid` in the record.
    - `std`: standard deviation of the scorer's initial weights; by default `dim ** -0.5`, at which
        the logits of features of variance 1 have variance 1. The paper gives none.

    **Raises:** `ValueError` for a selector, gate or predictor that is not an instance of one, and
    for `SelectedSoftmaxGate` with `TokenChoice(1)`, which give the router no gradient.

    >>> import jax, jax.numpy as jnp, mode
    >>> select, gate = mode.ExpertChoice(), mode.SoftmaxGate()
    >>> router = mode.Router(8, 4, capacity=0.25, select=select, gate=gate, key=jax.random.key(0))
    >>> routing = router(jnp.ones((2, 16, 8)), mode.TokenInfo.plain((2, 16)))
    >>> routing.index.shape, routing.logits.shape
    ((2, 4, 4), (2, 16, 4))

    *Source:* arXiv:2404.02258, section 3.4; arXiv:2202.09368, section 3.
    """

    dim: int = eqx.field(static=True)
    capacity: Fraction = eqx.field(static=True)
    among: Fraction = eqx.field(static=True)
    experts_per_token: float | None = eqx.field(static=True)
    num_experts: int = eqx.field(static=True)
    # One role for all: a router is small, and every device has all of it.
    scorer: Callable[..., Logits] = role_field("router")
    select: AbstractSelector = role_field("router")
    gate: AbstractGate = role_field("router")
    predictor: Callable[..., ExpertLogits] | None = role_field("router")
    state: RouterState = role_field("router")

    def __init__(
        self,
        dim: int,
        num_experts: int = 1,
        *,
        num_noop: int = 0,
        capacity: Capacity,
        select: AbstractSelector,
        gate: AbstractGate,
        predictor: Callable[..., ExpertLogits] | None = None,
        experts_per_token: float | None = None,
        among: Capacity = 1,
        std: float | None = None,
        key: PRNGKeyArray,
    ) -> None:
        check_instance("select", select, AbstractSelector, "ExpertChoice()")
        check_instance("gate", gate, AbstractGate, "SigmoidGate()")
        check_gradient(select, gate)
        if isinstance(predictor, type) or not (predictor is None or callable(predictor)):
            raise ValueError(
                "`predictor` must map hidden states to one logit per expert, such as "
                f"`Predictor(dim, key=key)`, or be None, got {predictor!r}."
            )
        std = dim**-0.5 if std is None else std
        self.scorer = Linear(dim, num_experts + num_noop, std=std, key=key)
        self.select = select
        self.gate = gate
        self.predictor = predictor
        deviation = 1.0 if std is None else std * dim**0.5  # of logits of features of variance 1
        self.state = RouterState.initial(
            num_experts, num_experts + num_noop, gate.median_score(deviation)
        )
        self.dim = dim
        self.capacity = exact_fraction("capacity", capacity)
        self.among = exact_fraction("among", among)
        check_target(experts_per_token, num_experts, num_noop, select)
        self.experts_per_token = experts_per_token
        self.num_experts = num_experts

    @property
    def num_noop(self) -> int:
        """No-op experts among the choices."""
        return self.state.bias.shape[-1] - self.num_experts

    @property
    def selected_fraction(self) -> float:
        """Fraction of the tokens that come to the router which an expert selects."""
        return float(self.capacity / self.among)

    def slots(self, num_tokens: int) -> int:
        """Returns the number of slots of each expert in a group of `num_tokens`."""
        own = self.select.max_capacity
        return token_capacity(num_tokens, self.capacity if own is None else own)

    def scores(self, logits: Logits) -> Logits:
        """Returns what the selector compares: the gate's scores of the logits plus the bias."""
        bias = jax.lax.stop_gradient(self.state.bias).astype(logits.dtype)
        return self.gate.scores(logits + jnp.expand_dims(bias, range(logits.ndim - 1)))

    def choices(self, routing: Routing) -> Bool[Array, "*groups tokens choices"]:
        """Returns the choices that each token got: experts that selected it, and no-ops that it
        requested, under a selector that decides token by token."""
        assert isinstance(self.select, AbstractTokenSelector)
        inputs = self.inputs(routing.logits, routing.predictor, routing.valid, 0)
        noops = self.select.requested_mask(inputs)[..., self.num_experts :]
        noops &= routing.valid[..., None]
        return jnp.concatenate([routing.selected, noops], axis=-1)

    def inputs(
        self,
        logits: Logits,
        predictor: ExpertLogits | None,
        valid: TokenMask,
        slots: int,
        free: Int[Array, "*groups experts"] | None = None,
        change: Float[Array, "*groups tokens"] | None = None,
        positions: Int[Array, "*groups tokens"] | None = None,
    ) -> RoutingInputs:
        """Makes the inputs of the selector, whose fields of the same names the arguments are.

        No gradient flows through them.
        """
        threshold = self.state.threshold.astype(logits.dtype)
        scores = self.scores(logits)
        inputs = RoutingInputs(
            scores, logits, predictor, threshold, valid, free, slots, change, positions
        )
        return jax.lax.stop_gradient(inputs)

    def __call__(
        self,
        x: Hidden,
        info: TokenInfo,
        *,
        slots: int | None = None,
        used: Int[Array, "*groups experts"] | None = None,
        change: Float[Array, "*groups tokens"] | None = None,
        key: Key = None,
    ) -> Routing:
        """Routes whole sequences, or tokens that follow earlier ones.

        **Arguments:**

        - `x`: `[*groups, tokens, dim]`.
        - `info`: positions and segments of the tokens, `[*groups, tokens]`.
        - `slots`: slots of each expert in the whole sequence, if `x` is a part of it; by default
            `self.slots(tokens)`. The width of `index` is the smaller of `slots` and `tokens`.
        - `used`: `[*groups, experts]`, slots that earlier tokens of the sequence filled; `None` if
            there are none. Needs `slots`, and a selector that decides token by token.
        - `change`: `[*groups, tokens]`, of `RoutingInputs`.
        - `key`: for selectors that draw random numbers.

        **Raises:** `ValueError` for `used` without `slots` or with a selector that assigns whole
        sequences; for a selector, gate or predictor whose result has the wrong shape.
        """
        with jax.named_scope("mode.Router"):
            check_gradient(self.select, self.gate)  # they may have been replaced since
            if used is not None:
                check_follows(self.select, slots)
            num_tokens = x.shape[-2]
            total = self.slots(num_tokens) if slots is None else slots
            free = None if used is None else total - used
            # Padding becomes zeros: a NaN there would reach the scorer's gradient as 0 * NaN.
            x = jnp.where(info.valid[..., None], x, 0).astype(float32_or_wider(x.dtype))
            logits, predictor = self.scorer(x), self._predict(jax.lax.stop_gradient(x))
            width = min(total, num_tokens)
            inputs = self.inputs(logits, predictor, info.valid, width, free, change, info.positions)
            assignment = self.select(inputs, key=key)
            check_assignment(self.select, assignment, inputs)
            weight = self._weights(logits, assignment.index)
            return Routing(assignment.index, weight, logits, assignment.load, info.valid, predictor)

    def _predict(self, x: Hidden) -> ExpertLogits | None:
        if self.predictor is None:
            return None
        logits, expected = self.predictor(x), (*x.shape[:-1], self.num_experts)
        if logits.shape != expected:  # one logit for several experts would broadcast in the loss
            raise ValueError(
                f"`predictor` must return one logit per expert, {expected}, got {logits.shape}. "
                "Use `Predictor(dim, num_experts, key=key)`."
            )
        return logits

    def _weights(self, logits: Logits, index: SlotIndex) -> Float[Array, "*groups experts slots"]:
        num_tokens = logits.shape[-2]
        weights = self.gate(logits, selected_mask(index, num_tokens))
        expected = (*logits.shape[:-1], self.num_experts)
        if weights.shape != expected:
            raise ValueError(
                f"`gate`, {type(self.gate).__name__}, must return one weight per token and expert, "
                f"{expected}, without the no-ops, got {weights.shape}. Cut the logits to "
                "`selected.shape[-1]` experts."
            )
        # Clipped for the gather only; `where`, not a product, clears the empty slots.
        token = jnp.minimum(index, num_tokens - 1)
        weight = jnp.take_along_axis(jnp.swapaxes(weights, -1, -2), token, axis=-1)
        return jnp.where(index < num_tokens, weight, 0)
