"""Selectors: the static-shape rules that decide which tokens go where.

A selector is an instance, swapped with `eqx.tree_at` to ablate a trained model. Each turns a
`Request` (what the router knows) into a `Selection` (who sits in which slot). The number of slots
is a Python integer; which tokens fill them is data.

Three things vary from rule to rule, and each has one implementation here: taking the best
(`_take_best`), serving in time order (`first_come`), and how many slots a share of the tokens is
(`token_capacity`).
"""

import abc
from fractions import Fraction
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from ._capacity import check_count
from ._routing import Routing


class Request(eqx.Module):
    """All that a selector may look at.

    **Attributes:**

    - `scores`: `[*groups, tokens, choices]`, what is compared; the selection bias is in it.
    - `logits`: `[*groups, tokens, choices]`, the router's raw output.
    - `predictor`: `[*groups, tokens, experts]`, the predictor's logits, or `None`.
    - `threshold`: `[experts]`, the router's running quantile of its scores; where it depends on a
        token's position, each token's own, `[*groups, tokens, experts]`.
    - `valid`: `[*groups, tokens]`, false for padding.
    - `slots`: slots of each expert, a Python integer.
    - `num_experts`, `num_tokens`: experts that compute, and tokens in a group.
    """

    scores: Float[Array, "*groups tokens choices"]
    logits: Float[Array, "*groups tokens choices"]
    predictor: Float[Array, "*groups tokens experts"] | None
    threshold: Float[Array, "*for_each experts"]
    valid: Bool[Array, "*groups tokens"]
    slots: int = eqx.field(static=True)

    @property
    def num_experts(self) -> int:
        """Experts that compute; no-ops are not counted."""
        return self.threshold.shape[-1]

    @property
    def num_tokens(self) -> int:
        """Tokens in one group, padding included."""
        return self.valid.shape[-1]

    def without_noop(self, load: Int[Array, "*groups asked"]) -> Int[Array, "*groups choices"]:
        """`load` of all choices, where nobody asks for those that a rule leaves out, the no-ops."""
        left_out = self.scores.shape[-1] - load.shape[-1]
        return jnp.pad(load, [(0, 0)] * (load.ndim - 1) + [(0, left_out)])


class Selection(eqx.Module):
    """Who sits where: `index` and `load` as in `Routing`."""

    index: Int[Array, "*groups experts capacity"]
    load: Int[Array, "*groups choices"]


class AbstractSelector(eqx.Module):
    """A rule that assigns tokens to slots.

    A user's own rule implements `__call__`, `share`, which returns its argument unless the rule
    needs another number of slots, and says `looks_ahead`: whether a token's fate depends on the
    content of later tokens. `causal` replaces exactly the rules under which it does.
    """

    looks_ahead: ClassVar[bool]

    @abc.abstractmethod
    def share(self, fraction: Fraction) -> Fraction:
        """The share of a group for which each expert has slots, given the router's own share."""

    @abc.abstractmethod
    def __call__(self, request: Request, *, key: PRNGKeyArray | None = None) -> Selection:
        """Assign tokens to slots. `key` is for rules that draw random numbers."""


def check_instance(name: str, value: object, kind: type, example: str) -> None:
    """Refuse a class, a string or a bare function where an instance of a strategy is meant."""
    if not isinstance(value, kind):
        got = f"the class `{value.__name__}`" if isinstance(value, type) else repr(value)
        raise ValueError(
            f"`{name}` must be an instance of `{kind.__name__}`, such as `{example}`, got {got}."
        )


def first_come(
    asked: Bool[Array, "*groups tokens experts"], slots: int
) -> Int[Array, "*groups experts slots"]:
    """Seat the tokens that asked in time order, until an expert's slots are full.

    The j-th slot holds the first token by which j + 1 tokens had asked. Time order is what keeps
    a later token from evicting an earlier one.
    """
    num_tokens = asked.shape[-2]
    queue = jnp.cumsum(jnp.swapaxes(asked, -1, -2), axis=-1, dtype=jnp.int32)
    places = jnp.arange(1, slots + 1, dtype=jnp.int32)
    index = jax.vmap(lambda row: jnp.searchsorted(row, places))(queue.reshape(-1, num_tokens))
    return index.astype(jnp.int32).reshape(*queue.shape[:-1], slots)


