"""The record of one routing decision. Everything else in the library reads or makes one."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def selected_mask(
    index: Int[Array, "*groups experts capacity"], num_tokens: int
) -> Bool[Array, "*groups tokens experts"]:
    """`[*groups, tokens, experts]`: true where an expert gave the token a slot."""
    *groups, experts, capacity = index.shape

    def row(slots: Int[Array, " capacity"]) -> Bool[Array, " tokens"]:
        return jnp.zeros(num_tokens, bool).at[slots].set(True, mode="drop")

    rows = jax.vmap(row)(index.reshape(-1, capacity)).reshape(*groups, experts, num_tokens)
    return jnp.swapaxes(rows, -1, -2)


class Routing(eqx.Module):
    """Which tokens each expert took, with what weight, and what the router thought of the others.

    Mixture-of-Depths is this with one expert; expert- and token-choice Mixture-of-Experts with
    `experts`; integrated MoDE with `choices` = `experts` + no-op experts, the no-ops last. It is
    plain data: it can be recorded, replayed (`Replay`), saved and asserted on.

    **Attributes:**

    - `index`: `[*groups, experts, capacity]`, the tokens in each expert's slots, ascending in each
        row; an empty slot holds `tokens`, one past the last.
    - `weight`: `[*groups, experts, capacity]`, what multiplies the expert's output, float32 or
        wider; 0 where the slot is empty.
    - `logits`: `[*groups, tokens, choices]`, float32 or wider, before any selection bias.
    - `detached_logits`: the same numbers, whose gradient reaches the router but not the hidden
        states. `router_bce` uses them to leave the trunk alone.
    - `load`: `[*groups, choices]`, assignments asked for, before capacity limits.
    - `valid`: `[*groups, tokens]`, false for padding.
    - `predictor`: `[*groups, tokens, experts]`, the membership predictor's logits; `None` for a
        router without one.
    - `positions`: `[*groups, tokens]`, where the tokens stood, for a router whose threshold depends
        on it; `None` for any other.

    Counts are kept apart: a token that *chose* a no-op, one that was *dropped* because the expert
    it asked for was full, and one that is *padding* are three different things. Under
    `TokenChoice(k)`, filled + no-op + dropped + k x padding = k x tokens in every group (as long as
    a token has k choices whose score is not minus infinity).
    """

    index: Int[Array, "*groups experts capacity"]
    weight: Float[Array, "*groups experts capacity"]
    logits: Float[Array, "*groups tokens choices"]
    detached_logits: Float[Array, "*groups tokens choices"]
    load: Int[Array, "*groups choices"]
    valid: Bool[Array, "*groups tokens"]
    predictor: Float[Array, "*groups tokens experts"] | None
    positions: Int[Array, "*groups tokens"] | None = None

    @property
    def num_experts(self) -> int:
        """Experts that compute; no-ops are not counted."""
        return self.index.shape[-2]

    @property
    def num_tokens(self) -> int:
        """Tokens in one group, padding included."""
        return self.logits.shape[-2]

    @property
    def filled(self) -> Bool[Array, "*groups experts capacity"]:
        """`[*groups, experts, capacity]`: true where a slot holds a token."""
        return self.index < self.num_tokens

    @property
    def selected(self) -> Bool[Array, "*groups tokens experts"]:
        """`[*groups, tokens, experts]`: true where an expert gave the token a slot."""
        return selected_mask(self.index, self.num_tokens)

    @property
    def num_filled(self) -> Int[Array, "*groups"]:
        """`[*groups]`: slots that hold a token, over all experts."""
        return jnp.sum(self.filled, axis=(-1, -2), dtype=jnp.int32)

    @property
    def num_noop(self) -> Int[Array, "*groups"]:
        """`[*groups]`: assignments that went to a no-op expert because a token chose it."""
        return jnp.sum(self.load[..., self.num_experts :], axis=-1, dtype=jnp.int32)

    @property
    def num_dropped(self) -> Int[Array, "*groups"]:
        """`[*groups]`: assignments asked for that found no free slot."""
        asked = jnp.sum(self.load[..., : self.num_experts], axis=-1, dtype=jnp.int32)
        return asked - self.num_filled

    @property
    def num_padding(self) -> Int[Array, "*groups"]:
        """`[*groups]`: tokens that took no part because they are padding."""
        return jnp.sum(~self.valid, axis=-1, dtype=jnp.int32)


# Positions in the first bin. The score at position 0 depends on the token's id alone, so those of
# many documents are equal: in a bin of their own the quantile would be one of them, and rounding
# would decide, in decoding otherwise than in the forward. And of 8 positions the usual share of an
# eighth is a token in every document.
_FIRST_BIN = 8


class RouterState(eqx.Module):
    """What a router remembers between steps. No gradient reaches it; `update_state` moves it.

    **Attributes:**

    - `bias`: `[choices]`, added to the logits when tokens are selected, never to the weights.
    - `threshold`: `[experts]`, running estimate of the score above which the share `capacity` of
        all tokens lies; with several bins of positions `[bins, experts]`, of the tokens in each.
    - `updates`: how many times it was moved; with several bins `[bins]`.

    Layers that are scanned over share one state with a leading axis of layers.

    A token at position $p$, counted from 0 in its document, falls into bin
    $\\min(\\lfloor \\log_2(p / 8 + 1) \\rfloor, \\text{bins} - 1)$: the positions 0 to 7, 8 to 23,
    24 to 55, 56 to 119 and so on, each bin twice as wide as the one before, and the last without an
    end. So there is a bin for every position, however long a text is sampled; and bins are narrow
    where one token more of context changes much.

    >>> import jax.numpy as jnp
    >>> state = RouterState.initial(num_experts=1, num_choices=1, position_bins=4)
    >>> state.threshold.shape, state.bins(jnp.array([0, 7, 8, 23, 24, 56, 5000])).tolist()
    ((4, 1), [0, 0, 1, 1, 2, 3, 3])
    """

    bias: Float[Array, "*layers choices"]
    threshold: Float[Array, "*layers_and_bins experts"]
    updates: Int[Array, "*layers_and_bins"]

    @staticmethod
    def initial(num_experts: int, num_choices: int, position_bins: int = 1) -> "RouterState":
        """No bias, a threshold of 0, never updated."""
        bins = (position_bins,) if position_bins > 1 else ()
        return RouterState(
            jnp.zeros(num_choices, jnp.float32),
            jnp.zeros((*bins, num_experts), jnp.float32),
            jnp.zeros(bins, jnp.int32),
        )

    @property
    def layers(self) -> tuple[int, ...]:
        """The leading axes of layers that are scanned over; `()` for a layer by itself."""
        return self.bias.shape[:-1]

    @property
    def position_bins(self) -> int:
        """Bins of positions, each with a threshold of its own."""
        return 1 if self.threshold.ndim == self.bias.ndim else self.threshold.shape[-2]

    def bins(self, positions: Int[Array, "*groups tokens"]) -> Int[Array, "*groups tokens"]:
        """`[*groups, tokens]`: the bin of each position."""
        # In integers: a logarithm in float32 may fall on either side of a power of two.
        widths = positions.astype(jnp.int32) // _FIRST_BIN + 1
        return jnp.clip(31 - jax.lax.clz(widths), 0, self.position_bins - 1)

    def threshold_at(
        self, positions: Int[Array, "*groups tokens"] | None
    ) -> Float[Array, "*axes experts"]:
        """What tokens are compared with: one for all, `[experts]`; with several bins, each token
        with that of its position, `[*groups, tokens, experts]`."""
        if self.position_bins == 1:
            return self.threshold
        assert positions is not None
        return self.threshold.at[self.bins(positions)].get(mode="promise_in_bounds")
