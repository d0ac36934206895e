"""The router: scorer, selector, gate and, for causal inference, an optional predictor."""

from collections.abc import Callable
from fractions import Fraction

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from ._capacity import check_count, token_capacity
from ._gate import AbstractGate, SelectedSoftmax
from ._info import TokenInfo
from ._linear import Linear
from ._precision import float32_or_wider
from ._routing import RouterState, Routing, selected_mask
from ._select import (
    AbstractSelector,
    AbstractTokenwise,
    Request,
    Selection,
    TokenChoice,
    check_instance,
)


# A router that starts nearly undecided. At `dim ** -0.5` the raw gate gives some tokens weights of
# 2 and more before anything is learned.
ROUTER_STD = 0.02


class Predictor(eqx.Module):
    """Guesses from a token alone whether top-k will take it: one logit per expert.

    It reads hidden states through a stop-gradient and decides membership only; the router's weight
    still gates. So the model it watches is exactly the model without it.

    **Arguments:**

    - `dim`: features of the hidden states.
    - `num_experts`: experts of the router it belongs to.
    - `hidden`: features inside; by default half of `dim`.

    *Source:* the "second router" of arXiv:2404.02258, section 3.5, which gives no width.
    """

    up: Linear
    down: Linear

    def __init__(
        self, dim: int, num_experts: int = 1, hidden: int | None = None, *, key: PRNGKeyArray
    ):
        hidden = max(1, dim // 2) if hidden is None else hidden
        up_key, down_key = jax.random.split(key)
        self.up = Linear(dim, hidden, key=up_key)
        self.down = Linear(hidden, num_experts, key=down_key)

    def __call__(
        self, x: Float[Array, "*groups tokens dim"]
    ) -> Float[Array, "*groups tokens experts"]:
        return self.down(jax.nn.silu(self.up(x)))


class Router(eqx.Module):
    """From hidden states to a `Routing`: the one router of every layer in this library.

    $\\text{logits} = W x$ in float32 or wider, whatever the activations are; the selector compares
    `gate.scores(logits + bias)`; the weights are `gate(logits)`, without the bias.

    **Arguments:**

    - `dim`: features of the hidden states.
    - `num_experts`: experts that compute.
    - `num_noop`: no-op experts, which have no parameters, slots or FLOPs, and compete in the gate.
    - `fraction`: slots of each expert as a share of the tokens of a group.
    - `select`: the selector, which decides who takes part.
    - `gate`: from logits to weights.
    - `predictor`: maps `[*groups, tokens, dim]` to `[*groups, tokens, experts]`, or `None`.
    - `position_bins`: running quantiles, each for some positions, that the causal rule `ByQuantile`
        compares with: how many. 1 is one for all; see `RouterState`.
    - `std`: standard deviation of the scorer's initial weights; the paper gives none.

    **Raises:** `ValueError` for a selector or gate that is none, such as its class; for the two
    together where they would leave the router without a gradient; for `position_bins` that is no
    integer of at least 1.
    """

    scorer: Callable[[Float[Array, "*groups tokens dim"]], Float[Array, "*groups tokens choices"]]
    select: AbstractSelector
    gate: AbstractGate
    predictor: Callable[..., Float[Array, "*groups tokens experts"]] | None
    state: RouterState
    dim: int = eqx.field(static=True)
    fraction: Fraction = eqx.field(static=True)
    num_experts: int = eqx.field(static=True)

    def __init__(
        self,
        dim: int,
        num_experts: int = 1,
        *,
        num_noop: int = 0,
        fraction: Fraction,
        select: AbstractSelector,
        gate: AbstractGate,
        predictor: Callable[..., Float[Array, "*groups tokens experts"]] | None = None,
        position_bins: int = 1,
        std: float = ROUTER_STD,
        key: PRNGKeyArray,
    ):
        check_instance("select", select, AbstractSelector, "ExpertChoice()")
        check_instance("gate", gate, AbstractGate, "Sigmoid()")
        _check_gradient(select, gate)
        if isinstance(predictor, type) or not (predictor is None or callable(predictor)):
            raise ValueError(
                "`predictor` must map hidden states to one logit per expert, such as "
                f"`Predictor(dim, key=key)`, or be None, got {predictor!r}."
            )
        self.scorer = Linear(dim, num_experts + num_noop, std=std, key=key)
        self.select = select
        self.gate = gate
        self.predictor = predictor
        position_bins = check_count("position_bins", position_bins, 1)
        self.state = RouterState.initial(num_experts, num_experts + num_noop, position_bins)
        self.dim = dim
        self.fraction = fraction
        self.num_experts = num_experts

    @property
    def num_noop(self) -> int:
        """No-op experts among the choices."""
        return self.state.bias.shape[-1] - self.num_experts

    def scores(
        self, logits: Float[Array, "*groups tokens choices"]
    ) -> Float[Array, "*groups tokens choices"]:
        """What the selector compares: the gate's scores of the logits with the bias added."""
        bias = jax.lax.stop_gradient(self.state.bias).astype(logits.dtype)
        return self.gate.scores(logits + jnp.expand_dims(bias, range(logits.ndim - 1)))

    def slots(self, num_tokens: int) -> int:
        """Slots of each expert in a group of `num_tokens`."""
        return token_capacity(num_tokens, self.select.share(self.fraction))

    def __call__(
        self,
        x: Float[Array, "*groups tokens dim"],
        info: TokenInfo,
        *,
        slots: int | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Routing:
        """`x`: `[*groups, tokens, dim]`. `slots` of each expert, where they are not those of a
        group of this length: `x` is then the beginning of a longer one."""
        with jax.named_scope("mode.Router"):
            _check_gradient(self.select, self.gate)  # the parts may have been swapped since
            num_tokens = x.shape[-2]
            x = _wide(x, info)
            detached = jax.lax.stop_gradient(x)
            logits = self.scorer(x)
            predictor = self._predict(detached)
            slots = self.slots(num_tokens) if slots is None else min(slots, num_tokens)
            request = self._request(logits, predictor, info, slots)
            chosen = self.select(request, key=key)
            _check_selection(self.select, chosen, request)
            weights = self.gate(logits, selected_mask(chosen.index, num_tokens))
            if weights.shape != (*x.shape[:-1], self.num_experts):
                raise ValueError(
                    f"`gate`, {type(self.gate).__name__}, must return one weight per token and "
                    f"expert, {(*x.shape[:-1], self.num_experts)}, without the no-ops, got "
                    f"{weights.shape}. Cut the logits to `selected.shape[-1]` experts."
                )
            # Clipped for the gather alone; `where`, not a product, clears the empty slots.
            seat = jnp.minimum(chosen.index, num_tokens - 1)
            weight = jnp.take_along_axis(jnp.swapaxes(weights, -1, -2), seat, axis=-1)
            return Routing(
                index=chosen.index,
                weight=jnp.where(chosen.index < num_tokens, weight, 0),
                logits=logits,
                detached_logits=self.scorer(detached),
                load=chosen.load,
                valid=info.valid,
                predictor=predictor,
                positions=info.positions if self.state.position_bins > 1 else None,
            )

    def admit(
        self,
        x: Float[Array, "batch new dim"],
        info: TokenInfo,
        earlier: Int[Array, "batch experts"],
        slots: int,
    ) -> "Admission":
        """What `__call__` decides for the tokens that follow others, of which each expert took
        `earlier`. The selector is an `AbstractTokenwise`."""
        assert isinstance(self.select, AbstractTokenwise)
        with jax.named_scope("mode.Router"):
            x = _wide(x, info)
            logits = self.scorer(x)
            request = self._request(logits, self._predict(x), info, slots)
            asked = self.select.asks(request)[..., : self.num_experts] & info.valid[..., None]
            place = earlier[:, None] + jnp.cumsum(asked, axis=1, dtype=jnp.int32)
            taken = asked & (place <= slots)
            return Admission(taken, self.gate(logits, taken), asked & ~taken)

    def _predict(
        self, detached: Float[Array, "*groups tokens dim"]
    ) -> Float[Array, "*groups tokens experts"] | None:
        predictor = None if self.predictor is None else self.predictor(detached)
        _check_predictor(predictor, (*detached.shape[:-1], self.num_experts))
        return predictor

    def _request(
        self,
        logits: Float[Array, "*groups tokens choices"],
        predictor: Float[Array, "*groups tokens experts"] | None,
        info: TokenInfo,
        slots: int,
    ) -> Request:
        return Request(
            scores=jax.lax.stop_gradient(self.scores(logits)),
            logits=jax.lax.stop_gradient(logits),
            predictor=jax.lax.stop_gradient(predictor),
            threshold=jax.lax.stop_gradient(
                self.state.threshold_at(info.positions).astype(logits.dtype)
            ),
            valid=info.valid,
            slots=slots,
        )


class Admission(eqx.Module):
    """Who gets in, of tokens that follow others.

    **Attributes:**

    - `taken`: `[batch, new, experts]`.
    - `weight`: `[batch, new, experts]`, what multiplies an expert's output; float32 or wider.
    - `refused`: `[batch, new, experts]`, who asked for an expert that was full.
    """

    taken: Bool[Array, "batch new experts"]
    weight: Float[Array, "batch new experts"]
    refused: Bool[Array, "batch new experts"]


def _wide(
    x: Float[Array, "*groups tokens dim"], info: TokenInfo
) -> Float[Array, "*groups tokens dim"]:
    # Zeros for padding: a NaN there would reach the scorer's gradient as 0 * NaN.
    return jnp.where(info.valid[..., None], x, 0).astype(float32_or_wider(x.dtype))


def _check_gradient(select: AbstractSelector, gate: AbstractGate) -> None:
    if isinstance(gate, SelectedSoftmax) and isinstance(select, TokenChoice) and select.k == 1:
        raise ValueError(
            "`gate=SelectedSoftmax()` with `select=TokenChoice(1)` gives every weight the value 1 "
            "and the router no gradient. Use `gate=Softmax()`, or `TokenChoice(k)` with k of at "
            "least 2."
        )


def _check_selection(select: AbstractSelector, chosen: object, request: Request) -> None:
    groups = request.valid.shape[:-1]
    rows = (*groups, request.num_experts)
    load = (*groups, request.scores.shape[-1])
    if not isinstance(chosen, Selection):
        raise ValueError(
            f"`select`, {type(select).__name__}, must return a `Selection(index, load)`, got "
            f"{type(chosen).__name__}."
        )
    if (chosen.index.shape[:-1], chosen.load.shape) != (rows, load):
        raise ValueError(
            f"`select`, {type(select).__name__}, must return an index of shape [*groups, experts, "
            f"slots] = {(*rows, request.slots)} and a load of shape [*groups, choices] = {load}, "
            f"got {chosen.index.shape} and {chosen.load.shape}. `first_come` makes such an index, "
            "`request.without_noop` such a load."
        )


def _check_predictor(
    logits: Float[Array, "*groups tokens experts"] | None, expected: tuple[int, ...]
) -> None:
    # One logit for several experts would broadcast in the loss and pass unnoticed.
    if logits is not None and logits.shape != expected:
        raise ValueError(
            f"`predictor` must return one logit per expert, {expected}, got {logits.shape}. Use "
            "`Predictor(dim, num_experts, key=key)`."
        )
