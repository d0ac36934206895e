"""Losses, metrics and selector state. They take leading group axes, and are 0 over nothing."""

from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from .assignment import Bools, Floats, Ints, as_float64, simplest_fraction
from .gates import logsumexp, softmax


def _ratio(numerator: float, denominator: float) -> float:
    return float(numerator / denominator) if denominator else 0.0


def _mean(values: Sequence[float]) -> float:
    return _ratio(sum(values), len(values))


def router_z_loss(logits: Floats, valid: Bools) -> float:
    """Mean over valid tokens of logsumexp(logits)^2 (ST-MoE, arXiv:2202.08906)."""
    return _mean([logsumexp(row) ** 2 for row in logits[valid]])


def router_l1_loss(logits: Floats, valid: Bools) -> float:
    """Mean over valid tokens of the mean of |logit| over their choices."""
    return _mean([_mean([abs(logit) for logit in row]) for row in logits[valid]])


def load_balance_loss(logits: Floats, load: Ints, valid: Bools) -> float:
    """choices * sum_i f_i P_i (Switch, arXiv:2101.03961), mean of the groups with tokens.

    f_i is choice i's fraction of the load, P_i its mean probability over the group's valid tokens.
    """
    num_choices = logits.shape[-1]
    losses: list[float] = []
    for group in np.ndindex(valid.shape[:-1]):
        rows = logits[group][valid[group]]
        if len(rows) == 0:
            continue
        requested = float(sum(load[group]))
        total = 0.0
        for i in range(num_choices):
            total += _ratio(float(load[group][i]), requested) * _mean([softmax(r)[i] for r in rows])
        losses.append(num_choices * total)
    return _mean(losses)


def selection_bce(logits: Floats, selected: Bools, valid: Bools) -> float:
    """Mean over valid tokens and experts of the cross entropy of MoD section 3.5.

    `logits` and `selected` are `[..., tokens, experts]`.
    """
    losses: list[float] = []
    for logit, target in zip(as_float64(logits)[valid].flat, selected[valid].flat, strict=True):
        log_in, log_out = -np.logaddexp(0.0, -logit), -np.logaddexp(0.0, logit)
        losses.append(float(-log_in if target else -log_out))
    return _mean(losses)


def coverage(selected: Bools, valid: Bools) -> float:
    """Fraction of valid tokens with at least one slot."""
    return _mean([float(any(row)) for row in selected[valid]])


def precision_recall(predicted: Bools, selected: Bools, valid: Bools) -> tuple[float, float]:
    """Fraction of the predicted that is selected, and of the selected that is predicted."""
    pairs = list(zip(predicted[valid].flat, selected[valid].flat, strict=True))
    hits = sum(1 for p, s in pairs if p and s)
    return (
        _ratio(hits, sum(1 for p, _ in pairs if p)),
        _ratio(hits, sum(1 for _, s in pairs if s)),
    )


def router_entropy(logits: Floats, valid: Bools) -> float:
    """Mean over valid tokens of -sum_i p_i log p_i, in nats."""
    return _mean([-sum(float(p * np.log(p)) for p in softmax(r) if p > 0) for r in logits[valid]])


# Selector state: these take leading group axes


def running_quantile(
    old: Floats, scores: Floats, valid: Bools, capacity: float | Fraction, rate: float, count: int
) -> Floats:
    """One update of each expert's threshold towards this batch's top-`capacity` cut-off.

    The idea of Expert Threshold routing (arXiv:2603.11535). The valid tokens of all groups are
    pooled; `old` is `[experts]`, `scores` `[..., tokens, experts]`, `count` the earlier updates.
    A batch of fewer than 1 / capacity valid tokens, none of which could be among the best, changes
    nothing, nor does an infinite score at the cut.
    """
    pooled = as_float64(scores)[valid]
    n = len(pooled)
    new = as_float64(old).copy()
    if n == 0 or n * simplest_fraction(capacity) < 1:
        return new
    k = max(1, min(n, round(simplest_fraction(capacity) * n)))
    for expert in range(len(new)):
        best_first = sorted(pooled[:, expert], reverse=True)
        if capacity >= 1:  # a threshold that every token passes, finite so that averages are
            value = float(np.finfo(np.float32).min)
        elif k < n:
            value = (best_first[k - 1] + best_first[k]) / 2
        else:
            value = best_first[-1]
        if not np.isfinite(value):
            continue
        new[expert] += max(rate, 1 / (count + 1)) * (value - new[expert])
    return new


def balancing_bias(bias: Floats, load: Ints, rate: float) -> Floats:
    """b_i + rate * sign(mean load - load_i), no-ops included (arXiv:2408.15664)."""
    totals = [sum(load[g][i] for g in np.ndindex(load.shape[:-1])) for i in range(load.shape[-1])]
    mean = sum(totals) / len(totals)
    return np.array([b + rate * np.sign(mean - t) for b, t in zip(bias, totals, strict=True)])
