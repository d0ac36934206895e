"""The oracle: Mixture-of-Depths and its relatives as slow NumPy loops, written from the papers.

Everything is float64 and handles one group (one sequence) unless it says otherwise: `x` is
`[tokens, dim]` and `valid` is `[tokens]`, False on padding. `over_groups` adds leading axes.

- MoD: Raposo et al. 2024, arXiv:2404.02258.
- EC: Zhou et al. 2022, "Mixture-of-Experts with Expert Choice Routing", arXiv:2202.09368.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray


Floats: TypeAlias = NDArray[np.float64]
Ints: TypeAlias = NDArray[np.int64]
Bools: TypeAlias = NDArray[np.bool_]
Gate: TypeAlias = Literal["raw", "sigmoid", "tanh", "softmax", "selected_softmax"]


@dataclass(frozen=True)
class Assignment:
    """Who got a slot.

    `index` `[experts, capacity]`: token numbers, ascending in each row, `tokens` where empty.
    `load` `[choices]`: assignments asked for, before capacity limits; experts, then no-ops.
    """

    index: Ints
    load: Ints


Selector: TypeAlias = Callable[[Floats, Bools], Assignment]
Block: TypeAlias = Callable[[Floats, Ints, Ints], Floats]


def _f64(values: ArrayLike) -> Floats:
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


def token_capacity(num_tokens: int, fraction: float | Fraction, multiple_of: int = 1) -> int:
    """Slots of one expert: k = n c / e of EC, C of MoD section 3.1, made an integer."""
    slots = int(num_tokens * simplest_fraction(fraction))
    while slots % multiple_of != 0:
        slots += 1
    return max(1, min(num_tokens, slots))


# Selection


def _slots(taken: Sequence[Sequence[int]], num_tokens: int, capacity: int) -> Ints:
    index = np.full((len(taken), capacity), num_tokens, dtype=np.int64)
    for expert, members in enumerate(taken):
        for slot, token in enumerate(sorted(members)):
            index[expert, slot] = token
    return index


def expert_choice(scores: Floats, valid: Bools, num_experts: int, capacity: int) -> Assignment:
    """Each expert takes its best tokens: top-C of MoD section 3.4, top_k(S^T, k) of EC.

    Ties go to the lowest token; -inf is ineligible; a no-op choice takes nothing.
    """
    num_tokens, num_choices = scores.shape
    taken: list[list[int]] = []
    load = np.zeros(num_choices, dtype=np.int64)
    for expert in range(num_experts):
        eligible = [t for t in range(num_tokens) if valid[t] and scores[t, expert] > -np.inf]
        best_first = sorted(eligible, key=lambda t: (-scores[t, expert], t))
        taken.append(best_first[:capacity])
        load[expert] = len(taken[expert])
    return Assignment(_slots(taken, num_tokens, capacity), load)


def token_choice(
    scores: Floats, valid: Bools, num_experts: int, capacity: int, k: int
) -> Assignment:
    """Each token asks for its `k` best choices (MoD section 3.3); a full expert drops it.

    Tokens are served in time order, so that no later token can evict an earlier one. Ties go to
    the lowest choice. `load` counts what was asked, no-ops included.
    """
    num_tokens, num_choices = scores.shape
    taken: list[list[int]] = [[] for _ in range(num_experts)]
    load = np.zeros(num_choices, dtype=np.int64)
    for token in range(num_tokens):
        if not valid[token]:
            continue
        best_first = sorted(range(num_choices), key=lambda c: (-scores[token, c], c))
        for choice in best_first[:k]:
            load[choice] += 1
            if choice < num_experts and len(taken[choice]) < capacity:
                taken[choice].append(token)
    return Assignment(_slots(taken, num_tokens, capacity), load)


def threshold(logits: Floats, valid: Bools, slots: int) -> Assignment:
    """Causal rule of MoD section 3.5: a token goes in when sigmoid(logit) > 0.5, that is logit > 0.

    The paper sets no limit; here the first `slots` that ask get in, and `load` counts all who ask.
    """
    num_tokens, num_experts = logits.shape
    taken: list[list[int]] = [[] for _ in range(num_experts)]
    load = np.zeros(num_experts, dtype=np.int64)
    for token in range(num_tokens):
        for expert in range(num_experts):
            if valid[token] and logits[token, expert] > 0:
                load[expert] += 1
                if len(taken[expert]) < slots:
                    taken[expert].append(token)
    return Assignment(_slots(taken, num_tokens, slots), load)


def strided(valid: Bools, num_experts: int, capacity: int) -> Assignment:
    """Control without scores: min(capacity, n) evenly spaced valid tokens, a phase per expert."""
    ranked = [t for t in range(len(valid)) if valid[t]]
    n = len(ranked)
    taken: list[list[int]] = []
    for expert in range(num_experts):
        phase = expert * n // num_experts
        taken.append([])
        for r in range(n):
            if ((r + 1) * capacity + phase) // n != (r * capacity + phase) // n:
                taken[expert].append(ranked[r])
    load = np.array([len(members) for members in taken], dtype=np.int64)
    return Assignment(_slots(taken, len(valid), capacity), load)


def selected_mask(index: Ints, num_tokens: int) -> Bools:
    """`[tokens, experts]`: whether the expert gave the token a slot."""
    mask = np.zeros((num_tokens, len(index)), dtype=bool)
    for expert in range(len(index)):
        for token in index[expert]:
            if token < num_tokens:
                mask[token, expert] = True
    return mask


# Scores and gates


def logsumexp(logits: ArrayLike) -> float:
    """log(sum_i exp(logits_i)) of one vector."""
    return float(np.logaddexp.reduce(_f64(logits)))


def softmax(logits: ArrayLike) -> Floats:
    """exp(logits_i) / sum_j exp(logits_j) of one vector."""
    return np.exp(_f64(logits) - logsumexp(logits))


def sigmoid(x: ArrayLike) -> Floats:
    """1 / (1 + exp(-x)), in the form that cannot overflow."""
    return np.exp(-np.logaddexp(0.0, -_f64(x)))


def router_logits(x: Floats, w_router: Floats) -> Floats:
    """`[tokens, choices]`: r_i = w^T x_i for each choice's w (MoD section 3.4)."""
    return np.array([[_f64(w) @ _f64(token) for w in w_router] for token in x])


