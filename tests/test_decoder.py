"""The reference decoder: any pattern of layers, one scan, the same numbers."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array, PyTree

import mode

from .helpers import assert_close, packed_info
from .layers import (
    DIM,
    TOKENS,
    VOCAB,
    Blend,
    depth,
    expert,
    run,
    transformer_block,
    with_selector,
)


KEY = jax.random.key(8)
IDS = jax.random.randint(KEY, (2, TOKENS), 0, VOCAB)


def dense(key: Array) -> mode.Residual:
    return mode.Residual(Blend(key))


def routed(key: Array) -> mode.MixtureOfDepths:
    return depth(key)


def half(key: Array) -> mode.MixtureOfDepths:
    return depth(key, capacity=0.5)


def mixed(key: Array) -> mode.Residual:
    return mode.integrated_mode(expert, DIM, 2, 3, 1, key=key)


def model(*makers: Any, **options: Any) -> mode.Transformer:
    return mode.Transformer(VOCAB, DIM, makers, key=KEY, **options)


def repeats(model: mode.Transformer) -> list[tuple[int, int]]:
    """The period of each stack and how often it runs."""
    return [(len(stack.layers), stack.repeats) for stack in model.stacks]


def layers_in_order(model: mode.Transformer) -> list[Any]:
    """All layers from bottom to top, each with its own parameters."""
    found = []
    for stack in model.stacks:
        arrays, rest = eqx.partition(stack.layers, eqx.is_array)
        for place in range(stack.repeats):
            one = jax.tree.map(lambda leaf, place=place: leaf[place], arrays)
            found.extend(eqx.combine(one, rest))
    return found


PATTERNS: dict[str, tuple[list[Any], list[tuple[int, int]]]] = {
    "one layer": ([dense], [(1, 1)]),
    "dense": ([dense] * 4, [(1, 4)]),
    "every other": ([dense, routed] * 3, [(2, 3)]),
    "every third": ([dense, dense, routed] * 2, [(3, 2)]),
    "leftover at the end": ([dense, routed] * 2 + [dense], [(2, 2), (1, 1)]),
    "leftover at the start": ([mixed] + [dense, routed] * 2, [(1, 1), (2, 2)]),
    "a schedule": ([dense, routed, dense, half] * 2, [(4, 2)]),
    "a schedule that never repeats": (
        [dense, routed, dense, half, mixed],
        [(1, 1), (1, 1), (1, 1), (1, 1), (1, 1)],
    ),
    "runs": ([routed] * 3 + [dense] * 2, [(1, 3), (1, 2)]),
}


@pytest.mark.parametrize("name", PATTERNS)
def test_scanned_is_a_python_loop(name: str) -> None:
    """Layer by layer in Python, with the same parameters: the same logits and routings."""
    makers, want = PATTERNS[name]
    scanned = model(*makers)
    assert repeats(scanned) == want
    assert scanned.depth == len(makers)
    logits, routings = run(scanned, IDS)

    @eqx.filter_jit
    def looped(layers: list[Any]) -> tuple[Array, list[mode.Routing]]:
        x = scanned.embedding[IDS] * DIM**0.5
        seen = []
        for layer in layers:
            x, one = layer(x)
            seen.extend(one)
        return scanned.norm(x) @ scanned.embedding.T, seen

    layers = layers_in_order(scanned)
    kinds = [type(makers[place](KEY)) for place in range(len(makers))]
    assert [type(layer) for layer in layers] == kinds
    looped_logits, seen = looped(layers)
    assert_close(looped_logits, logits, scale=10)
    flat: list[mode.Routing] = []
    for stack in scanned.stacks:
        count = len(mode.routers(stack))
        mine, routings = routings[:count], routings[count:]
        for place in range(stack.repeats):
            flat.extend(jax.tree.map(lambda leaf, at=place: leaf[at], one) for one in mine)
    for one, other in zip(flat, seen, strict=True):
        assert np.array_equal(one.index, other.index)


def test_layers_differ_and_are_the_makers_own() -> None:
    """Each layer has the key that is its own, whatever pattern it is stacked in."""
    together = layers_in_order(model(*[dense, routed] * 2))
    weights = [np.asarray(layer.block.inner.weight) for layer in together]
    assert len({weight.tobytes() for weight in weights}) == 4
    apart = layers_in_order(model(dense, routed, dense, half))
    assert np.array_equal(weights[2], apart[2].block.inner.weight)


@pytest.mark.parametrize(
    ("every", "offset", "want"),
    [(2, 1, [1, 3, 5]), (2, 0, [0, 2, 4]), (3, 2, [2, 5]), (1, 0, [0, 1, 2, 3, 4, 5]), (2, 9, [])],
)
def test_every_and_offset(every: int, offset: int, want: list[int]) -> None:
    makers = mode.every_other(dense, routed, 6, every=every, offset=offset)
    assert [place for place, make in enumerate(makers) if make is routed] == want
    shapes = eqx.filter_eval_shape(
        lambda key: mode.mod_decoder(VOCAB, DIM, 6, 2, every=every, offset=offset, key=key), KEY
    )
    routed_layers = sum(router.scorer.weight.shape[0] for router in mode.routers(shapes))
    assert routed_layers == len(want)


def test_capacity_schedule() -> None:
    """One number per routed layer, from bottom to top."""
    schedule = (0.5, 0.25, 0.25)
    scheduled = mode.mod_decoder(VOCAB, DIM, 6, 2, capacity=schedule, key=KEY)
    found = [layer for layer in layers_in_order(scheduled) if hasattr(layer, "capacity")]
    assert [layer.capacity for layer in found] == list(schedule)
    _, routings = eqx.filter_eval_shape(scheduled, IDS)
    slots = [routing.index.shape[-1] for routing in routings for _ in range(routing.index.shape[0])]
    assert slots == [TOKENS // 2, TOKENS // 4, TOKENS // 4]


@pytest.mark.parametrize("makers", [[dense, routed] * 2, [mixed]], ids=["mod", "mode"])
def test_remat_changes_no_value_and_no_gradient(makers: list[Any]) -> None:
    @eqx.filter_jit
    def gradient(model: mode.Transformer) -> PyTree:
        parameters, rest = eqx.partition(model, mode.trainable(model))
        return jax.value_and_grad(lambda p: jnp.sum(jnp.sin(eqx.combine(p, rest)(IDS)[0])))(
            parameters
        )

    plain, remat = (model(*makers, remat=remat) for remat in (False, True))
    assert_close(jax.tree.leaves(gradient(remat)), jax.tree.leaves(gradient(plain)), scale=10)
    text = str(jax.make_jaxpr(lambda ids: remat(ids)[0])(IDS))
    assert "remat" in text or "checkpoint" in text


def test_tied_and_untied() -> None:
    tied, untied = model(dense), model(dense, tied=False)
    assert tied.head is None
    assert untied.head.weight.shape == (DIM, VOCAB)
    assert np.array_equal(tied.embedding, untied.embedding)
    logits, _ = run(untied, IDS)
    same = eqx.tree_at(lambda m: m.head.weight, untied, tied.embedding.T)
    assert_close(run(same, IDS)[0], run(tied, IDS)[0])
    assert np.any(logits != run(tied, IDS)[0])
    # Unit variance at the start, so that an untrained model is near the uniform distribution.
    assert 0.5 < np.std(run(tied, IDS)[0]) < 2


def test_bfloat16_activations_float32_parameters() -> None:
    seen = []

    def spy(x: Array, info: mode.TokenInfo, *, key: Array | None = None) -> Any:
        seen.append(x.dtype)
        return jnp.zeros_like(x), ()

    def spying(key: Array) -> mode.Residual:
        return mode.Residual(spy)

    narrow = model(spying, routed, mixed, dtype=jnp.bfloat16)
    parameters = jax.tree.leaves(eqx.filter(narrow, eqx.is_inexact_array))
    assert {leaf.dtype for leaf in parameters} == {jnp.dtype("float32")}
    logits, routings = run(narrow, IDS)
    assert seen == [jnp.bfloat16]
    assert logits.dtype == jnp.float32
    assert all(one.logits.dtype == one.weight.dtype == jnp.float32 for one in routings)
    wide, _ = run(model(dense, dense), IDS)
    close, _ = run(model(dense, dense, dtype=jnp.bfloat16), IDS)
    assert_close(close.astype(jnp.bfloat16), wide, scale=3)
    assert np.any(close != wide)


def test_grouped_queries() -> None:
    """Fewer key-value heads, fewer parameters; repeated, they are the ordinary heads."""
    shared = transformer_block(KEY, num_kv_heads=1)
    weight = shared.attention.qkv.weight
    assert weight.shape == (DIM, 2 * DIM)
    query, key, value = jnp.split(weight, [DIM, DIM + DIM // 2], axis=1)
    repeated = jnp.concatenate([query, key, key, value, value], axis=1)
    plain = eqx.tree_at(
        lambda b: (b.attention.qkv.weight, b.attention.out, b.feedforward),
        transformer_block(KEY),
        (repeated, shared.attention.out, shared.feedforward),
    )
    x = jax.random.normal(KEY, (2, TOKENS, DIM))
    assert_close(run(mode.Residual(shared), x)[0], run(mode.Residual(plain), x)[0])
    decoder = mode.mod_decoder(VOCAB, 32, 2, 4, num_kv_heads=2, key=KEY)
    assert run(decoder, IDS)[0].shape == (2, TOKENS, VOCAB)


@pytest.mark.parametrize("lengths", [(16, 16), (5, 27), (1, 20)])
def test_packed_documents_are_alone(lengths: tuple[int, int]) -> None:
    """Two documents in one sequence get the logits that each gets alone."""
    decoder = mode.mod_decoder(VOCAB, DIM, 2, 2, offset=2, key=KEY)
    logits, _ = run(decoder, IDS[:1], packed_info(lengths, tokens=TOKENS))
    first, second = lengths
    for start, length in ((0, first), (first, second)):
        alone, _ = run(decoder, IDS[:1, start : start + length])
        assert_close(logits[:, start : start + length], alone, scale=10)


def test_padding_changes_no_logits() -> None:
    """Of a model with a causal rule; under top-k, capacity is a share of the padded length."""
    decoder = mode.causal(mode.mod_decoder(VOCAB, DIM, 2, 2, key=KEY))
    logits, _ = run(decoder, IDS, packed_info((20,), (11,), tokens=TOKENS))
    for row, length in enumerate((20, 11)):
        alone, _ = run(decoder, IDS[row : row + 1, :length])
        assert_close(logits[row : row + 1, :length], alone, scale=10)


def test_keys_reach_every_layer() -> None:
    """Each layer of a stack draws for itself, and a key draws the same again."""
    control = with_selector(mode.RandomChoice(), model(*[dense, routed] * 3, routed))
    _, (scanned, last) = run(control, IDS, key=jax.random.key(1))
    draws = [np.asarray(one).tobytes() for one in (*scanned.index, last.index[0])]
    assert len(set(draws)) == 4
    _, (again, _) = run(control, IDS, key=jax.random.key(1))
    assert np.array_equal(scanned.index, again.index)
    _, (other, _) = run(control, IDS, key=jax.random.key(2))
    assert np.any(scanned.index != other.index)


def test_deep_models_compile_like_shallow_ones() -> None:
    """The program has the same size for 48 layers as for 4."""

    def size(depth: int) -> int:
        decoder = eqx.filter_eval_shape(
            lambda key: mode.mod_decoder(VOCAB, DIM, depth, 2, key=key), KEY
        )
        parameters, rest = eqx.partition(decoder, lambda leaf: hasattr(leaf, "shape"))

        def training(parameters: PyTree, ids: Array) -> PyTree:
            return jax.grad(lambda p: jnp.sum(eqx.combine(p, rest)(ids)[0]), allow_int=True)(
                parameters
            )

        return len(jax.jit(training).lower(parameters, IDS).as_text().splitlines())

    assert size(48) == size(4)
