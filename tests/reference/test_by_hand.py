"""The oracle against numbers worked out by hand."""

from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from tests import reference as ref


def column(*scores: float) -> ref.Floats:
    """One expert's scores, a row per token."""
    return np.array(scores, dtype=np.float64).reshape(-1, 1)


def all_valid(num_tokens: int) -> ref.Bools:
    return np.ones(num_tokens, dtype=bool)


@pytest.mark.parametrize(
    ("num_tokens", "capacity", "multiple_of", "expected"),
    [
        (400, 1.1 / 8, 1, 55),  # 400 * 11 / 80 = 55; the float product is a hair above
        (30, 0.1, 1, 3),
        (10, 0.3, 1, 3),  # the float is below 3/10, so its exact value would go down to 2
        (2048, 0.125, 1, 256),
        (10, 0.19, 1, 1),  # 1.9 goes down
        (10, 0.19, 4, 4),  # 1, then up to 4
        (10, 0.9, 4, 10),  # 9, up to 12, no more than there are
        (7, 0.1, 1, 1),  # 0.7 goes down to 0, but one slot is the least
        (9, Fraction(1, 3), 1, 3),
        (9, 1 / 3, 1, 3),
        (8, 2.0, 1, 8),
    ],
)
def test_token_capacity(
    num_tokens: int, capacity: float | Fraction, multiple_of: int, expected: int
) -> None:
    assert ref.token_capacity(num_tokens, capacity, multiple_of) == expected


def test_simplest_fraction_finds_every_small_fraction_again() -> None:
    for denominator in range(1, 60):
        for numerator in range(2 * denominator):
            exact = Fraction(numerator, denominator)
            assert ref.simplest_fraction(numerator / denominator) == exact


def test_expert_choice_three_tokens_two_experts_one_slot() -> None:
    """Expert 0 scores 1, 3, 2: token 1 wins. Expert 1 scores 5, 6, 4: token 1 again.

    Token 1 is selected twice, tokens 0 and 2 never.
    """
    scores = np.array([[1.0, 5.0], [3.0, 6.0], [2.0, 4.0]])
    got = ref.expert_choice(scores, all_valid(3), num_experts=2, slots=1)
    assert got.index.tolist() == [[1], [1]]
    assert got.load.tolist() == [1, 1]
    mask = ref.selected_mask(got.index, 3)
    assert mask.tolist() == [[False, False], [True, True], [False, False]]


def test_expert_choice_ties_go_to_the_lowest_token_and_rows_ascend() -> None:
    """Of 2, 7, 2, 2 the best two are token 1, then token 0, the first of the three 2s."""
    got = ref.expert_choice(column(2, 7, 2, 2), all_valid(4), 1, 2)
    assert got.index.tolist() == [[0, 1]]


def test_expert_choice_leaves_slots_empty_rather_than_select_padding_or_minus_infinity() -> None:
    """Token 0 has the best score but is padding, token 2 is ineligible: 1 and 3 remain."""
    valid = np.array([False, True, True, True])
    got = ref.expert_choice(column(9, 1, -np.inf, 0), valid, 1, 3)
    assert got.index.tolist() == [[1, 3, 4]]
    assert got.load.tolist() == [2]


def test_expert_choice_no_op_selects_nothing() -> None:
    """The third choice scores highest everywhere; the two experts still fill their slot."""
    scores = np.array([[1.0, 0.0, 9.0], [0.0, 1.0, 9.0]])
    got = ref.expert_choice(scores, all_valid(2), num_experts=2, slots=1)
    assert got.index.tolist() == [[0], [1]]
    assert got.load.tolist() == [1, 1, 0]


def test_token_choice_later_token_cannot_evict_an_earlier_one() -> None:
    """All three request expert 0, token 2 with the best score; the one slot goes to token 0."""
    scores = np.array([[1.0, 0.0], [5.0, 0.0], [9.0, 0.0]])
    got = ref.token_choice(scores, all_valid(3), num_experts=2, slots=1, k=1)
    assert got.index.tolist() == [[0], [3]]
    assert got.load.tolist() == [3, 0]


