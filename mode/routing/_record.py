"""The records of a router: of one decision, and of what it remembers between training steps."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from .._types import Count, ExpertLogits, ExpertMask, Load, Logits, SlotIndex, TokenMask


def selected_mask(index: SlotIndex, num_tokens: int) -> ExpertMask:
    """Turns slots into a mask: true where a token has a slot of an expert."""
    *groups, experts, slots = index.shape

    def row(tokens: Int[Array, " slots"]) -> Bool[Array, " tokens"]:
        return jnp.zeros(num_tokens, bool).at[tokens].set(True, mode="drop")

    rows = jax.vmap(row)(index.reshape(-1, slots)).reshape(*groups, experts, num_tokens)
    return jnp.swapaxes(rows, -1, -2)


class Routing(eqx.Module):
    """The tokens in each expert's slots, their weights, and the router's logits of all tokens.

    Mixture-of-Depths has one expert; integrated MoDE has `choices` = `experts` + no-op experts, the
    no-ops last. It is plain data: it can be recorded, replayed (`Replay`) and saved.

    **Attributes:**

    - `index`: `[*groups, experts, slots]`, the token in each slot, ascending; an empty slot holds
        `tokens`, one past the last token.
    - `weight`: `[*groups, experts, slots]`, the factor of the expert's output, float32 or wider;
        0 where the slot is empty.
    - `logits`: `[*groups, tokens, choices]`, float32 or wider, before any selection bias.
    - `load`: `[*groups, choices]`, requested assignments, before slots run out.
    - `valid`: `[*groups, tokens]`, false for padding.
    - `predictor`: `[*groups, tokens, experts]`, the predictor's logits, or `None`.
    - `group_axes`: how many axes `*groups` had when the router was called. Axes that `jax.vmap` or
        `jax.lax.scan` put before them later are told from them by it.
    - `num_experts`, `num_tokens`, `filled`, `selected`, `num_filled`, `num_noop`, `num_dropped` and
        `num_padding` are computed from these.

    A token that *chose* a no-op, a token that was *dropped* because its expert had no slot left,
    and *padding* are counted apart. Under `TokenChoice(k)`, filled + no-op + dropped + k x padding
    = k x tokens in every group (if every token has k choices whose score is not minus infinity).
    """

    index: SlotIndex
    weight: Float[Array, "*groups experts slots"]
    logits: Logits
    load: Load
    valid: TokenMask
    predictor: ExpertLogits | None
    group_axes: int = eqx.field(static=True, init=False)

    def __post_init__(self) -> None:
        self.group_axes = self.valid.ndim - 1

    @property
    def num_experts(self) -> int:
        """Experts that compute, without the no-ops."""
        return self.index.shape[-2]

    @property
    def num_tokens(self) -> int:
        """Tokens in one group, padding included."""
        return self.logits.shape[-2]

    @property
    def filled(self) -> Bool[Array, "*groups experts slots"]:
        """`[*groups, experts, slots]`: true where a slot holds a token."""
        return self.index < self.num_tokens

    @property
    def selected(self) -> ExpertMask:
        """`[*groups, tokens, experts]`: true where a token has a slot of an expert."""
        return selected_mask(self.index, self.num_tokens)

    @property
    def num_filled(self) -> Count:
        """`[*groups]`: slots that hold a token, over all experts."""
        return jnp.sum(self.filled, axis=(-1, -2), dtype=jnp.int32)

    @property
    def num_noop(self) -> Count:
        """`[*groups]`: assignments to no-op experts that tokens chose."""
        return jnp.sum(self.load[..., self.num_experts :], axis=-1, dtype=jnp.int32)

    @property
    def num_dropped(self) -> Count:
        """`[*groups]`: requested assignments that got no slot."""
        return jnp.sum(self.load, axis=-1, dtype=jnp.int32) - self.num_noop - self.num_filled

    @property
    def num_padding(self) -> Count:
        """`[*groups]`: tokens that are padding."""
        return jnp.sum(~self.valid, axis=-1, dtype=jnp.int32)

    def masked(self, keep: Bool[Array, "*groups"]) -> "Routing":
        """Returns a copy in which groups with a false `keep` are padding and hold nothing."""

        def cleared(values: Array, empty: int = 0) -> Array:
            kept = jnp.expand_dims(keep, range(keep.ndim, values.ndim))
            return jnp.where(kept, values, jnp.asarray(empty, values.dtype))

        index = cleared(self.index, self.num_tokens)
        return eqx.tree_at(lambda r: r.index, jax.tree.map(cleared, self), index)


def check_routing(routing: object) -> None:
    """Refuses what is not one `Routing`, such as the tuple of them that a model returns."""
    if not isinstance(routing, Routing):
        raise ValueError(
            f"`routing` must be one `Routing`, got {type(routing).__name__}. A model returns a "
            "tuple of them, one per router: pass `routings[0]`, or map over the tuple."
        )


# What layers, models and decoding return: one record per router, in the order of the routers.
Routings = tuple[Routing, ...]


class RouterState(eqx.Module):
    """The numbers that a router remembers between training steps.

    Only `update_router_state` changes them: no gradient reaches them, and `is_trainable` keeps them
    from the optimizer. Stacked layers share one state with a leading axis of layers.

    **Attributes:**

    - `bias`: `[choices]`, added to the logits when tokens are selected, never to the weights.
    - `threshold`: `[experts]`, a running estimate of the score that separates the best tokens, a
        fraction `capacity` of all, from the rest.
    - `updates`: `[]`, the number of updates so far.
    """

    bias: Float[Array, "*layers choices"]
    threshold: Float[Array, "*layers experts"]
    updates: Int[Array, "*layers"]

    @staticmethod
    def initial(num_experts: int, num_choices: int, threshold: float = 0.0) -> "RouterState":
        """Returns the state before the first update: no bias, and thresholds to start with."""
        return RouterState(
            jnp.zeros(num_choices, jnp.float32),
            jnp.full(num_experts, threshold, jnp.float32),
            jnp.zeros((), jnp.int32),
        )

    @property
    def layers(self) -> tuple[int, ...]:
        """The leading axes of stacked layers; `()` for a layer by itself."""
        return self.bias.shape[:-1]
