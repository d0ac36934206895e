"""Patterns of dense and routed layers, and the paper's model."""

from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest

import mode
from tests.layers import DIM, TOKENS, VOCAB
from tests.models.cases import IDS, KEY, dense, half, layers_in_order, routed


# Depth, options, the numbers of the routed layers, and (length of the period, repeats).
INTERLEAVED: list[tuple[int, dict[str, Any], list[int], list[tuple[int, int]]]] = [
    (6, {}, [1, 3, 5], [(2, 3)]),
    (7, {}, [1, 3, 5], [(2, 3), (1, 1)]),
    (6, {"offset": 0}, [0, 2, 4], [(2, 3)]),
    (6, {"every": 3, "offset": 2}, [2, 5], [(3, 2)]),
    (8, {"every": 3, "offset": 1}, [1, 4, 7], [(3, 2), (2, 1)]),
    (6, {"every": 1, "offset": 0}, [0, 1, 2, 3, 4, 5], [(1, 6)]),
    (6, {"every": 2, "offset": 3}, [3, 5], [(1, 2), (2, 2)]),
    (6, {"every": 1, "offset": 2}, [2, 3, 4, 5], [(1, 2), (1, 4)]),
    (6, {"offset": 9}, [], [(1, 6)]),
    (1, {}, [], [(1, 1)]),
]


def makers(stacks: Sequence[tuple[Sequence[Any], int]]) -> list[Any]:
    """The function of each layer from bottom to top."""
    return [make for period, repeats in stacks for make in list(period) * repeats]


@pytest.mark.parametrize(("depth", "options", "expected", "shapes"), INTERLEAVED)
def test_every_and_offset(
    depth: int, options: dict[str, Any], expected: list[int], shapes: list[tuple[int, int]]
) -> None:
    """Every other layer is routed by default, and the first one is dense; few scans."""
    stacks = mode.interleave(dense, routed, depth, **options)
    assert [i for i, make in enumerate(makers(stacks)) if make is routed] == expected
    assert len(makers(stacks)) == depth
    assert [(len(period), repeats) for period, repeats in stacks] == shapes
    model = eqx.filter_eval_shape(
        lambda key: mode.mod_transformer(VOCAB, DIM, depth, 2, **options, key=key), KEY
    )
    assert model.depth == depth
    assert [(len(stack.layers), stack.repeats) for stack in model.stacks] == shapes


def test_a_schedule_of_layers() -> None:
    """One function per routed layer; neighbours that are the same share a scan."""
    stacks = mode.interleave(dense, [half, routed, routed], 7)
    assert makers(stacks) == [dense, half, dense, routed, dense, routed, dense]
    assert [repeats for _, repeats in stacks] == [1, 2, 1]
    _, routings = mode.Transformer(VOCAB, DIM, stacks=stacks, key=KEY)(IDS)
    assert [one.index.shape[0] for one in routings] == [1, 2]


def test_a_schedule_of_capacities() -> None:
    """One number per routed layer, from bottom to top."""
    schedule = (0.5, 0.25, 0.25)
    scheduled = mode.mod_transformer(VOCAB, DIM, 6, 2, capacity=schedule, key=KEY)
    layers = [layer for layer in layers_in_order(scheduled) if hasattr(layer, "capacity")]
    assert [layer.capacity for layer in layers] == list(schedule)
    assert [stack.repeats for stack in scheduled.stacks] == [1, 2]
    _, routings = eqx.filter_eval_shape(scheduled, IDS)
    slots = [one.index.shape[-1] for one in routings for _ in range(one.index.shape[0])]
    assert slots == [TOKENS // 2, TOKENS // 4, TOKENS // 4]


def test_the_papers_model_has_what_it_is_given() -> None:
    """Gate, predictor, key-value heads, dtype and head reach the layers."""
    model = mode.mod_transformer(
        VOCAB,
        32,
        2,
        4,
        num_kv_heads=2,
        gate=mode.SigmoidGate(2.0),
        predictor=True,
        tied=False,
        dtype=jnp.bfloat16,
        key=KEY,
    )
    (router,) = mode.routers(model)
    assert router.gate == mode.SigmoidGate(2.0)
    assert router.predictor is not None
    assert model.head is not None
    assert model.dtype == jnp.bfloat16
    layers: Any = model.stacks[0].layers
    for layer in layers:
        assert layer.block.attention.num_kv_heads == 2
    _, (routing,) = eqx.filter_eval_shape(model, IDS)
    assert routing.predictor is not None


def test_the_training_flops_of_a_routed_model() -> None:
    """Counted with the gradient: a routed model affords more layers at the cost of a dense one."""

    def training(depth: int, offset: int) -> int:
        model = mode.mod_transformer(64, 32, depth, 2, capacity=0.125, offset=offset, key=KEY)
        parameters, rest = eqx.partition(model, mode.is_trainable(model))
        tokens = jax.ShapeDtypeStruct((2, 64), jnp.int32)

        def loss(parameters: Any, tokens: Any) -> Any:
            return jnp.sum(eqx.combine(parameters, rest)(tokens)[0])

        return mode.count_flops(jax.value_and_grad(loss), parameters, tokens).total

    dense, routed, deeper = training(6, 6), training(6, 1), training(10, 1)
    # An eighth of half of the layers: (3 + 3/8) / 6 = 0.56 and (5 + 5/8) / 6 = 0.94 of the cost.
    assert routed / dense == pytest.approx(0.5625, abs=0.02)
    assert deeper / dense == pytest.approx(0.9375, abs=0.03)