def test_token_choice_no_op_ties_and_padding() -> None:
    """Two experts and a no-op, best two choices of each token.

    Token 0 (1, 2, 3): no-op and expert 1. Token 1 (4, 4, 4): experts 0 and 1, the lowest of the
    tie. Token 2 is padding. Token 3 (5, 1, 2): expert 0 and the no-op. No expert is over 2.
    """
    scores = np.array([[1.0, 2.0, 3.0], [4.0, 4.0, 4.0], [9.0, 9.0, 0.0], [5.0, 1.0, 2.0]])
    valid = np.array([True, True, False, True])
    got = ref.token_choice(scores, valid, num_experts=2, slots=2, k=2)
    assert got.index.tolist() == [[1, 3], [0, 1]]
    assert got.load.tolist() == [2, 2, 2]


def test_threshold_first_come_first_served() -> None:
    """Tokens 1, 2 and 4 are positive (0 is not, 5 is padding); two slots, so 4 is dropped."""
    valid = np.array([True, True, True, True, True, False])
    got = ref.threshold(column(0.0, 0.1, 2.0, -1.0, 9.0, 9.0), valid, slots=2)
    assert got.index.tolist() == [[1, 2]]
    assert got.load.tolist() == [3]
    roomy = ref.threshold(column(0.0, 0.1, 2.0, -1.0, 9.0, 9.0), valid, slots=4)
    assert roomy.index.tolist() == [[1, 2, 4, 6]]


def test_strided_spreads_over_the_valid_tokens() -> None:
    """Token 0 is padding, so ranks 0..4 are tokens 1..5; n = 5, C = 2.

    Expert 0, p = 0: (r * 2) // 5 for r = 0..5 is 0 0 0 1 1 2; it steps after ranks 2 and 4.
    Expert 1, p = 5 // 2 = 2: (r * 2 + 2) // 5 is 0 0 1 1 2 2; it steps after ranks 1 and 3.
    """
    valid = np.array([False, True, True, True, True, True])
    got = ref.strided(valid, num_experts=2, slots=2)
    assert got.index.tolist() == [[3, 5], [2, 4]]
    assert got.load.tolist() == [2, 2]
    assert ref.strided(valid, 1, 7).index.tolist() == [[1, 2, 3, 4, 5, 6, 6]]
    assert ref.strided(np.zeros(3, dtype=bool), 1, 2).index.tolist() == [[3, 3]]


def test_softmax_scores_compete_over_choices_and_logits_do_not() -> None:
    """Token 0 has the larger logit for expert 0 (3 > 2) but the smaller probability.

    Logits (3, 5): log p = 3 - log(e^3 + e^5) = -log(1 + e^2) = -2.127.
    Logits (2, 0): log p = -log(1 + e^-2) = -0.127.
    """
    logits = np.array([[3.0, 5.0], [2.0, 0.0]])
    scores = ref.selection_scores(logits, "softmax")
    np.testing.assert_allclose(scores[:, 0], [-2.126928, -0.126928], atol=1e-6)
    assert ref.expert_choice(scores, all_valid(2), 2, 1).index[0].tolist() == [1]
    raw = ref.selection_scores(logits, "raw")
    assert ref.expert_choice(raw, all_valid(2), 2, 1).index[0].tolist() == [0]


def test_bias_moves_the_choice_and_never_the_weight() -> None:
    """A bias of 3 on expert 1 turns (2, 0) into (2, 3); the gate still reads sigmoid(0) = 1/2."""
    logits = np.array([[2.0, 0.0]])
    scores = ref.selection_scores(logits, "sigmoid", bias=np.array([0.0, 3.0]))
    assert scores.tolist() == [[2.0, 3.0]]
    got = ref.token_choice(scores, all_valid(1), 2, 1, k=1)
    assert got.index.tolist() == [[1], [0]]
    assert ref.combine_weights(logits, got.index, "sigmoid").tolist() == [[0.0], [0.5]]


