"""Converts a trained model: some of its layers get routers, and at capacity 1 nothing changes."""

from collections.abc import Iterable, Sequence

import equinox as eqx
import jax
from jaxtyping import Array, Float, PRNGKeyArray

from .._capacity import Capacity, check_capacity
from .._checks import check_count, is_finite
from .._linear import Linear, RMSNorm
from ..models import Transformer, list_layers, with_layers
from ..nn import Residual, TransformerBlock
from ..routing import (
    AbstractGate,
    AbstractSelector,
    ExpertChoice,
    Router,
    StraightThroughGate,
    map_routers,
)
from ._forms import FORMS, Form, FormOptions


class NormedScorer(eqx.Module):
    """A router's scorer that norms its input: in a trained model, a few features of a few tokens
    are thousands of times larger than the rest, and would decide alone."""

    norm: RMSNorm
    linear: Linear

    def __call__(self, x: Float[Array, "*axes dim"]) -> Float[Array, "*axes choices"]:
        return self.linear(self.norm(x))


def convert(
    model: Transformer,
    layers: Sequence[int],
    *,
    capacity: Capacity,
    form: str | Form = "mod",
    select: AbstractSelector = ExpertChoice(),
    gate: AbstractGate = StraightThroughGate(),
    num_experts: int = 4,
    num_noop: int = 1,
    expert_capacity: Capacity | None = None,
    redrawn: float = 0.0,
    key: PRNGKeyArray,
) -> Transformer:
    """Routes some layers of a trained model. At capacity 1, it computes what it did before.

    The weight of a selected token is exactly 1 (`StraightThroughGate`), so that the trained blocks
    do what they did for it, while routers get a gradient from the first step. `compare` says what
    a conversion changed; lower the capacity in training by `capacity_schedule`.

    **Arguments:**

    - `model`: a dense model, such as `load` returns.
    - `layers`: numbers of the layers to route, from 0.
    - `capacity`: fraction of the tokens that a routed layer, or each expert, computes.
    - `form`: `"mod"` routes whole blocks, `"mod-queries"` too but keeps the keys of all tokens;
        `"mod-attention"`, `"mod-feedforward"` and `"mod-both"` route the parts of a block;
        `"moe"` makes experts of the feed-forward, `"mode-staged"` and `"mode-integrated"` combine
        both. Or a function `(block, options, key) -> layer`.
    - `select`, `gate`: of the routers.
    - `num_experts`: copies of the feed-forward, for the forms with experts.
    - `num_noop`: no-op experts, for `"mode-integrated"`.
    - `expert_capacity`: of each expert, by default `capacity`. At `1 / num_experts`, all experts
        together cost what the feed-forward did.
    - `redrawn`: fraction of the features inside each expert that is drawn anew, so that experts
        differ from the first step. Above 0, the function changes.

    **Returns:** a model. Layers of one structure share a scan.

    **Raises:** `ValueError` for a layer that does not exist, is named twice or is no dense
    `TransformerBlock`; for another form; for a number out of range.

    >>> import jax, mode
    >>> dense = lambda key: mode.Residual(mode.TransformerBlock(32, 4, key=key))
    >>> model = mode.Transformer(256, 32, [dense], repeats=6, key=jax.random.key(0))
    >>> routed = mode.pretrained.convert(model, [1, 3], capacity=0.5, key=jax.random.key(1))
    >>> [len(stack.layers) * stack.repeats for stack in routed.stacks], len(mode.routers(routed))
    ([4, 2], 1)

    *Source:* arXiv:2404.02258, section 3; experts as copies, arXiv:2212.05055; parts of experts
    drawn anew, arXiv:2502.19261.
    """
    check_capacity(capacity)
    check_count("num_experts", num_experts, 1)
    if not (is_finite(redrawn) and 0 <= redrawn <= 1):
        raise ValueError(f"`redrawn` must be from 0 to 1, got {redrawn!r}.")
    if isinstance(form, str) and form not in FORMS:
        raise ValueError(f"`form` must be one of {', '.join(FORMS)} or a function, got {form!r}.")
    make = FORMS[form] if isinstance(form, str) else form
    options = FormOptions(
        capacity=capacity,
        select=select,
        gate=gate,
        num_experts=num_experts,
        num_noop=num_noop,
        expert_capacity=capacity if expert_capacity is None else expert_capacity,
        redrawn=float(redrawn),
    )
    own = list_layers(model)
    numbers = check_layers(layers, len(own))
    for number, layer_key in zip(numbers, jax.random.split(key, len(numbers)), strict=True):
        block = getattr(own[number], "block", None)
        if not (isinstance(own[number], Residual) and isinstance(block, TransformerBlock)):
            raise ValueError(
                "`layers` must be dense, `Residual(TransformerBlock(...))`, got "
                f"`{type(own[number]).__name__}` as layer {number}."
            )
        own[number] = map_routers(_with_normed_scorer, make(block, options, layer_key))
    return with_layers(model, own)


def check_layers(layers: Sequence[int], depth: int) -> list[int]:
    """Returns the numbers of layers to route, different ones that a model of this depth has."""
    if not isinstance(layers, Iterable):
        raise ValueError(f"`layers` must be a list of numbers, got {layers!r}.")
    numbers = [check_count("layers", number, 0) for number in layers]
    if len(set(numbers)) < len(numbers) or not numbers or max(numbers) >= depth:
        raise ValueError(
            f"`layers` must be different numbers from 0 to {depth - 1}, at least one, got "
            f"{numbers}."
        )
    return numbers


def _with_normed_scorer(router: Router) -> Router:
    scorer = router.scorer
    if not isinstance(scorer, Linear):
        return router
    # Logits of normed features have the deviation of the weights times `dim ** 0.5`: here 1.
    dim = scorer.weight.shape[0]
    weight = scorer.weight / scorer.weight.std() * dim**-0.5
    normed = NormedScorer(RMSNorm(dim), eqx.tree_at(lambda s: s.weight, scorer, weight))
    return eqx.tree_at(lambda r: r.scorer, router, normed)
