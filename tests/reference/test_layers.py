"""The oracle's gates and layers, against numbers worked out by hand."""

from typing import Any

import numpy as np

from tests import reference as ref


def column(*scores: float) -> ref.Floats:
    """One expert's scores, a row per token."""
    return np.array(scores, dtype=np.float64).reshape(-1, 1)


def all_valid(num_tokens: int) -> ref.Bools:
    return np.ones(num_tokens, dtype=bool)


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


def test_mixture_of_depths_by_absolute_weights() -> None:
    """Scores are 1, 4, 1 and 2 in size, so tokens 1 and 3; the block adds their weights, 4 and 2.

    x_1 + 4 * 4 = (-4 + 16, 1 + 16), x_3 + 2 * 2 = (2 + 4, 0 + 4).
    """
    x = np.array([[1.0, 7.0], [-4.0, 1.0], [-1.0, 5.0], [2.0, 0.0]])

    def block(x: ref.Floats, positions: ref.Ints, segments: ref.Ints, w: ref.Floats) -> ref.Floats:
        return np.stack([w, w], axis=1)

    y, got = ref.mixture_of_depths(x, np.array([1.0, 0.0]), block, 0.5)
    assert got.index.tolist() == [[1, 3]]
    assert y.tolist() == [[1.0, 7.0], [12.0, 17.0], [-1.0, 5.0], [6.0, 4.0]]


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
        "raw",
        positions=np.array([10, 11, 0, 1]),
        segment_ids=np.array([1, 1, 2, 2]),
        weigh_values=False,
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

    raw: Any = {"gate": "raw", "weigh_values": False}
    y, _ = ref.mixture_of_depths(x, np.ones(1), double, 0.25, **raw, valid=valid)
    assert y.ravel().tolist() == [1.0, 4.0, -1.0, 6.0]
    y, got = ref.mixture_of_depths(
        x, np.ones(1), double, 0.25, **raw, valid=valid, select=lambda s, v: ref.threshold(s, v, 3)
    )
    assert y.ravel().tolist() == [2.0, 4.0, -1.0, 6.0]
    assert got.index.tolist() == [[0, 3, 4]]
    y, _ = ref.mixture_of_depths(x, np.ones(1), double, 0.25, **raw, valid=np.zeros(4, dtype=bool))
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
