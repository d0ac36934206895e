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


def mixture_of_queries(
    x: Floats,
    w_router: Floats,
    block: Block,
    capacity: float | Fraction,
    gate: Gate,
    valid: Bools,
    positions: Ints,
    segment_ids: Ints,
    scale: float = 1.0,
) -> tuple[Floats, Assignment]:
    """x_i + r_i f_i(X) for the selected tokens, where f is the dense block over all tokens."""
    logits = router_logits(x, w_router.reshape(1, -1))
    slots = token_capacity(len(x), capacity)
    assignment = expert_choice(selection_scores(logits, gate), valid, 1, slots)
    weights = combine_weights(logits, assignment.index, gate, scale)
    out, update = as_float64(x).copy(), block(as_float64(x), positions, segment_ids)
    for slot, token in enumerate(assignment.index[0]):
        if token < len(x):
            out[token] += weights[0, slot] * update[token]
    return out, assignment


def recursion(
    x: Floats,
    w_routers: Sequence[Floats],
    run: Callable[..., Floats],
    slots: Sequence[int],
    gate: Gate,
    valid: Bools,
    positions: Ints,
    segment_ids: Ints,
    *,
    share_keys: bool = False,
) -> tuple[Floats, list[Assignment]]:
    """MoR (arXiv:2507.10524), table 1: h <- h + w f(h) for the tokens that each round selects.

    Each round selects among the tokens of the round before. `run` is `transformer_block_delta`
    without its parameters. The keys are those of the round's tokens, their values weighed; or, with
    `share_keys`, those of the first round's tokens, as they were before it.
    """
    out, inside = as_float64(x).copy(), np.array(valid)
    assignments, first, keys_of = [], np.array([], np.int64), np.array([])
    for number, (w_router, count) in enumerate(zip(w_routers, slots, strict=True)):
        logits = router_logits(out, w_router.reshape(1, -1))
        assignment = expert_choice(selection_scores(logits, gate), inside, 1, count)
        assignments.append(assignment)
        weights = combine_weights(logits, assignment.index, gate, 1.0)[0]
        tokens = np.array([t for t in assignment.index[0] if t < len(x)], np.int64)
        if number == 0:
            first, keys_of = tokens, out[tokens].copy()
        inside = np.isin(np.arange(len(x)), tokens)
        if len(tokens) == 0:
            continue
        if share_keys:
            index = np.searchsorted(first, tokens)
            at, segments = positions[first], segment_ids[first]
            update = run(out[tokens], at, segments, None, keys_of=keys_of, index=index)
        else:
            given = weights[: len(tokens)]
            update = run(out[tokens], positions[tokens], segment_ids[tokens], given)
        for slot, token in enumerate(tokens):
            out[token] += weights[slot] * update[slot]
    return out, assignments


def token_choice_recursion(
    x: Floats,
    weights: Floats,
    depths: Ints,
    run: Callable[..., Floats],
    positions: Ints,
    segment_ids: Ints,
    *,
    share_keys: bool = False,
) -> Floats:
    """As `recursion`, where token i takes part in the first `depths[i]` rounds, by `weights[i]`."""
    out = as_float64(x).copy()
    first = np.flatnonzero(depths > 0)
    keys_of = out[first].copy()
    for number in range(int(depths.max(initial=0))):
        tokens = np.flatnonzero(depths > number)
        if share_keys:
            index = np.searchsorted(first, tokens)
            at, segments = positions[first], segment_ids[first]
            update = run(out[tokens], at, segments, None, keys_of=keys_of, index=index)
        else:
            update = run(out[tokens], positions[tokens], segment_ids[tokens], weights[tokens])
        for slot, token in enumerate(tokens):
            out[token] += weights[token] * update[slot]
    return out


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
