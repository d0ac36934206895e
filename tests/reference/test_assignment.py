"""The oracle's capacities and assignments, against numbers worked out by hand."""

from fractions import Fraction

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