def selection_scores(logits: Floats, gate: Gate, bias: Floats | None = None) -> Floats:
    """What a selector ranks: log softmax (S of EC) or the logits, after the balancing bias.

    The log leaves each expert's ranking of tokens as the probabilities have it.
    """
    num_tokens, num_choices = logits.shape
    biased = _f64(logits) + (np.zeros(num_choices) if bias is None else _f64(bias))
    if gate in ("softmax", "selected_softmax"):
        return np.array([biased[t] - logsumexp(biased[t]) for t in range(num_tokens)])
    return biased


def combine_weights(logits: Floats, index: Ints, gate: Gate, scale: float = 1.0) -> Floats:
    """`[experts, capacity]`: the weight on each slot's output, 0 where empty; no bias enters.

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
        elif gate == "sigmoid":
            weights[expert, slot] = scale * sigmoid(logit)
        elif gate == "tanh":
            weights[expert, slot] = scale * np.tanh(logit)
        elif gate == "softmax":
            weights[expert, slot] = softmax(logits[token])[expert]
        elif gate == "selected_softmax":
            holders = [e for e in range(len(index)) if mask[token, e]]
            weights[expert, slot] = softmax(logits[token, holders])[holders.index(expert)]
        else:
            raise ValueError(f"unknown gate {gate!r}")
    return weights


# Layers


def mixture_of_depths(
    x: Floats,
    w_router: Floats,
    block: Block,
    fraction: float | Fraction,
    gate: Gate = "raw",
    valid: Bools | None = None,
    positions: Ints | None = None,
    segment_ids: Ints | None = None,
    *,
    scale: float = 1.0,
    select: Selector | None = None,
) -> tuple[Floats, Assignment]:
    """MoD eq. 1: x_i + r_i f_i(X~) for the selected tokens X~, x_i for the others.

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
        assignment = expert_choice(scores, valid, 1, token_capacity(num_tokens, fraction))
    else:
        assignment = select(scores, valid)
    weights = combine_weights(logits, assignment.index, gate, scale)

    out = _f64(x).copy()
    taken = [int(t) for t in assignment.index[0] if t < num_tokens]
    if taken:
        update = block(_f64(x)[taken], positions[taken], segment_ids[taken])
        for slot, token in enumerate(taken):
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
    """X_out of EC: out_t = sum over the experts that took t of weight * expert(x_t).

    No residual is added. `w_router` is `[choices, dim]`; the rows after the experts are the
    no-ops of integrated MoDE (MoD section 4.3): they compete in the scores and add nothing.
    """
    num_tokens = len(x)
    if valid is None:
        valid = np.ones(num_tokens, dtype=bool)
    logits = router_logits(x, w_router)
    assignment = select(selection_scores(logits, gate, bias), valid)
    weights = combine_weights(logits, assignment.index, gate, scale)

    out = np.zeros_like(_f64(x))
    for expert, slot in np.ndindex(assignment.index.shape):
        token = assignment.index[expert, slot]
        if token < num_tokens:
            out[token] += weights[expert, slot] * _f64(experts[expert](_f64(x)[token]))
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


