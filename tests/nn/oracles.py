"""The oracles of whole layers: their weights, read into the functions of `tests.reference`.

Each takes `x`, `valid`, `positions` and `segment_ids` of one sequence, and returns hidden states
and an assignment for each router.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

import mode
from tests import reference as ref
from tests.helpers import f64, oracle_block, oracle_experts, oracle_function, oracle_router


Oracle = Callable[..., tuple[ref.Floats, tuple[ref.Assignment, ...]]]


def zeros_of(x: ref.Floats) -> ref.Floats:
    """A feed-forward that adds nothing: what is left of a block is its attention."""
    return np.zeros_like(x)


def of_feedforward(block: mode.TransformerBlock) -> ref.Block:
    """The feed-forward of a block alone, behind its norm."""
    assert isinstance(block.feedforward, mode.PositionWise)
    inside = block.feedforward.function
    assert isinstance(inside, mode.GELUFeedForward | mode.SwiGLUFeedForward)
    function = oracle_function(inside)
    norm = f64(block.feedforward_norm.weight)
    return lambda x, *rest: function(ref.rms_norm(x, norm))


def of_depths(layer: Any, block: ref.Block, capacity: float) -> Oracle:
    """Equation 1 with the default gate, the weight on the values, too."""

    def run(x: Any, *rest: Any) -> Any:
        router = oracle_router(layer.router)[0]
        out, assignment = ref.mixture_of_depths(x, router, block, capacity, "absolute", *rest)
        return out, (assignment,)

    return run


def of_queries(
    layer: mode.MixtureOfQueries, gate: ref.Gate = "absolute", scale: float = 1.0
) -> Oracle:
    """The dense block's updates of the selected tokens, at a capacity of a half."""
    assert isinstance(layer.block, mode.TransformerBlock)
    router, dense = oracle_router(layer.router)[0], oracle_block(layer.block)

    def run(x: Any, *rest: Any) -> Any:
        out, assignment = ref.mixture_of_queries(x, router, dense, 0.5, gate, *rest, scale=scale)
        return out, (assignment,)

    return run


def in_turn(*oracles: Oracle) -> Oracle:
    """One layer after the other."""

    def run(x: Any, *rest: Any) -> Any:
        assignments: tuple[ref.Assignment, ...] = ()
        for oracle in oracles:
            x, own = oracle(x, *rest)
            assignments += own
        return x, assignments

    return run


def of_recursion(layer: mode.Recursion, slots: list[int]) -> Oracle:
    """Rounds of expert choice, by sigmoids."""
    assert isinstance(layer.block, mode.TransformerBlock)
    block = oracle_block(layer.block)
    w_routers = [oracle_router(router)[0] for router in layer.routers]

    def run(x: Any, *rest: Any) -> Any:
        options = {"share_keys": layer.share_keys}
        out, rounds = ref.recursion(x, w_routers, block, slots, "sigmoid", *rest, **options)
        return out, tuple(rounds)

    return run


def of_token_choice_recursion(layer: mode.TokenChoiceRecursion, slots: int) -> Oracle:
    """The record's experts are the depths; who finds no slot takes part in no round."""
    assert isinstance(layer.block, mode.TransformerBlock)
    block, w_router = oracle_block(layer.block), oracle_router(layer.router)

    def run(x: Any, valid: Any, *rest: Any) -> Any:
        logits = ref.router_logits(x, w_router)
        scores = ref.selection_scores(logits, "sigmoid")
        assignment = ref.token_choice(scores, valid, len(w_router), slots, k=1)
        of_slots = ref.combine_weights(logits, assignment.index, "sigmoid", 1.0)
        depths, weights = np.zeros(len(x), np.int64), np.zeros(len(x))
        for depth, slot in np.ndindex(assignment.index.shape):
            token = assignment.index[depth, slot]
            if token < len(x):
                depths[token], weights[token] = depth + 1, of_slots[depth, slot]
        options = {"share_keys": layer.share_keys}
        out = ref.token_choice_recursion(x, weights, depths, block, *rest, **options)
        return out, (assignment,)

    return run


def of_free_experts(layer: mode.MixtureOfExperts, slots: int, k: int) -> Oracle:
    """Token choice among experts, one no-op, one copy and constants; the update alone."""
    assert layer.free is not None
    mix, constant = f64(layer.free.mix), f64(layer.free.constant)
    experts, w_router = oracle_experts(layer.experts), oracle_router(layer.router)
    copy = len(experts) + 1  # behind the experts and a no-op

    def choose(scores: Any, valid: Any) -> ref.Assignment:
        return ref.token_choice(scores, valid, len(experts), slots, k)

    def run(x: Any, valid: Any, *_: Any) -> Any:
        out, assignment = ref.mixture_of_experts(x, w_router, experts, choose, "softmax", valid)
        for token in np.flatnonzero(valid):
            probability = ref.softmax(w_router @ x[token])
            for choice in np.argsort(-probability)[:k]:
                if choice == copy:
                    out[token] += probability[choice] * x[token]
                elif choice > copy:
                    number = choice - copy - 1
                    alpha = ref.softmax(x[token] @ mix[number])
                    mixed = alpha[0] * x[token] + alpha[1] * constant[number]
                    out[token] += probability[choice] * mixed
        return out, (assignment,)

    return run


def of_expert_threshold(layer: mode.MixtureOfExperts, slots: int) -> Oracle:
    """Expert Threshold (arXiv:2603.11535): an expert selects the tokens above its threshold."""
    experts, w_router = oracle_experts(layer.experts), oracle_router(layer.router)
    threshold = f64(layer.router.state.threshold)

    def choose(scores: Any, valid: Any) -> ref.Assignment:
        return ref.threshold(scores - threshold, valid, slots)

    def run(x: Any, valid: Any, *_: Any) -> Any:
        out, assignment = ref.mixture_of_experts(x, w_router, experts, choose, "sigmoid", valid)
        return out, (assignment,)

    return run