def test_combine_weights_of_every_gate() -> None:
    """Exponentials of token 0: 1, 3, 4 (a no-op), of token 1: 2, 2, 1.

    Expert 0 selected token 0; expert 1 selected tokens 0 and 1. Softmax over all: 1/8; 3/8 and
    2/5. Over the experts that selected a token: 1/4 and 3/4 of token 0, and 1 of token 1.
    sigmoid(log a) = a / (1 + a): 1/2; 3/4 and 2/3.
    tanh(log a) = (a^2 - 1) / (a^2 + 1): 0; 0.8 and 0.6.
    """
    logits = np.log([[1.0, 3.0, 4.0], [2.0, 2.0, 1.0]])
    index = np.array([[0, 2], [0, 1]])
    expected: dict[ref.Gate, list[list[float]]] = {
        "raw": [[0.0, 0.0], [np.log(3), np.log(2)]],
        "softmax": [[1 / 8, 0.0], [3 / 8, 2 / 5]],
        "selected_softmax": [[1 / 4, 0.0], [3 / 4, 1.0]],
    }
    for gate, weights in expected.items():
        np.testing.assert_allclose(ref.combine_weights(logits, index, gate), weights, atol=1e-15)
    doubled = ref.combine_weights(logits, index, "sigmoid", scale=2.0)
    np.testing.assert_allclose(doubled, [[1.0, 0.0], [1.5, 4 / 3]])
    halved = ref.combine_weights(logits, index, "tanh", scale=0.5)
    np.testing.assert_allclose(halved, [[0.0, 0.0], [0.4, 0.3]], atol=1e-15)


def test_mixture_of_depths_equation_one() -> None:
    """Scores are the first coordinate: 1, 4, -1, 2. Half of four tokens: 1 and 3.

    The block adds up the selected tokens before and at each one: f_1 = (4, 1), f_3 = (6, 1).
    x_1 + 4 f_1 = (4 + 16, 1 + 4), x_3 + 2 f_3 = (2 + 12, 0 + 2).
    """
    x = np.array([[1.0, 7.0], [4.0, 1.0], [-1.0, 5.0], [2.0, 0.0]])
    seen: list[list[int]] = []

    def block(x: ref.Floats, positions: ref.Ints, segment_ids: ref.Ints) -> ref.Floats:
        seen.append(positions.tolist())
        seen.append(segment_ids.tolist())
        return np.cumsum(x, axis=0)

    y, got = ref.mixture_of_depths(
        x,
        np.array([1.0, 0.0]),
        block,
        0.5,
        positions=np.array([10, 11, 0, 1]),
        segment_ids=np.array([1, 1, 2, 2]),
    )
    assert got.index.tolist() == [[1, 3]]
    assert seen == [[11, 1], [1, 2]]
    assert y.tolist() == [[1.0, 7.0], [20.0, 5.0], [-1.0, 5.0], [14.0, 2.0]]


def test_mixture_of_depths_padding_other_selectors_and_nobody() -> None:
    """Token 1 scores best but is padding, so token 3 alone has a slot: 2 + 2 * 2 = 6.

    Under the threshold rule tokens 0 and 3 are positive: 1 + 1 * 1 = 2 and 6.
    """
    x = column(1, 4, -1, 2)
    valid = np.array([True, False, True, True])

    def double(x: ref.Floats, positions: ref.Ints, segment_ids: ref.Ints) -> ref.Floats:
        return x

    y, _ = ref.mixture_of_depths(x, np.ones(1), double, 0.25, valid=valid)
    assert y.ravel().tolist() == [1.0, 4.0, -1.0, 6.0]
    y, got = ref.mixture_of_depths(
        x, np.ones(1), double, 0.25, valid=valid, select=lambda s, v: ref.threshold(s, v, 3)
    )
    assert y.ravel().tolist() == [2.0, 4.0, -1.0, 6.0]
    assert got.index.tolist() == [[0, 3, 4]]
    y, _ = ref.mixture_of_depths(x, np.ones(1), double, 0.25, valid=np.zeros(4, dtype=bool))
    assert y.tolist() == x.tolist()