# The transformer block


def rms_norm(x: Floats, weight: Floats, eps: float = 1e-6) -> Floats:
    """x / sqrt(mean(x^2) + eps) * weight (Zhang and Sennrich 2019, arXiv:1910.07467)."""
    return np.array([t / np.sqrt(np.mean(t * t) + eps) * weight for t in _f64(x)])


def rope(x: Floats, positions: Ints, theta: float = 10_000.0) -> Floats:
    """Rotary positions (Su et al. 2021, arXiv:2104.09864) on `[tokens, heads, head_dim]`.

    Split halves: the pair (x_i, x_{i + half}) turns by position * theta^(-2 i / head_dim).
    """
    num_tokens, num_heads, head_dim = x.shape
    half = head_dim // 2
    out = np.zeros(x.shape)
    for t, h, i in np.ndindex(num_tokens, num_heads, half):
        angle = float(positions[t]) * theta ** (-2 * i / head_dim)
        a, b = float(x[t, h, i]), float(x[t, h, i + half])
        out[t, h, i] = a * np.cos(angle) - b * np.sin(angle)
        out[t, h, i + half] = b * np.cos(angle) + a * np.sin(angle)
    return out


def causal_attention(q: Floats, k: Floats, v: Floats, segment_ids: Ints) -> Floats:
    """softmax(q k^T / sqrt(head_dim)) v over the past of the same segment, segment 0 excluded.

    `q` is `[tokens, heads, head_dim]`; `k` and `v` have kv_heads, each shared by
    heads // kv_heads query heads (Ainslie et al. 2023, arXiv:2305.13245). A query
    that sees no key gives zeros.
    """
    q, k, v = _f64(q), _f64(k), _f64(v)
    num_tokens, num_heads, head_dim = q.shape
    shared_by = num_heads // k.shape[1]
    out = np.zeros(q.shape)
    for i, h in np.ndindex(num_tokens, num_heads):
        g = h // shared_by
        seen = [j for j in range(i + 1) if segment_ids[j] == segment_ids[i] != 0]
        if seen:
            share = softmax([q[i, h] @ k[j, g] / np.sqrt(head_dim) for j in seen])
            out[i, h] = sum(p * v[j, g] for p, j in zip(share, seen, strict=True))
    return out


def gelu(x: Floats) -> Floats:
    """The tanh form (Hendrycks and Gimpel 2016, arXiv:1606.08415)."""
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def gelu_feedforward(x: Floats, w_up: Floats, w_down: Floats) -> Floats:
    """gelu(x w_up) w_down, weights `[in, out]`."""
    return gelu(_f64(x) @ _f64(w_up)) @ _f64(w_down)


def swiglu_feedforward(x: Floats, w_gate: Floats, w_up: Floats, w_down: Floats) -> Floats:
    """(silu(x w_gate) * (x w_up)) w_down (Shazeer 2020, arXiv:2002.05202)."""
    gate = _f64(x) @ _f64(w_gate)
    return (gate * sigmoid(gate) * (_f64(x) @ _f64(w_up))) @ _f64(w_down)


@dataclass(frozen=True)
class BlockParams:
    """A pre-norm block. Weights are `[in, out]`; `feedforward` maps `[tokens, dim]` to itself."""

    norm1: Floats
    w_q: Floats
    w_k: Floats
    w_v: Floats
    w_o: Floats
    norm2: Floats
    feedforward: Callable[[Floats], Floats]
    num_heads: int
    num_kv_heads: int
    theta: float = 10_000.0


