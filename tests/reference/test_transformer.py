"""The oracle's transformer block, against numbers worked out by hand."""

from typing import Any

import numpy as np
import pytest

from tests import reference as ref


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


# Zero queries make attention a plain average, and the identity feed-forward shows its input.
AVERAGE = ref.BlockParams(
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


def test_block_delta_is_attention_plus_feedforward_without_the_input() -> None:
    """An average of values, and its input shown by the identity.

    Tokens (1, 1) and (1, -1) are their own norms (mean square 1, but for eps). Values double them:
    a_0 = (2, 2), a_1 = average = (2, 0). x + a = (3, 3) and (3, -1), of mean squares 9 and 5.
    Delta = (2, 2) + (1, 1) and (2, 0) + (3, -1) / sqrt(5).
    """
    delta = ref.transformer_block_delta(
        np.array([[1.0, 1.0], [1.0, -1.0]]), AVERAGE, np.array([3, 8]), np.array([1, 1])
    )
    expected = [[3.0, 3.0], [2 + 3 / np.sqrt(5), -1 / np.sqrt(5)]]
    np.testing.assert_allclose(delta, expected, rtol=1e-5)


def test_weights_multiply_the_values() -> None:
    """As above, with weights 1 and 3: a_1 is the average of (2, 2) and (6, -6), (4, -2).

    x + a = (5, -3), of mean square 17.
    """
    delta = ref.transformer_block_delta(
        np.array([[1.0, 1.0], [1.0, -1.0]]),
        AVERAGE,
        np.array([3, 8]),
        np.array([1, 1]),
        np.array([1.0, 3.0]),
    )
    expected = [4 + 5 / np.sqrt(17), -2 - 3 / np.sqrt(17)]
    np.testing.assert_allclose(delta[1], expected, rtol=1e-5)
