"""Mixture-of-Experts: many feed-forwards, of which each token uses few."""

from collections.abc import Callable
from fractions import Fraction

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from ._adapt import map_rows, takes_key
from ._block import AbstractBlock, Routings, can_be_called, check_kept_shape, type_name
from ._cache import Past
from ._capacity import Share, check_count, exact_fraction
from ._demand import on_demand, slot_counts
from ._dispatch import combine, dispatch
from ._gate import AbstractGate, Softmax
from ._info import TokenInfo, check_hidden, resolve_info
from ._precision import cast_parameters
from ._router import ROUTER_STD, Admission, Predictor, Router
from ._routing import Routing
from ._select import AbstractSelector, ExpertChoice
from ._sharding import to_experts, to_groups


Expert = Callable[[Float[Array, " dim"]], Float[Array, " dim"]]
MakeExpert = Callable[[PRNGKeyArray], Expert]


class Membership(eqx.Module):
    """What tokens leave behind in a `MixtureOfExperts`: who took them, and who was too full to.

    It says how full each expert is, and afterwards what was computed.
    """

    taken: Bool[Array, "*layers batch tokens experts"]
    refused: Bool[Array, "*layers batch tokens experts"]


class MixtureOfExperts(AbstractBlock):
    """A block whose tokens are spread over experts: $\\sum_e w_{ie} f_e(x_i)$ over those that
    took token $i$, and 0 for a token that none took.

    **Arguments:**

    - `make_expert`: builds one expert from a key. An expert maps one vector `[dim]` to one of the
        same size; `eqx.nn.MLP`, `SwiGLU` and `GELU` do. It is given a key where it has a parameter
        `key`, as one with dropout has. All experts are one stacked module.
    - `dim`: features of the hidden states.
    - `num_experts`: experts that compute.
    - `capacity_factor`: slots per token, over all experts. Each has
        `token_capacity(tokens, capacity_factor / num_experts)`, so a factor of 1 costs what one
        expert on every token costs, whatever the number of experts, no-ops or `k`.
    - `num_noop`: no-op experts. They have no parameters, slots or FLOPs, and their probability
        competes in the softmax. Under `ExpertChoice` they only move probability; under
        `TokenChoice` choosing one takes one of the token's `k` places.
    - `num_shared`: further experts that see every token with weight 1.
    - `select`: `ExpertChoice()`, which sees the future in a decoder (`causal` replaces it; its own
        docstring says what that costs), or `TokenChoice(k)`, which does not.
    - `gate`: from logits to weights; by default the softmax over all choices, not renormalised.
    - `predictor`: `Predictor(dim, num_experts, key=key)` for causal inference, or `None`.
    - `position_bins`: running quantiles, each for some positions, that the causal rule `ByQuantile`
        compares with: how many. 1 is one for all; see `RouterState`.
    - `router_std`: standard deviation of the router's initial weights.

    `router.state.bias` is the selection bias of loss-free balancing (arXiv:2408.15664): it changes
    who is chosen, never the weights, and only `update_state` moves it.

    **Raises:** `ValueError` for `num_experts` or `position_bins` below 1, a negative `num_noop` or
    `num_shared`, a `make_expert` that does not build maps of `[dim]` to `[dim]` from a key, or a
    capacity factor that is not a finite positive number; at the call, for one that leaves an
    expert less than one whole slot: `tokens * capacity_factor / num_experts` must be at least 1.

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
    experts: Expert
    shared: Expert | None

    def __init__(
        self,
        make_expert: MakeExpert,
        dim: int,
        num_experts: int,
        *,
        capacity_factor: Share = 1.0,
        num_noop: int = 0,
        num_shared: int = 0,
        select: AbstractSelector = ExpertChoice(),
        gate: AbstractGate = Softmax(),
        predictor: Predictor | None = None,
        position_bins: int = 1,
        router_std: float = ROUTER_STD,
        key: PRNGKeyArray,
    ):
        num_experts = check_count("num_experts", num_experts, 1)
        num_noop = check_count("num_noop", num_noop, 0)
        num_shared = check_count("num_shared", num_shared, 0)
        _check_make_expert(make_expert, dim)
        router_key, expert_key, shared_key = jax.random.split(key, 3)
        make_experts = eqx.filter_vmap(make_expert)
        self.router = Router(
            dim,
            num_experts,
            num_noop=num_noop,
            fraction=exact_fraction("capacity_factor", capacity_factor) / num_experts,
            select=select,
            gate=gate,
            predictor=predictor,
            position_bins=position_bins,
            std=router_std,
            key=router_key,
        )
        self.experts = make_experts(jax.random.split(expert_key, num_experts))
        self.shared = make_experts(jax.random.split(shared_key, num_shared)) if num_shared else None

    def __call__(
        self,
        x: Float[Array, "*groups tokens dim"],
        info: TokenInfo | None = None,
        *,
        key: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, "*groups tokens dim"], Routings]:
        """`x`: `[*groups, tokens, dim]`. Returns the update and `(routing,)`."""
        check_hidden(x, self.router.dim)
        info = resolve_info(x, info)
        self._check_slots(x.shape[-2])
        router_key, expert_key, shared_key = (
            (None, None, None) if key is None else jax.random.split(key, 3)
        )
        with jax.named_scope("mode.MixtureOfExperts"):
            routing = self.router(x, info, key=router_key)
            return self._compute(x, info, routing, expert_key, shared_key), (routing,)

    def _compute(
        self,
        x: Float[Array, "*groups tokens dim"],
        info: TokenInfo,
        routing: Routing,
        expert_key: PRNGKeyArray | None = None,
        shared_key: PRNGKeyArray | None = None,
    ) -> Float[Array, "*groups tokens dim"]:
        """What the experts make of the tokens they took, and the shared ones of all."""
        slots = to_experts(dispatch(x, routing))
        rows = slots.reshape(slots.shape[0], -1, slots.shape[-1])
        updates = to_groups(_apply(self.experts, rows, 0, expert_key).reshape(slots.shape))
        # Adding -0.0 changes no number; adding 0.0 would change a skipped token's -0.0.
        update = combine(updates, routing, onto=jnp.full_like(x, -0.0))
        return self._with_shared(update, x, info, shared_key)

    def _with_shared(
        self,
        update: Float[Array, "*groups tokens dim"],
        x: Float[Array, "*groups tokens dim"],
        info: TokenInfo,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "*groups tokens dim"]:
        if self.shared is None:
            return update
        # As in the router: a NaN in the padding would reach the gradients of parameters.
        rows = jnp.where(info.valid[..., None], x, 0).reshape(-1, x.shape[-1])
        return update + _apply(self.shared, rows, None, key).sum(0).reshape(x.shape)

    def extend(
        self, x: Float[Array, "batch new dim"], info: TokenInfo, past: Past
    ) -> tuple[Float[Array, "batch new dim"], PyTree]:
        """New tokens: see `Past`. Leaves behind who took them, `Membership`.

        Of tokens that follow others, each expert computes those that it takes, in a static number
        of slots near their number, and reads no weights where there are none.
        """
        slots = self.router.slots(past.slots)
        with jax.named_scope("mode.MixtureOfExperts"):
            if past.info is None:
                routing = self.router(x, info, slots=slots)
                nobody = jnp.zeros((x.shape[0], self.router.num_experts), jnp.int32)
                refused = self.router.admit(x, info, nobody, slots).refused
                left = Membership(routing.selected, refused)
                return self._compute(x, info, routing), left
            earlier = past.left.taken & past.info.valid[..., None]
            held = jnp.sum(earlier, axis=1, dtype=jnp.int32)
            admission = self.router.admit(x, info, held, slots)
            update = self._next(x, admission)
            return self._with_shared(update, x, info), Membership(
                admission.taken, admission.refused
            )

    def _next(
        self, x: Float[Array, "batch new dim"], admission: Admission
    ) -> Float[Array, "batch new dim"]:
        rows = x.reshape(-1, x.shape[-1])
        taken, weight = (
            part.reshape(-1, self.router.num_experts)
            for part in (admission.taken, admission.weight)
        )
        counts = slot_counts(rows.shape[0], min(self.router.fraction, Fraction(1)))
        arrays, rest = eqx.partition(self.experts, eqx.is_array)

        def add(e: Int[Array, ""], total: Float[Array, "rows dim"]) -> Float[Array, "rows dim"]:
            def run(index: Int[Array, " slots"] | None) -> Float[Array, "slots dim"]:
                # Picked inside the branch: where nobody asks, no weights are read.
                expert = eqx.combine(jax.tree.map(lambda leaf: leaf[e], arrays), rest)
                some = rows if index is None else rows[index]
                return map_rows(cast_parameters(expert, x.dtype), some, None)

            update = on_demand(run, taken[:, e], counts).astype(weight.dtype)
            return total + jnp.where(taken[:, e, None], weight[:, e, None] * update, 0)

        total = jnp.full(rows.shape, -0.0, weight.dtype)
        total = jax.lax.fori_loop(0, self.router.num_experts, add, total)
        return total.reshape(x.shape).astype(x.dtype)

    def _check_slots(self, num_tokens: int) -> None:
        slots = num_tokens * self.router.fraction
        if slots < 1 and self.router.select.share(self.router.fraction) == self.router.fraction:
            factor = self.router.fraction * self.router.num_experts
            raise ValueError(
                "`capacity_factor` must leave every expert at least one whole slot: tokens * "
                f"capacity_factor / num_experts >= 1, got {num_tokens} * {float(factor):g} / "
                f"{self.router.num_experts} = {float(slots):g}. Use a capacity factor of at least "
                f"{float(Fraction(self.router.num_experts, num_tokens)):g}, fewer experts or "
                "longer groups."
            )


def _check_make_expert(make_expert: MakeExpert, dim: int) -> None:
    """Build one expert and run it on one vector, both without computing anything."""
    remedy = (
        f"Pass a function of a key, such as `lambda key: SwiGLU({dim}, key=key)`, whose result "
        f"maps one vector, [{dim}], to one of the same size."
    )
    if not can_be_called(make_expert, None):
        raise ValueError(
            "`make_expert` must build one expert from a key, its only argument, got "
            f"{type_name(make_expert)}, which cannot be called so. {remedy}"
        )
    if any(map(eqx.is_array, jax.tree.leaves(make_expert))):
        raise ValueError(
            "`make_expert` must build one expert from a key, got an expert that is already built, "
            f"{type_name(make_expert)}. {remedy}"
        )
    expert = eqx.filter_eval_shape(make_expert, jax.random.key(0))
    if not callable(expert):
        raise ValueError(
            f"`make_expert` must return a function of one vector, got {type_name(expert)}. {remedy}"
        )
    vector = jax.ShapeDtypeStruct((dim,), jnp.float32)
    options = {"key": jax.random.key(0)} if takes_key(expert) else {}
    try:
        update = eqx.filter_eval_shape(lambda expert, x: expert(x, **options), expert, vector)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"`make_expert` must build experts of vectors of `dim={dim}` features, but its expert, "
            f"{type_name(expert)}, did not take one: {error}. {remedy}"
        ) from error
    check_kept_shape("make_expert", getattr(update, "shape", ()), vector.shape)


def _apply(
    experts: Expert,
    rows: Float[Array, "*experts tokens dim"],
    rows_axis: int | None,
    key: PRNGKeyArray | None,
) -> Float[Array, "experts tokens dim"]:
    """Every expert on its own rows, or (`rows_axis` None) all of them on the same ones."""
    experts = cast_parameters(experts, rows.dtype)
    counts = (leaf.shape[0] for leaf in jax.tree.leaves(experts) if eqx.is_array(leaf))
    count = rows.shape[0] if rows_axis == 0 else next(counts, 1)
    keys = None if key is None else jax.random.split(key, count)
    run = eqx.filter_vmap(
        map_rows, in_axes=(eqx.if_array(0), rows_axis, None if keys is None else 0)
    )
    return run(experts, rows, keys)
