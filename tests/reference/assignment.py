"""Capacity and assignment: which tokens get a slot."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray


Floats: TypeAlias = NDArray[np.float64]
Ints: TypeAlias = NDArray[np.int64]
Bools: TypeAlias = NDArray[np.bool_]
Gate: TypeAlias = Literal["absolute", "raw", "sigmoid", "tanh", "softmax", "selected_softmax"]


@dataclass(frozen=True)
class Assignment:
    """The tokens that got a slot.

    `index` `[experts, slots]`: token numbers, ascending in each row, `tokens` where empty.
    `load` `[choices]`: requested assignments, before slots run out; experts, then no-ops.
    """

    index: Ints
    load: Ints


Selector: TypeAlias = Callable[[Floats, Bools], Assignment]
Block: TypeAlias = Callable[..., Floats]  # of tokens, positions, segments and maybe weights


def as_float64(values: ArrayLike) -> Floats:
    return np.asarray(values, dtype=np.float64)


# Capacity


def simplest_fraction(value: float | Fraction) -> Fraction:
    """The fraction of smallest denominator that equals `value` once rounded to a float."""
    if isinstance(value, Fraction):
        return value
    exact = Fraction(value)
    # Bisection is sound: a larger bound only brings the best fraction closer to the float.
    too_small, enough = 0, exact.denominator
    while enough - too_small > 1:
        middle = (too_small + enough) // 2
        if float(exact.limit_denominator(middle)) == value:
            enough = middle
        else:
            too_small = middle
    return exact.limit_denominator(enough)


def token_capacity(num_tokens: int, capacity: float | Fraction, multiple_of: int = 1) -> int:
    """Slots of one expert: k = n c / e of EC, C of MoD section 3.1, made an integer."""
    slots = int(num_tokens * simplest_fraction(capacity))
    while slots % multiple_of != 0:
        slots += 1
    return max(1, min(num_tokens, slots))


# Selection


def _fill(selected: Sequence[Sequence[int]], num_tokens: int, slots: int) -> Ints:
    index = np.full((len(selected), slots), num_tokens, dtype=np.int64)
    for expert, tokens in enumerate(selected):
        for slot, token in enumerate(sorted(tokens)):
            index[expert, slot] = token
    return index


def expert_choice(scores: Floats, valid: Bools, num_experts: int, slots: int) -> Assignment:
    """Each expert selects its best tokens: top-C of MoD section 3.4, top_k(S^T, k) of EC.

    Ties go to the lowest token; -inf is ineligible; a no-op choice selects nothing.
    """
    num_tokens, num_choices = scores.shape
    selected: list[list[int]] = []
    load = np.zeros(num_choices, dtype=np.int64)
    for expert in range(num_experts):
        eligible = [t for t in range(num_tokens) if valid[t] and scores[t, expert] > -np.inf]
        best_first = sorted(eligible, key=lambda t: (-scores[t, expert], t))
        selected.append(best_first[:slots])
        load[expert] = len(selected[expert])
    return Assignment(_fill(selected, num_tokens, slots), load)


def token_choice(scores: Floats, valid: Bools, num_experts: int, slots: int, k: int) -> Assignment:
    """Each token requests its `k` best choices (MoD section 3.3); a full expert drops it.

    Tokens are served in time order, so that no later token can evict an earlier one. Ties go to
    the lowest choice. `load` counts the requests, no-ops included.
    """
    num_tokens, num_choices = scores.shape
    selected: list[list[int]] = [[] for _ in range(num_experts)]
    load = np.zeros(num_choices, dtype=np.int64)
    for token in range(num_tokens):
        if not valid[token]:
            continue
        best_first = sorted(range(num_choices), key=lambda c: (-scores[token, c], c))
        for choice in best_first[:k]:
            load[choice] += 1
            if choice < num_experts and len(selected[choice]) < slots:
                selected[choice].append(token)
    return Assignment(_fill(selected, num_tokens, slots), load)


def threshold(logits: Floats, valid: Bools, slots: int) -> Assignment:
    """Causal rule of MoD section 3.5: a token is selected if sigmoid(logit) > 0.5: logit > 0.

    The paper has a slot for every token; here the first `slots` tokens that request one get one,
    and `load` counts all requests.
    """
    num_tokens, num_experts = logits.shape
    selected: list[list[int]] = [[] for _ in range(num_experts)]
    load = np.zeros(num_experts, dtype=np.int64)
    for token in range(num_tokens):
        for expert in range(num_experts):
            if valid[token] and logits[token, expert] > 0:
                load[expert] += 1
                if len(selected[expert]) < slots:
                    selected[expert].append(token)
    return Assignment(_fill(selected, num_tokens, slots), load)


def strided(valid: Bools, num_experts: int, slots: int) -> Assignment:
    """Control without scores: min(slots, n) evenly spaced valid tokens, a phase per expert."""
    ranked = [t for t in range(len(valid)) if valid[t]]
    n = len(ranked)
    selected: list[list[int]] = []
    for expert in range(num_experts):
        phase = expert * n // num_experts
        selected.append([])
        for r in range(n):
            if ((r + 1) * slots + phase) // n != (r * slots + phase) // n:
                selected[expert].append(ranked[r])
    load = np.array([len(tokens) for tokens in selected], dtype=np.int64)
    return Assignment(_fill(selected, len(valid), slots), load)


def selected_mask(index: Ints, num_tokens: int) -> Bools:
    """`[tokens, experts]`: whether the token has a slot of the expert."""
    mask = np.zeros((num_tokens, len(index)), dtype=bool)
    for expert in range(len(index)):
        for token in index[expert]:
            if token < num_tokens:
                mask[token, expert] = True
    return mask
