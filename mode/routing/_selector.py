"""The interface of selectors: from `RoutingInputs` to an `Assignment` of tokens to slots."""

import abc
from typing import TYPE_CHECKING, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from .._capacity import Capacity
from .._types import ExpertLogits, ExpertMask, Key, Load, Logits, SlotIndex, TokenMask


if TYPE_CHECKING:
    # Pyright would take Equinox's names for fields of the class.
    from typing import ClassVar as AbstractClassVar, ClassVar as AbstractVar
else:
    from equinox import AbstractClassVar, AbstractVar


class RoutingInputs(eqx.Module):
    """The inputs of a selector. `Router.inputs` makes them.

    **Attributes:**

    - `scores`: `[*groups, tokens, choices]`, what is compared, from `Router.scores`.
    - `logits`, `predictor`, `valid`: as in `Routing`.
    - `threshold`: `[experts]`, the router's running quantile of its scores.
    - `free`: `[*groups, experts]`, slots that earlier tokens of the sequence left free; `None` for
        whole sequences, in which all `slots` are free.
    - `slots`: slots of each expert in the assignment, a Python integer.
    - `change`: `[*groups, tokens]`, the size of the last round's update of each token, relative to
        the token's hidden state; infinite in the first round of a `Recursion`, `None` elsewhere.
    - `positions`: `[*groups, tokens]`, of the tokens in their sequence: in a decoding step the
        other fields are those of the new tokens alone. `None` where records are looked at again.
    """

    scores: Logits
    logits: Logits
    predictor: ExpertLogits | None
    threshold: Float[Array, " experts"]
    valid: TokenMask
    free: Int[Array, "*groups experts"] | None
    slots: int = eqx.field(static=True)
    change: Float[Array, "*groups tokens"] | None = None
    positions: Int[Array, "*groups tokens"] | None = None

    @property
    def num_experts(self) -> int:
        """Experts that compute, without the no-ops."""
        return self.threshold.shape[-1]

    @property
    def num_tokens(self) -> int:
        """Tokens in one group, padding included."""
        return self.valid.shape[-1]

    def pad_noop_load(self, load: Int[Array, "*groups some"]) -> Load:
        """Appends zeros to the load of a rule that assigns nothing to the no-ops."""
        missing = self.scores.shape[-1] - load.shape[-1]
        return jnp.pad(load, [(0, 0)] * (load.ndim - 1) + [(0, missing)])


class Assignment(eqx.Module):
    """The result of a selector: `index` and `load` as in `Routing`."""

    index: SlotIndex
    load: Load


class AbstractSelector(eqx.Module):
    """A rule that assigns tokens to slots.

    A rule of your own implements `__call__` and has two attributes:

    - `is_causal`, a class variable: whether the slots of a token are independent of the content of
        later tokens. `make_causal` replaces the rules that are not causal.
    - `max_capacity`: the fraction of a group's tokens for which each expert has slots, or `None`
        for the router's own capacity. A class variable or a static field.
    """

    is_causal: AbstractClassVar[bool]
    max_capacity: AbstractVar[Capacity | None]

    @abc.abstractmethod
    def __call__(self, inputs: RoutingInputs, *, key: Key = None) -> Assignment:
        """Assigns tokens to slots. `key` is for rules that draw random numbers."""


def first_come_first_served(
    requested: ExpertMask, slots: int, free: Int[Array, "*groups experts"] | None = None
) -> SlotIndex:
    """Fills the slots of each expert with the tokens that requested it, in time order.

    **Arguments:**

    - `requested`: `[*groups, tokens, experts]`, true where a token wants an expert.
    - `slots`: slots of each expert in the result.
    - `free`: `[*groups, experts]`, how many of these slots may be filled; by default all.

    **Returns:** `[*groups, experts, slots]`, ascending; an empty slot holds `tokens`.

    >>> requested = jnp.array([[True], [False], [True], [True]])
    >>> first_come_first_served(requested, 3).tolist()
    [[0, 2, 3]]
    >>> first_come_first_served(requested, 3, free=jnp.array([1])).tolist()
    [[0, 4, 4]]
    """
    num_tokens = requested.shape[-2]
    counts = jnp.cumsum(jnp.swapaxes(requested, -1, -2), axis=-1, dtype=jnp.int32)
    # Slot j holds the first token at which j + 1 tokens have requested the expert.
    ranks = jnp.arange(1, slots + 1, dtype=jnp.int32)
    rows = jax.vmap(lambda row: jnp.searchsorted(row, ranks))(counts.reshape(-1, num_tokens))
    index = rows.astype(jnp.int32).reshape(*counts.shape[:-1], slots)
    if free is None:
        return index
    within = jnp.expand_dims(ranks, range(free.ndim)) <= free[..., None]
    return jnp.where(within, index, num_tokens)


class AbstractTokenSelector(AbstractSelector):
    """A rule under which each token requests its own choices and is served in time order.

    The slots of a token depend on itself and on earlier tokens alone: the rule is causal, and it
    decodes token by token. A rule of your own implements `requested_mask` and has a `max_capacity`.

    >>> import jax, jax.numpy as jnp, mode
    >>> class Positive(mode.AbstractTokenSelector):
    ...     max_capacity = 0.5
    ...
    ...     def requested_mask(self, inputs):
    ...         return inputs.logits > 0
    >>> block = mode.PositionWise(jnp.tanh)
    >>> layer = mode.MixtureOfDepths(block, 8, select=Positive(), key=jax.random.key(0))
    >>> layer(jnp.ones((2, 16, 8)))[1][0].index.shape
    (2, 1, 8)
    """

    is_causal: ClassVar[bool] = True

    @abc.abstractmethod
    def requested_mask(self, inputs: RoutingInputs) -> Bool[Array, "*groups tokens choices"]:
        """Returns the choices that each token requests, given its own scores alone.

        Requests of padding are cleared later. The no-ops, which are last, may be left out.
        """

    def __call__(self, inputs: RoutingInputs, *, key: Key = None) -> Assignment:
        requested = self._checked(inputs) & inputs.valid[..., None]
        experts = requested[..., : inputs.num_experts]
        index = first_come_first_served(experts, inputs.slots, inputs.free)
        load = jnp.sum(requested, axis=-2, dtype=jnp.int32)
        return Assignment(index, inputs.pad_noop_load(load))

    def _checked(self, inputs: RoutingInputs) -> Bool[Array, "*groups tokens choices"]:
        """The mask that a rule returns, or an error that names the rule."""
        mask = self.requested_mask(inputs)
        *tokens, choices = inputs.scores.shape
        shapes = [(*tokens, inputs.num_experts), (*tokens, choices)]
        if mask.shape not in shapes or mask.dtype != bool:
            raise ValueError(
                f"`requested_mask` of {type(self).__name__} must return booleans of "
                f"{' or '.join(map(str, dict.fromkeys(shapes)))}, [*groups, tokens, choices], got "
                f"{mask.dtype} of {mask.shape}."
            )
        return mask