def transformer_block_delta(
    x: Floats, params: BlockParams, positions: Ints, segment_ids: Ints
) -> Floats:
    """f of MoD eq. 1, attention and the MLP after it: a + ff(norm2(x + a)), a = attn(norm1(x))."""
    x = _f64(x)
    normed = rms_norm(x, params.norm1)
    q = (normed @ params.w_q).reshape(len(x), params.num_heads, -1)
    k = (normed @ params.w_k).reshape(len(x), params.num_kv_heads, -1)
    v = (normed @ params.w_v).reshape(len(x), params.num_kv_heads, -1)
    q, k = rope(q, positions, params.theta), rope(k, positions, params.theta)
    attended = causal_attention(q, k, v, segment_ids).reshape(len(x), -1) @ params.w_o
    return attended + params.feedforward(rms_norm(x + attended, params.norm2))


# Losses and metrics: these take leading group axes, and are 0 over nothing


def _ratio(numerator: float, denominator: float) -> float:
    return float(numerator / denominator) if denominator else 0.0


def _mean(values: Sequence[float]) -> float:
    return _ratio(sum(values), len(values))


def router_z_loss(logits: Floats, valid: Bools) -> float:
    """Mean over valid tokens of logsumexp(logits)^2 (ST-MoE, arXiv:2202.08906)."""
    return _mean([logsumexp(row) ** 2 for row in logits[valid]])


def load_balance_loss(logits: Floats, load: Ints, valid: Bools) -> float:
    """choices * sum_i f_i P_i (Switch, arXiv:2101.03961), mean of the groups with tokens.

    f_i is choice i's share of the load, P_i its mean probability over the group's valid tokens.
    """
    num_choices = logits.shape[-1]
    losses: list[float] = []
    for group in np.ndindex(valid.shape[:-1]):
        rows = logits[group][valid[group]]
        if len(rows) == 0:
            continue
        asked = float(sum(load[group]))
        total = 0.0
        for i in range(num_choices):
            total += _ratio(float(load[group][i]), asked) * _mean([softmax(r)[i] for r in rows])
        losses.append(num_choices * total)
    return _mean(losses)


def membership_bce(logits: Floats, selected: Bools, valid: Bools) -> float:
    """Mean over valid tokens and experts of the cross entropy of MoD section 3.5.

    `logits` and `selected` are `[..., tokens, experts]`.
    """
    losses: list[float] = []
    for logit, taken in zip(_f64(logits)[valid].flat, selected[valid].flat, strict=True):
        log_in, log_out = -np.logaddexp(0.0, -logit), -np.logaddexp(0.0, logit)
        losses.append(float(-log_in if taken else -log_out))
    return _mean(losses)


def coverage(selected: Bools, valid: Bools) -> float:
    """Share of valid tokens with at least one slot."""
    return _mean([float(any(row)) for row in selected[valid]])


def precision_recall(predicted: Bools, selected: Bools, valid: Bools) -> tuple[float, float]:
    """Of the predicted, the share selected; of the selected, the share predicted."""
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
    old: Floats, scores: Floats, valid: Bools, fraction: float | Fraction, rate: float, count: int
) -> Floats:
    """One update of each expert's threshold towards this batch's top-`fraction` cut-off.

    The idea of Expert Threshold routing (arXiv:2603.11535). The valid tokens of all groups are
    pooled; `old` is `[experts]`, `scores` `[..., tokens, experts]`, `count` the earlier updates.
    A batch without a valid token changes nothing.
    """
    pooled = _f64(scores)[valid]
    n = len(pooled)
    new = _f64(old).copy()
    if n == 0:
        return new
    k = max(1, min(n, round(simplest_fraction(fraction) * n)))
    for expert in range(len(new)):
        best_first = sorted(pooled[:, expert], reverse=True)
        # A threshold that everyone passes, finite so that averaging it makes no NaN.
        value = float(np.finfo(np.float32).min)
        if k < n:
            value = (best_first[k - 1] + best_first[k]) / 2
        new[expert] += max(rate, 1 / (count + 1)) * (value - new[expert])
    return new


def balancing_bias(bias: Floats, load: Ints, rate: float) -> Floats:
    """b_i + rate * sign(mean load - load_i), no-ops included (arXiv:2408.15664)."""
    totals = [sum(load[g][i] for g in np.ndindex(load.shape[:-1])) for i in range(load.shape[-1])]
    mean = sum(totals) / len(totals)
    return np.array([b + rate * np.sign(mean - t) for b, t in zip(bias, totals, strict=True)])
