"""`token_capacity` against exact fractions."""

from fractions import Fraction

import pytest
from hypothesis import given, settings, strategies as st

import mode
from tests import reference as ref


tokens = st.integers(1, 1 << 17)
multiples = st.integers(1, 300)
decimals = st.builds(lambda n, digits: n / 10**digits, st.integers(1, 20_000), st.integers(0, 4))
quotients = st.builds(lambda n, d: n / d, st.integers(1, 400), st.integers(1, 300))
capacities = st.one_of(decimals, quotients, st.floats(1e-6, 2.0), st.fractions(Fraction(1, 999), 2))
checked = settings(deadline=None, derandomize=True, max_examples=300)


@checked
@given(tokens, capacities, multiples)
def test_equals_exact_arithmetic(
    num_tokens: int, capacity: float | Fraction, multiple_of: int
) -> None:
    """No capacity of any length is rounded otherwise than in fractions."""
    expected = ref.token_capacity(num_tokens, capacity, multiple_of)
    assert mode.token_capacity(num_tokens, capacity, multiple_of=multiple_of) == expected


@checked
@given(tokens, quotients.filter(lambda capacity: capacity <= 1))
def test_never_exceeds_the_budget_by_a_slot(num_tokens: int, capacity: float) -> None:
    """The slots are at most the product, and less than one slot below it."""
    budget = num_tokens * ref.simplest_fraction(capacity)
    slots = mode.token_capacity(num_tokens, capacity)
    assert slots == 1 or budget - 1 < slots <= budget


@checked
@given(tokens, capacities, multiples)
def test_bounds_and_alignment(
    num_tokens: int, capacity: float | Fraction, multiple_of: int
) -> None:
    """Between 1 and all tokens, aligned unless that is more than all tokens, a Python int."""
    slots = mode.token_capacity(num_tokens, capacity, multiple_of=multiple_of)
    assert type(slots) is int
    assert 1 <= slots <= num_tokens
    assert slots in (1, num_tokens) or slots % multiple_of == 0
    assert slots >= mode.token_capacity(num_tokens, capacity)


@checked
@given(tokens, tokens, capacities, capacities, multiples)
def test_monotone(
    few: int, many: int, low: float | Fraction, high: float | Fraction, multiple_of: int
) -> None:
    """More tokens or a larger capacity never mean fewer slots."""
    few, many = sorted((few, many))
    low, high = sorted((low, high))
    slots = mode.token_capacity(few, low, multiple_of=multiple_of)
    assert slots <= mode.token_capacity(many, low, multiple_of=multiple_of)
    assert slots <= mode.token_capacity(few, high, multiple_of=multiple_of)


@pytest.mark.parametrize("num_experts", [1, 2, 3, 5, 7, 8, 12, 48, 64, 100, 160, 384])
@pytest.mark.parametrize("factor", [0.5, 1.0, 1.1, 1.25, 1.3, 2.0])
def test_expert_capacities_as_a_float_quotient(num_experts: int, factor: float) -> None:
    """A factor divided by the experts as floats gives n c / e of exact numbers, all lengths."""
    exact = Fraction(str(factor)) / num_experts
    for num_tokens in range(1, 2049, 7):
        expected = max(1, min(num_tokens, int(num_tokens * exact)))
        assert mode.token_capacity(num_tokens, factor / num_experts) == expected


@pytest.mark.parametrize("capacity", [1, 1.0, 1.5, Fraction(3, 2), 7.0])
def test_a_capacity_of_one_or_more_is_every_token(capacity: float | Fraction) -> None:
    """No expert computes a token twice."""
    assert [mode.token_capacity(n, capacity) for n in (1, 2, 129)] == [1, 2, 129]


@pytest.mark.parametrize("capacity", [0.1, 0.125, 0.3, 1 / 3, 0.7, 1.0])
def test_a_whole_number_of_tokens_is_not_rounded(capacity: float) -> None:
    """`capacity` of a multiple of its denominator is exact, where a floor of floats is not."""
    exact = ref.simplest_fraction(capacity)
    for multiple in range(1, 200):
        num_tokens = multiple * exact.denominator
        assert mode.token_capacity(num_tokens, capacity) == multiple * exact.numerator
