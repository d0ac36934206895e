"""Selectors that assign whole sequences: expert choice, and the controls of the paper."""

from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp

from .._capacity import Capacity
from .._types import ExpertLogits, Key, Load, SlotIndex
from ._record import Routing, check_routing
from ._selector import AbstractSelector, Assignment, RoutingInputs, first_come_first_served


def _top_k_indices(scores: ExpertLogits, inputs: RoutingInputs) -> SlotIndex:
    """Returns the `slots` best tokens of each expert in time order; ties go to the earlier token.

    A token that scores minus infinity leaves its slot empty. NaN comes after every number, whatever
    its sign, by which `jax.lax.top_k` would order it.
    """
    scores = jax.lax.stop_gradient(scores)
    ranked = jnp.where(jnp.isnan(scores), jnp.finfo(scores.dtype).min, scores)
    eligible = jnp.where(inputs.valid[..., None], ranked, -jnp.inf)
    best, index = jax.lax.top_k(jnp.swapaxes(eligible, -1, -2), inputs.slots)
    index = jnp.where(best == -jnp.inf, inputs.num_tokens, index)
    return jnp.sort(index.astype(jnp.int32), axis=-1)


def _without_drops(index: SlotIndex, inputs: RoutingInputs) -> Assignment:
    """Makes the assignment of a rule that drops nothing: the load is the number of filled slots."""
    filled = jnp.sum(index < inputs.num_tokens, axis=-1, dtype=jnp.int32)
    return Assignment(index, inputs.pad_noop_load(filled))


class ExpertChoice(AbstractSelector):
    """Each expert selects its best tokens, as many as it has slots.

    The rule is **not causal**: whether a token is selected depends on later tokens. Train with it;
    evaluate and generate with `make_causal(model)`. A token may be selected by several experts or
    by none. No-op experts select nothing; they only lower the others' probability.

    *Source:* arXiv:2202.09368, section 3; arXiv:2404.02258, section 3.3 and equation 1.
    """

    is_causal: ClassVar[bool] = False
    max_capacity: ClassVar[Capacity | None] = None

    def __call__(self, inputs: RoutingInputs, *, key: Key = None) -> Assignment:
        index = _top_k_indices(inputs.scores[..., : inputs.num_experts], inputs)
        return _without_drops(index, inputs)


class RandomChoice(AbstractSelector):
    """Each expert selects tokens by Gaussian noise, whatever they contain: the paper's control.

    Every slot is filled.

    **Raises:** `ValueError` at the call, without a `key`.

    *Source:* "stochastic routing", arXiv:2404.02258, section 3.3 and figure 3.
    """

    is_causal: ClassVar[bool] = True
    max_capacity: ClassVar[Capacity | None] = None

    def __call__(self, inputs: RoutingInputs, *, key: Key = None) -> Assignment:
        if key is None:
            raise ValueError(
                "`key` is needed by `RandomChoice`, got None. Pass `key=` to the layer's call."
            )
        shape = (*inputs.valid.shape, inputs.num_experts)
        index = _top_k_indices(jax.random.normal(key, shape, jnp.float32), inputs)
        return _without_drops(index, inputs)


class Strided(AbstractSelector):
    r"""Each expert selects evenly spaced tokens: routing without a router.

    Of $n$ real tokens, expert $e$ of $E$ selects the token of rank $r$ wherever
    $\lfloor (r C + p) / n \rfloor$ increases, with $C$ slots and the phase
    $p = \lfloor e n / E \rfloor$: exactly $\min(C, n)$ tokens, and other ones for each expert.

    **Raises:** `ValueError` at the call, for tokens * (slots + 1) of 2**31 or more.
    """

    is_causal: ClassVar[bool] = True
    max_capacity: ClassVar[Capacity | None] = None

    def __call__(self, inputs: RoutingInputs, *, key: Key = None) -> Assignment:
        if inputs.num_tokens * (inputs.slots + 1) >= 2**31:
            raise ValueError(
                "`Strided` counts in 32-bit integers: tokens * (slots + 1) must be below 2**31, "
                f"got {inputs.num_tokens} * {inputs.slots + 1}. Use shorter groups or fewer slots."
            )
        rank = jnp.cumsum(inputs.valid, axis=-1, dtype=jnp.int32)[..., None]
        total = jnp.maximum(rank[..., -1:, :], 1)
        experts = jnp.arange(inputs.num_experts, dtype=jnp.int32)
        phase = (jnp.expand_dims(experts, range(rank.ndim - 1)) * total) // inputs.num_experts
        step = (rank * inputs.slots + phase) // total
        previous = ((rank - 1) * inputs.slots + phase) // total
        requested = (step != previous) & inputs.valid[..., None]
        return _without_drops(first_come_first_served(requested, inputs.slots), inputs)


class Replay(AbstractSelector):
    """Repeats the assignments of a recorded routing, whatever the router's logits are now.

    The weights are still the router's own.

    **Raises:** `ValueError` at the call, if `routing` has other groups, tokens or experts.
    """

    index: SlotIndex
    load: Load
    num_tokens: int = eqx.field(static=True)
    is_causal: ClassVar[bool] = True
    max_capacity: ClassVar[Capacity | None] = None

    def __init__(self, routing: Routing) -> None:
        check_routing(routing)
        # Only integers are kept, so that no optimizer takes a recorded weight for a parameter.
        self.index = routing.index
        self.load = routing.load
        self.num_tokens = routing.num_tokens

    def __call__(self, inputs: RoutingInputs, *, key: Key = None) -> Assignment:
        recorded = (*self.index.shape[:-1], self.num_tokens)
        expected = (*inputs.valid.shape[:-1], inputs.num_experts, inputs.num_tokens)
        if recorded != expected or self.load.shape[-1] != inputs.scores.shape[-1]:
            raise ValueError(
                "`routing` of `Replay` must have been recorded with the same axes "
                f"[*groups, experts, tokens] = {expected} and {inputs.scores.shape[-1]} choices, "
                f"got {recorded} and {self.load.shape[-1]} choices. Record it with inputs of the "
                "shape it is replayed on."
            )
        # Padding is never selected, even where the record was made of a longer text.
        token = jnp.clip(self.index, 0, inputs.num_tokens - 1)
        real = jnp.take_along_axis(inputs.valid[..., None, :], token, axis=-1) & (self.index >= 0)
        index = jnp.sort(jnp.where(real, self.index, inputs.num_tokens), axis=-1)
        return Assignment(index, self.load)