def _take_best(
    scores: Float[Array, "*groups tokens experts"], request: Request
) -> Int[Array, "*groups experts slots"]:
    """Each expert takes its `slots` best tokens; ties go to the earlier one.

    Indices, not a threshold: comparing with the k-th value takes k - 1 tokens or, with ties, more
    than k. Tokens that score minus infinity, padding among them, leave their slot empty.
    """
    eligible = jnp.where(request.valid[..., None], jax.lax.stop_gradient(scores), -jnp.inf)
    best, index = jax.lax.top_k(jnp.swapaxes(eligible, -1, -2), request.slots)
    index = jnp.where(best == -jnp.inf, request.num_tokens, index)
    return jnp.sort(index.astype(jnp.int32), axis=-1)


def _full(index: Int[Array, "*groups experts slots"], request: Request) -> Selection:
    """The selection of a rule that drops nothing: what an expert holds is what asked for it."""
    held = jnp.sum(index < request.num_tokens, axis=-1, dtype=jnp.int32)
    return Selection(index, request.without_noop(held))


class ExpertChoice(AbstractSelector):
    """Each expert takes its best `capacity` tokens; a token may be taken by several or by none.

    Perfectly balanced, exactly `capacity` tokens per expert, and **not causal**: whether a token is
    taken depends on later ones. Train with it, evaluate and sample through `causal`. No-op
    experts take no tokens here; they only move probability.

    How much a loss under it flatters a decoder depends on the group and on who chooses. Trained so
    and run causally, at toy scale (`benchmarks/EVIDENCE.md`), layers of experts lost 5.7 % in
    groups of 16 tokens, 0.6 % of 64 and 0.2 % of 256, and more with more layers; layers of
    Mixture-of-Depths 1.8 % of 16, and less than the runs could tell from 64 on.

    *Source:* arXiv:2202.09368, section 3; arXiv:2404.02258, section 3.3 and equation 1.
    """

    looks_ahead: ClassVar[bool] = True

    def share(self, fraction: Fraction) -> Fraction:
        return fraction

    def __call__(self, request: Request, *, key: PRNGKeyArray | None = None) -> Selection:
        del key
        index = _take_best(request.scores[..., : request.num_experts], request)
        return _full(index, request)


class RandomChoice(AbstractSelector):
    """The paper's control: top-k on Gaussian scores. Exactly `capacity` tokens; needs a `key`.

    Drawn without replacement by construction. What a token's content is plays no part, so nothing
    leaks from the future.

    *Source:* "stochastic routing", arXiv:2404.02258, section 3.3 and figure 3.
    """

    looks_ahead: ClassVar[bool] = False

    def share(self, fraction: Fraction) -> Fraction:
        return fraction

    def __call__(self, request: Request, *, key: PRNGKeyArray | None = None) -> Selection:
        if key is None:
            raise ValueError(
                "`key` is needed by `RandomChoice`, got None. Pass `key=` to the layer's call."
            )
        shape = (*request.valid.shape, request.num_experts)
        index = _take_best(jax.random.normal(key, shape, jnp.float32), request)
        return _full(index, request)


class Strided(AbstractSelector):
    """Evenly spaced tokens, each expert starting at another: routing without a router.

    Of n real tokens, expert e of E takes the one with rank r wherever
    $\\lfloor (r C + p) / n \\rfloor$ steps up, with the phase $p = \\lfloor e n / E \\rfloor$:
    exactly min(C, n) of them.
    """

    looks_ahead: ClassVar[bool] = False

    def share(self, fraction: Fraction) -> Fraction:
        return fraction

    def __call__(self, request: Request, *, key: PRNGKeyArray | None = None) -> Selection:
        del key
        if request.num_tokens * request.slots >= 2**31:
            raise ValueError(
                "`Strided` counts in 32-bit integers: tokens * slots must be below 2**31, got "
                f"{request.num_tokens} * {request.slots}. Use shorter groups or fewer slots."
            )
        rank = jnp.cumsum(request.valid, axis=-1, dtype=jnp.int32)[..., None]
        total = jnp.maximum(rank[..., -1:, :], 1)
        expert = jnp.expand_dims(
            jnp.arange(request.num_experts, dtype=jnp.int32), range(rank.ndim - 1)
        )
        phase = (expert * total) // request.num_experts
        step = (rank * request.slots + phase) // total
        previous = ((rank - 1) * request.slots + phase) // total
        asked = (step != previous) & request.valid[..., None]
        index = first_come(asked, request.slots)
        return _full(index, request)


