"""Scores and gates: from logits to the scores of a selector and the weights of the slots."""

import numpy as np
from numpy.typing import ArrayLike

from .assignment import Floats, Gate, Ints, as_float64, selected_mask


def logsumexp(logits: ArrayLike) -> float:
    """log(sum_i exp(logits_i)) of one vector."""
    return float(np.logaddexp.reduce(as_float64(logits)))


def softmax(logits: ArrayLike) -> Floats:
    """exp(logits_i) / sum_j exp(logits_j) of one vector."""
    return np.exp(as_float64(logits) - logsumexp(logits))


def sigmoid(x: ArrayLike) -> Floats:
    """1 / (1 + exp(-x)), in the form that cannot overflow."""
    return np.exp(-np.logaddexp(0.0, -as_float64(x)))


def router_logits(x: Floats, w_router: Floats) -> Floats:
    """`[tokens, choices]`: r_i = w^T x_i for each choice's w (MoD section 3.4)."""
    return np.array([[as_float64(w) @ as_float64(token) for w in w_router] for token in x])


def selection_scores(logits: Floats, gate: Gate, bias: Floats | None = None) -> Floats:
    """What a selector ranks: log softmax (S of EC) or the logits, after the balancing bias.

    The log leaves each expert's ranking of tokens as the probabilities have it.
    """
    num_tokens, num_choices = logits.shape
    biased = as_float64(logits) + (np.zeros(num_choices) if bias is None else as_float64(bias))
    if gate == "absolute":
        return np.abs(biased)
    if gate in ("softmax", "selected_softmax"):
        return np.array([biased[t] - logsumexp(biased[t]) for t in range(num_tokens)])
    return biased


def combine_weights(logits: Floats, index: Ints, gate: Gate, scale: float = 1.0) -> Floats:
    """`[experts, slots]`: the weight of each slot's output, 0 where empty; no bias enters.

    raw is MoD eq. 1 as printed; softmax is G of EC, over all choices, not renormalised.
    """
    num_tokens = len(logits)
    mask = selected_mask(index, num_tokens)
    weights = np.zeros(index.shape)
    for expert, slot in np.ndindex(index.shape):
        token = index[expert, slot]
        if token == num_tokens:
            continue
        logit = float(logits[token, expert])
        if gate == "raw":
            weights[expert, slot] = logit
        elif gate == "absolute":
            weights[expert, slot] = max(logit, -logit)
        elif gate == "sigmoid":
            weights[expert, slot] = scale * sigmoid(logit)
        elif gate == "tanh":
            weights[expert, slot] = scale * np.tanh(logit)
        elif gate == "softmax":
            weights[expert, slot] = softmax(logits[token])[expert]
        elif gate == "selected_softmax":
            chosen = [e for e in range(len(index)) if mask[token, e]]
            weights[expert, slot] = softmax(logits[token, chosen])[chosen.index(expert)]
        else:
            raise ValueError(f"unknown gate {gate!r}")
    return weights
