"""The transformer block."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .assignment import Floats, Ints, as_float64
from .gates import sigmoid, softmax


def rms_norm(x: Floats, weight: Floats, eps: float = 1e-6) -> Floats:
    """x / sqrt(mean(x^2) + eps) * weight (Zhang and Sennrich 2019, arXiv:1910.07467)."""
    return np.array([t / np.sqrt(np.mean(t * t) + eps) * weight for t in as_float64(x)])


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


@dataclass(frozen=True)
class AttentionOptions:
    """What changes the scores of attention; by default the scale alone."""

    scale: float | None = None
    soft_cap: float | None = None
    window: int | None = None
    alibi: bool = False


def attention_score(
    q: Floats, k: Floats, distance: int, head: int, num_heads: int, options: AttentionOptions
) -> float:
    """The score of a query and a key `distance` positions earlier; `head` counts from 0.

    Scale: arXiv:1706.03762, eq. 1. Soft cap: arXiv:2408.00118, section 2. ALiBi: arXiv:2108.12409,
    section 3. A window makes it minus infinity at its length (arXiv:2004.05150, section 3.1).
    """
    if options.window is not None and distance >= options.window:
        return -np.inf
    score = float(q @ k) * (1 / np.sqrt(len(q)) if options.scale is None else options.scale)
    if options.soft_cap is not None:
        score = options.soft_cap * np.tanh(score / options.soft_cap)
    if options.alibi:
        score -= 2 ** (-8 * (head + 1) / num_heads) * distance
    return score


def causal_attention(
    q: Floats,
    k: Floats,
    v: Floats,
    segment_ids: Ints,
    positions: Ints | None = None,
    options: AttentionOptions = AttentionOptions(),
    index: Ints | None = None,
) -> Floats:
    """softmax(scores) v over the past of the same segment, segment 0 excluded.

    `index` says which of the tokens the queries are of, by default all of them.

    `q` is `[tokens, heads, head_dim]`; `k` and `v` have kv_heads, each shared by
    heads // kv_heads query heads (Ainslie et al. 2023, arXiv:2305.13245). A query
    that sees no key gives zeros. Distances are between `positions`, by default 0, 1, ...
    """
    q, k, v = as_float64(q), as_float64(k), as_float64(v)
    num_queries, num_heads, _ = q.shape
    shared_by = num_heads // k.shape[1]
    at = np.arange(len(k)) if positions is None else positions
    index = np.arange(len(k)) if index is None else index
    out = np.zeros(q.shape)
    for query, h in np.ndindex(num_queries, num_heads):
        g, i = h // shared_by, int(index[query])
        seen = [j for j in range(i + 1) if segment_ids[j] == segment_ids[i] != 0]
        if seen:
            weights = softmax(
                [
                    attention_score(q[query, h], k[j, g], int(at[i] - at[j]), h, num_heads, options)
                    for j in seen
                ]
            )
            out[query, h] = sum(p * v[j, g] for p, j in zip(weights, seen, strict=True))
    return out


def gelu(x: Floats) -> Floats:
    """The tanh form (Hendrycks and Gimpel 2016, arXiv:1606.08415)."""
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def gelu_feedforward(x: Floats, w_up: Floats, w_down: Floats) -> Floats:
    """gelu(x w_up) w_down, weights `[in, out]`."""
    return gelu(as_float64(x) @ as_float64(w_up)) @ as_float64(w_down)


def swiglu_feedforward(x: Floats, w_gate: Floats, w_up: Floats, w_down: Floats) -> Floats:
    """(silu(x w_gate) * (x w_up)) w_down (Shazeer 2020, arXiv:2002.05202)."""
    gate = as_float64(x) @ as_float64(w_gate)
    return (gate * sigmoid(gate) * (as_float64(x) @ as_float64(w_up))) @ as_float64(w_down)


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
    theta: float | None = 10_000.0
    options: AttentionOptions = AttentionOptions()


def transformer_block_delta(
    x: Floats,
    params: BlockParams,
    positions: Ints,
    segment_ids: Ints,
    weights: Floats | None = None,
    *,
    keys_of: Floats | None = None,
    index: Ints | None = None,
) -> Floats:
    """f of MoD eq. 1, attention and the MLP after it: a + ff(norm2(x + a)), a = attn(norm1(x)).

    `weights`, one for each token, multiply its values. Keys and values are those of `keys_of`, by
    default `x`, of which `positions` and `segment_ids` are too; `x` stands in it at `index`.
    """
    x = as_float64(x)
    keys_of = x if keys_of is None else as_float64(keys_of)
    index = np.arange(len(x)) if index is None else index
    normed, normed_keys = rms_norm(x, params.norm1), rms_norm(keys_of, params.norm1)
    q = (normed @ params.w_q).reshape(len(x), params.num_heads, -1)
    k = (normed_keys @ params.w_k).reshape(len(keys_of), params.num_kv_heads, -1)
    v = (normed_keys @ params.w_v).reshape(len(keys_of), params.num_kv_heads, -1)
    if weights is not None:
        v = np.array([weight * value for weight, value in zip(weights, v, strict=True)])
    if params.theta is not None:
        q, k = rope(q, positions[index], params.theta), rope(k, positions, params.theta)
    mixed = causal_attention(q, k, v, segment_ids, positions, params.options, index)
    attended = mixed.reshape(len(x), -1) @ params.w_o
    return attended + params.feedforward(rms_norm(x + attended, params.norm2))