def test_mixture_of_experts_with_a_no_op() -> None:
    """Exponentials of (expert 0, expert 1, no-op): token 0 (1, 2, 1), token 1 (1, 1, 2).

    Expert 0 adds one and expert 1 multiplies by ten. Expert choice, one slot each: both
    probabilities of expert 0 are 1/4, so token 0; expert 1 has 1/2 and 1/4, so token 0.
    Token 0 = e_0 = (1, 0): 1/4 * (2, 1) + 1/2 * (10, 0) = (5.5, 0.25). Token 1 gets nothing.
    Token choice, best one: token 0 goes to expert 1, 1/2 * (10, 0); token 1 to the no-op.
    """
    x = np.eye(2)
    w_router = np.log([[1.0, 1.0], [2.0, 1.0], [1.0, 2.0]])
    experts = [lambda v: v + 1.0, lambda v: v * 10.0]
    y, got = ref.mixture_of_experts(
        x, w_router, experts, lambda s, v: ref.expert_choice(s, v, 2, 1)
    )
    assert got.index.tolist() == [[0], [0]]
    np.testing.assert_allclose(y, [[5.5, 0.25], [0.0, 0.0]])
    y, got = ref.mixture_of_experts(
        x, w_router, experts, lambda s, v: ref.token_choice(s, v, 2, 1, k=1)
    )
    assert got.load.tolist() == [0, 1, 1]
    np.testing.assert_allclose(y, [[5.0, 0.0], [0.0, 0.0]])


def test_over_groups_routes_each_group_by_itself() -> None:
    """Group 0 scores 5, 6 and group 1 scores 1, 0: each fills its own slot."""
    scores = np.array([[[5.0], [6.0]], [[1.0], [0.0]]])
    got = ref.over_groups(
        lambda s, v: ref.expert_choice(s, v, 1, 1), 1, scores, np.ones((2, 2), dtype=bool)
    )
    assert got.index.tolist() == [[[1]], [[0]]]
    assert got.load.tolist() == [[1], [1]]
    low, high = ref.over_groups(lambda s: (s.min(), s.max()), 1, scores)
    assert low.tolist() == [5.0, 0.0]
    assert high.tolist() == [6.0, 1.0]
    assert ref.over_groups(lambda s: s.sum(), 0, scores[0]).tolist() == 11.0


def test_causal_attention_segments_and_shared_heads() -> None:
    """Four query heads share two key heads; segments 1 1 2 0; keys are zero except one.

    Token 0 sees itself; token 1 averages 0 and 1; token 2 starts a segment; token 3 is padding.
    Heads 0 and 1 read kv head 0 (values 1, 3, 5), heads 2 and 3 kv head 1 (10, 30, 50). In head 3
    q k / sqrt(4) = 4 * log(3) / 2 * 1/2 = log 3 for token 1's own key: 1/4 * 10 + 3/4 * 30 = 25.
    """
    q = np.zeros((4, 4, 4))
    k = np.zeros((4, 2, 4))
    k[1, 1, 0] = 0.5
    q[1, 3, 0] = 4 * np.log(3)
    v = np.zeros((4, 2, 4))
    v[:, 0] = np.array([1.0, 3.0, 5.0, np.nan])[:, None]
    v[:, 1] = np.array([10.0, 30.0, 50.0, np.nan])[:, None]
    out = ref.causal_attention(q, k, v, np.array([1, 1, 2, 0]))
    assert (out == out[:, :, :1]).all()
    expected = [[1, 1, 10, 10], [2, 2, 20, 25], [5, 5, 50, 50], [0, 0, 0, 0]]
    np.testing.assert_allclose(out[:, :, 0], expected)