class AbstractTokenwise(AbstractSelector):
    """Rules under which each token asks for itself and is served in time order.

    A token's fate depends on itself and, where an expert is full, on earlier ones: causal, and the
    kind of rule that can decode token by token. A user's own rule of this kind implements `asks`
    and `share`.
    """

    looks_ahead: ClassVar[bool] = False

    @abc.abstractmethod
    def asks(self, request: Request) -> Bool[Array, "*groups tokens choices"]:
        """Which choices each token asks for, given its own scores alone; padding is cleared later.
        Choices behind the experts are no-ops; without them there may be fewer."""

    def __call__(self, request: Request, *, key: PRNGKeyArray | None = None) -> Selection:
        del key
        asked = self.asks(request) & request.valid[..., None]
        index = first_come(asked[..., : request.num_experts], request.slots)
        load = jnp.sum(asked, axis=-2, dtype=jnp.int32)
        return Selection(index, request.without_noop(load))


class TokenChoice(AbstractTokenwise):
    """Each token takes its best `k` choices, experts or no-ops; an expert that is full drops.

    Tokens are served in time order (*token-major*): all choices of a token come before any of the
    next. The usual order, every first choice before any second one, lets a later token evict an
    earlier one and so leaks the future; this one is causal. A no-op that is chosen takes one of the
    token's `k` places, has no limit and costs nothing.

    **Arguments:**

    - `k`: choices per token, from 1 to the number of choices.

    **Raises:** `ValueError` for `k` below 1 or above the number of choices.

    *Source:* arXiv:2404.02258, sections 3.3 and 4.3 (no-op experts).
    """

    k: int = eqx.field(static=True)

    def __check_init__(self):
        check_count("k` of `TokenChoice", self.k, 1)

    def share(self, fraction: Fraction) -> Fraction:
        return fraction

    def asks(self, request: Request) -> Bool[Array, "*groups tokens choices"]:
        choices = request.scores.shape[-1]
        if self.k > choices:
            raise ValueError(
                f"`k` of `TokenChoice` must be at most the number of choices (experts and no-op "
                f"experts), {choices}, got {self.k}. Lower `k` or add experts."
            )
        best, chosen = jax.lax.top_k(jax.lax.stop_gradient(request.scores), self.k)
        wanted = jax.nn.one_hot(chosen, choices, dtype=bool) & (best > -jnp.inf)[..., None]
        return jnp.any(wanted, axis=-2)


class Replay(AbstractSelector):
    """The assignments of a recorded routing, whatever the router now thinks; weights stay live.

    **Arguments:**

    - `routing`: the record to repeat, of the same groups, tokens and experts.

    **Raises:** `ValueError` at the call, where the record has another shape.
    """

    index: Int[Array, "*groups experts capacity"]
    load: Int[Array, "*groups choices"]
    num_tokens: int = eqx.field(static=True)
    looks_ahead: ClassVar[bool] = False

    def __init__(self, routing: Routing):
        # Only integers are kept: no optimizer takes a recorded weight for a parameter.
        self.index = routing.index
        self.load = routing.load
        self.num_tokens = routing.num_tokens

    def share(self, fraction: Fraction) -> Fraction:
        del fraction
        return Fraction(self.index.shape[-1], self.num_tokens)

    def __call__(self, request: Request, *, key: PRNGKeyArray | None = None) -> Selection:
        del key
        recorded = (*self.index.shape[:-1], self.num_tokens)
        asked = (*request.valid.shape[:-1], request.num_experts, request.num_tokens)
        if recorded != asked or self.load.shape[-1] != request.scores.shape[-1]:
            raise ValueError(
                "`routing` of `Replay` must have been recorded with the same axes "
                f"[*groups, experts, tokens] = {asked} and {request.scores.shape[-1]} choices, got "
                f"{recorded} and {self.load.shape[-1]} choices. Record it with inputs of the "
                "shape it is replayed on."
            )
        # Padding is never selected, not even where the record was made of a longer text.
        seat = jnp.clip(self.index, 0, request.num_tokens - 1)
        real = jnp.take_along_axis(request.valid[..., None, :], seat, axis=-1) & (self.index >= 0)
        index = jnp.sort(jnp.where(real, self.index, request.num_tokens), axis=-1)
        return Selection(index, self.load)
