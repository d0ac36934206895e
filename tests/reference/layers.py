"""Mixture-of-Depths and Mixture-of-Experts."""

from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .assignment import (
    Assignment,
    Block,
    Bools,
    Floats,
    Gate,
    Ints,
    Selector,
    as_float64,
    expert_choice,
    token_capacity,
)
from .gates import combine_weights, router_logits, selection_scores


def mixture_of_depths(
    x: Floats,
    w_router: Floats,
    block: Block,
    capacity: float | Fraction,
    gate: Gate = "absolute",
    valid: Bools | None = None,
    positions: Ints | None = None,
    segment_ids: Ints | None = None,
    *,
    scale: float = 1.0,
    select: Selector | None = None,
    weigh_values: bool = True,
) -> tuple[Floats, Assignment]:
    """MoD eq. 1: x_i + r_i f_i(X~) for the selected tokens X~, x_i for the others.

    With `weigh_values`, the block gets the weights r too, for the values of its attention.

    `w_router` is `[dim]`. `block` is f, the residual update alone; it sees the selected tokens
    only, in time order, with the positions and segments they had in the whole sequence.
    `select` replaces top-C, for example by `threshold`.
    """
    num_tokens = len(x)
    if segment_ids is None:
        segment_ids = np.ones(num_tokens, np.int64) if valid is None else valid.astype(np.int64)
    if valid is None:
        valid = np.array([segment != 0 for segment in segment_ids], dtype=bool)
    if positions is None:
        positions = np.arange(num_tokens)

    logits = router_logits(x, w_router.reshape(1, -1))
    scores = selection_scores(logits, gate)
    if select is None:
        assignment = expert_choice(scores, valid, 1, token_capacity(num_tokens, capacity))
    else:
        assignment = select(scores, valid)
    weights = combine_weights(logits, assignment.index, gate, scale)

    out = as_float64(x).copy()
    chosen = [int(t) for t in assignment.index[0] if t < num_tokens]
    if chosen:
        # In ascending order, the tokens come before the empty slots.
        given = (weights[0, : len(chosen)],) if weigh_values else ()
        update = block(as_float64(x)[chosen], positions[chosen], segment_ids[chosen], *given)
        for slot, token in enumerate(chosen):
            out[token] = out[token] + weights[0, slot] * update[slot]
    return out, assignment


def mixture_of_experts(
    x: Floats,
    w_router: Floats,
    experts: Sequence[Callable[[Floats], Floats]],
    select: Selector,
    gate: Gate = "softmax",
    valid: Bools | None = None,
    *,
    bias: Floats | None = None,
    scale: float = 1.0,
) -> tuple[Floats, Assignment]:
    """X_out of EC: out_t = sum over the experts that selected t of weight * expert(x_t).

    No residual is added. `w_router` is `[choices, dim]`; the rows after the experts are the
    no-ops of integrated MoDE (MoD section 4.3): they compete in the scores and add nothing.
    """
    num_tokens = len(x)
    if valid is None:
        valid = np.ones(num_tokens, dtype=bool)
    logits = router_logits(x, w_router)
    assignment = select(selection_scores(logits, gate, bias), valid)
    weights = combine_weights(logits, assignment.index, gate, scale)

    out = np.zeros_like(as_float64(x))
    for expert, slot in np.ndindex(assignment.index.shape):
        token = assignment.index[expert, slot]
        if token < num_tokens:
            out[token] += weights[expert, slot] * as_float64(experts[expert](as_float64(x)[token]))
    return out, assignment


def _stack(results: list[Any], shape: tuple[int, ...]) -> Any:
    if isinstance(results[0], Assignment):
        index, load = [r.index for r in results], [r.load for r in results]
        return Assignment(_stack(index, shape), _stack(load, shape))
    if isinstance(results[0], tuple):
        return tuple(_stack(list(part), shape) for part in zip(*results, strict=True))
    stacked = np.stack(results)
    return stacked.reshape(shape + stacked.shape[1:])


def over_groups(function: Callable[..., Any], group_axes: int, *arrays: NDArray[Any]) -> Any:
    """`function` on each group by itself (MoD section 3.4: "per sequence"), results stacked."""
    shape = arrays[0].shape[:group_axes]
    return _stack([function(*(a[group] for a in arrays)) for group in np.ndindex(shape)], shape)