@pytest.mark.parametrize(
    ("distance", "head", "options", "expected"),
    [
        (0, 0, {}, 4.0),  # 8 / sqrt(4)
        (0, 0, {"scale": 0.25}, 2.0),
        (0, 0, {"soft_cap": 2.0}, 2 * np.tanh(2.0)),
        (2, 0, {"window": 3}, 4.0),
        (3, 0, {"window": 3}, -np.inf),
        (6, 0, {"alibi": True}, 4 - 6 / 16),  # two heads: slopes 2^-4 and 2^-8
        (6, 1, {"alibi": True}, 4 - 6 / 256),
        (6, 1, {"alibi": True, "soft_cap": 2.0}, 2 * np.tanh(2.0) - 6 / 256),  # the cap comes first
    ],
)
def test_attention_score(
    distance: int, head: int, options: dict[str, Any], expected: float
) -> None:
    """A product of 8 in 4 dimensions."""
    q, k = np.array([1.0, 1.0, 2.0, 0.0]), np.array([2.0, 2.0, 2.0, 9.0])
    got = ref.attention_score(q, k, distance, head, 2, ref.AttentionOptions(**options))
    assert got == pytest.approx(expected)


def test_distances_are_between_positions() -> None:
    """Token 2 stands 4 after token 1 and 5 after token 0: a window of 5 leaves 1 and itself."""
    q = k = np.zeros((3, 1, 2))
    v = np.array([2.0, 4.0, 8.0])[:, None, None] * np.ones((1, 1, 2))
    options, positions = ref.AttentionOptions(window=5), np.array([0, 1, 5])
    out = ref.causal_attention(q, k, v, np.ones(3, np.int64), positions, options)
    assert out[:, 0, 0].tolist() == [2.0, 3.0, 6.0]


def test_rope_turns_split_halves_by_position_and_frequency() -> None:
    """head_dim 4, theta 4: frequencies 4^0 = 1 for the pair (0, 2) and 4^-1/2 = 1/2 for (1, 3).

    At position pi the first pair turns half round and the second a quarter: (1, 0) to (0, 1).
    """
    x = np.array([[[1.0, 1.0, 2.0, 0.0]]])
    turned = ref.rope(x, np.array([np.pi]), theta=4.0)
    np.testing.assert_allclose(turned, [[[-1.0, 0.0, -2.0, 1.0]]], atol=1e-15)
    assert ref.rope(x, np.array([0])).tolist() == x.tolist()


def test_norm_and_activations() -> None:
    """mean(3^2, 4^2) = 12.5. gelu(1) = 0.8412 (tanh form). silu(log 3) = log 3 * 3/4."""
    np.testing.assert_allclose(
        ref.rms_norm(np.array([[3.0, 4.0]]), np.array([1.0, 2.0])),
        [[3 / np.sqrt(12.5), 8 / np.sqrt(12.5)]],
        rtol=1e-6,
    )
    assert ref.gelu(np.array(1.0)) == pytest.approx(0.841192, abs=1e-6)
    one = np.ones((1, 1))
    assert ref.gelu_feedforward(one, 2 * one, 3 * one).item() == pytest.approx(
        3 * ref.gelu(np.array(2.0))
    )
    got = ref.swiglu_feedforward(one, np.log([[3.0]]), 2 * one, 5 * one)
    assert got.item() == pytest.approx(np.log(3) * 0.75 * 2 * 5)


def test_block_delta_is_attention_plus_feedforward_without_the_input() -> None:
    """Zero queries make attention a plain average, and the identity feed-forward shows its input.

    Tokens (1, 1) and (1, -1) are their own norms (mean square 1, but for eps). Values double them:
    a_0 = (2, 2), a_1 = average = (2, 0). x + a = (3, 3) and (3, -1), of mean squares 9 and 5.
    Delta = (2, 2) + (1, 1) and (2, 0) + (3, -1) / sqrt(5).
    """
    params = ref.BlockParams(
        norm1=np.ones(2),
        w_q=np.zeros((2, 2)),
        w_k=np.eye(2),
        w_v=np.eye(2),
        w_o=2 * np.eye(2),
        norm2=np.ones(2),
        feedforward=lambda x: x,
        num_heads=1,
        num_kv_heads=1,
    )
    delta = ref.transformer_block_delta(
        np.array([[1.0, 1.0], [1.0, -1.0]]), params, np.array([3, 8]), np.array([1, 1])
    )
    expected = [[3.0, 3.0], [2 + 3 / np.sqrt(5), -1 / np.sqrt(5)]]
    np.testing.assert_allclose(delta, expected, rtol=1e-5)


def test_losses() -> None:
    """Two groups of two tokens, two choices; the last token is padding.

    Exponentials (1, 3), (1, 1) and (3, 1): logsumexps log 4, log 2, log 4.
    Group 0: P = (1/4 + 1/2, 3/4 + 1/2) / 2 = (3/8, 5/8), load (1, 3): 2 * (3/32 + 15/32) = 9/8.
    Group 1: P = (3/4, 1/4), load (1, 0): 2 * 3/4 = 3/2. Mean 21/16.
    """
    logits = np.log([[[1.0, 3.0], [1.0, 1.0]], [[3.0, 1.0], [1.0, 1.0]]])
    logits[1, 1] = np.nan
    valid = np.array([[True, True], [True, False]])
    assert ref.router_z_loss(logits, valid) == pytest.approx(np.log(2) ** 2 * (4 + 1 + 4) / 3)
    load = np.array([[1, 3], [1, 0]])
    assert ref.load_balance_loss(logits, load, valid) == pytest.approx(21 / 16)
    nobody = np.array([[True, True], [False, False]])
    assert ref.load_balance_loss(logits, load, nobody) == pytest.approx(9 / 8)
    entropy = 2 * (np.log(4) - 0.75 * np.log(3)) + np.log(2)
    assert ref.router_entropy(logits, valid) == pytest.approx(entropy / 3)


def test_selection_bce_and_metrics() -> None:
    """Probabilities 3/4 (in), 1/2 (out), 3/4 (out), then padding.

    BCE = (log 4/3 + log 2 + log 4) / 3. Predicted: tokens 0 and 2; selected: token 0 and 3, the
    last padding. Precision 1/2, recall 1, coverage 1/3.
    """
    logits = np.log(column(3, 1, 3, 1))
    selected = np.array([[True], [False], [False], [True]])
    valid = np.array([True, True, True, False])
    expected = (np.log(4 / 3) + np.log(2) + np.log(4)) / 3
    assert ref.selection_bce(logits, selected, valid) == pytest.approx(expected)
    assert ref.precision_recall(logits > 0, selected, valid) == (0.5, 1.0)
    assert ref.coverage(selected, valid) == pytest.approx(1 / 3)
    assert ref.selection_bce(np.array([[1000.0]]), selected[1:2], all_valid(1)) == 1000.0


def test_running_quantile() -> None:
    """Five valid scores 9, 7, 4, 2, 1 in two groups; half of five is 2.5, to even 2.

    The midpoint of 7 and 4 is 5.5. First update: all the way. Second (count 1): 1/2 of the way
    from 1.5: 3.5. Eleventh: 1/11 is below the rate 0.2, so 1.5 + 0.2 * 4 = 2.3.
    """
    scores = np.array([[[1.0], [9.0], [4.0]], [[2.0], [100.0], [7.0]]])
    valid = np.array([[True, True, True], [True, False, True]])
    old = np.array([1.5])

    def update(capacity: float, count: int) -> float:
        return ref.running_quantile(old, scores, valid, capacity, 0.2, count).item()

    assert update(0.5, 0) == 5.5
    assert update(0.5, 1) == 3.5
    assert update(0.5, 10) == pytest.approx(2.3)
    assert update(0.01, 0) == 8.0
    assert update(1.0, 0) == np.finfo(np.float32).min
    assert ref.running_quantile(old, scores, valid & False, 0.5, 0.2, 0).item() == 1.5


def test_balancing_bias() -> None:
    """Loads 1 + 2, 4 + 2, 3 + 0 and 0 + 4 of two groups: 3, 6, 3, 4, mean 4."""
    load = np.array([[1, 4, 3, 0], [2, 2, 0, 4]])
    bias = np.array([0.0, 1.0, 2.0, 3.0])
    got = ref.balancing_bias(bias, load, 0.5)
    assert got.tolist() == [0.5, 0.5, 2.5, 3.0]
