"""On a mesh: the numbers of one device, for every kind of layer, values, gradients and decoding."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import mode

from .helpers import assert_close


DIM, VOCAB, TOKENS, BATCH = 32, 64, 32, 8
KEY = jax.random.key(1)


def expert(key: jax.Array) -> mode.GELU:
    return mode.GELU(DIM, key=key)


def block(key: jax.Array) -> mode.TransformerBlock:
    return mode.TransformerBlock(DIM, 2, key=key)


KINDS: dict[str, Callable[[jax.Array], Any]] = {
    "dense": lambda key: mode.Residual(block(key)),
    "mod": lambda key: mode.MixtureOfDepths(block(key), DIM, 0.25, key=key),
    "random": lambda key: mode.MixtureOfDepths(
        block(key), DIM, 0.25, select=mode.RandomChoice(), key=key
    ),
    "moe": lambda key: mode.integrated_mode(expert, DIM, 2, 8, 0, key=key),
    "token_choice": lambda key: mode.integrated_mode(
        expert, DIM, 2, 4, 0, select=mode.TokenChoice(2), key=key
    ),
    "staged": lambda key: mode.staged_mode(expert, DIM, 2, 4, capacity=0.5, key=key),
    "integrated": lambda key: mode.integrated_mode(expert, DIM, 2, 4, 2, key=key),
}
# Data parallel with whole parameters, sharded parameters, experts, and all at once.
WHOLE = (mode.Rule(r"\.experts\b", ("expert",)), mode.Rule(""))
MESHES: dict[str, tuple[dict[str, int], tuple[mode.Rule, ...]]] = {
    "data": ({"data": 8}, WHOLE),
    "fsdp": ({"data": 8}, mode.PARAMETERS),
    "expert": ({"expert": 4}, WHOLE),
    "all": ({"data": 2, "expert": 4}, mode.PARAMETERS),
}


def mesh_of(axes: dict[str, int]) -> Mesh:
    devices = jax.devices()[: int(np.prod(list(axes.values())))]
    types = (AxisType.Auto,) * len(axes)
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=types, devices=devices)


def build(*kinds: str) -> mode.Transformer:
    layers = [KINDS[kind] for kind in kinds]
    return mode.Transformer(VOCAB, DIM, layers * 2, key=KEY)


def tokens() -> jax.Array:
    return jax.random.randint(KEY, (BATCH, TOKENS), 0, VOCAB)


@eqx.filter_jit
def loss_and_gradient(model: mode.Transformer, tokens: jax.Array) -> tuple[jax.Array, Any, Any]:
    parameters, rest = eqx.partition(model, mode.trainable(model))

    def loss(parameters: Any) -> Any:
        logits, routings = eqx.combine(parameters, rest)(tokens[:, :-1], key=KEY)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
        return losses.mean(), (logits, routings)

    (value, (logits, routings)), gradient = jax.value_and_grad(loss, has_aux=True)(parameters)
    return value, (logits, mode.update_state(model, routings)), gradient


@pytest.mark.parametrize("mesh_name", MESHES)
def test_a_mesh_changes_no_number(mesh_name: str) -> None:
    """Loss, logits, router state and every gradient of a model that has a layer of every kind; and
    everything lies where it should."""
    axes, rules = MESHES[mesh_name]
    model, mesh = mode.Transformer(VOCAB, DIM, list(KINDS.values()), key=KEY), mesh_of(axes)
    value, (logits, moved), gradient = loss_and_gradient(model, tokens())
    with jax.set_mesh(mesh):
        where = mode.placement(model, mesh, rules)
        placed = eqx.filter_shard(model, where)
        batch = jax.device_put(tokens(), mode.placement(tokens(), mesh, mode.BATCH))
        found, (found_logits, found_moved), found_gradient = loss_and_gradient(placed, batch)
    assert_close(found, value)
    assert_close(found_logits, logits, scale=4)
    arrays = (eqx.filter(tree, eqx.is_array) for tree in (found_moved, moved))
    jax.tree.map(assert_close, *arrays)
    jax.tree.map(assert_close, found_gradient, gradient)
    both = tuple(axis for axis in ("data", "expert") if axis in axes)
    over = NamedSharding(mesh, PartitionSpec(both))
    assert found_logits.sharding.is_equivalent_to(over, 3)
    for leaf, sharding in zip(
        jax.tree.leaves(eqx.filter(placed, eqx.is_array)), jax.tree.leaves(where), strict=True
    ):
        assert leaf.sharding == sharding


def test_parameters_are_divided() -> None:
    """Experts over `expert`, the rest over all devices, but for routers and vectors."""
    mesh = mesh_of({"data": 2, "expert": 4})
    model = build("dense", "moe")
    where = mode.placement(model, mesh)
    moe = where.stacks[0].layers[1].block.feedforward
    assert moe.experts.up.weight.spec == PartitionSpec(None, "expert", None, "data")
    assert moe.router.scorer.weight.spec == PartitionSpec()
    attention = where.stacks[0].layers[0].block.attention
    assert attention.qkv.weight.spec == PartitionSpec(None, None, ("data", "expert"))
    assert where.norm.weight.spec == PartitionSpec()
    optimizer = optax.adam(1e-3)
    state = eqx.filter_eval_shape(optimizer.init, eqx.filter(model, mode.trainable(model)))
    mirrored = mode.placement(state, mesh)[0].mu.stacks[0].layers[1].block.feedforward
    assert mirrored.experts.up.weight.spec == moe.experts.up.weight.spec


def test_a_mesh_of_other_axes_is_refused() -> None:
    mesh = mesh_of({"model": 8})
    with pytest.raises(ValueError, match=r"`mesh` must have an axis `data`.* got only model"):
        mode.placement(build("dense"), mesh)
    own = (mode.Rule(r"embedding", ("model",)), mode.Rule(""))
    assert mode.placement(build("dense"), mesh, own).embedding.spec == PartitionSpec("model")


def test_rules_of_one_s_own_come_first() -> None:
    mesh = mesh_of({"data": 8})
    rules = (mode.Rule("embedding", (None, "data")), *mode.PARAMETERS)
    where = mode.placement(build("dense"), mesh, rules)
    assert where.embedding.spec == PartitionSpec(None, "data")


def test_decoding_on_a_mesh() -> None:
    """Caches lie where their members are; the logits are those of one device."""
    mesh = mesh_of({"data": 2, "expert": 4})
    model = build("mod", "moe")
    model = mode.causal(mode.update_state(model, eqx.filter_jit(model)(tokens())[1]))
    expected = mode.prefill(model, tokens()[:, :8], max_tokens=TOKENS)
    expected = mode.step(model, expected, tokens()[:, 8])
    with jax.set_mesh(mesh):
        placed = eqx.filter_shard(model, mode.placement(model, mesh))
        prompts = jax.device_put(tokens()[:, :9], mode.placement(tokens(), mesh, mode.BATCH))
        decoding = mode.prefill(placed, prompts[:, :8], max_tokens=TOKENS)
        decoding = eqx.filter_shard(decoding, mode.placement(decoding, mesh, mode.DECODING))
        decoding = mode.step(placed, decoding, prompts[:, 8])
    assert_close(decoding.logits, expected.logits, scale=4)
    length = decoding.caches[0][1].length
    assert (length == expected.caches[0][1].length).all()
    over = NamedSharding(mesh, PartitionSpec(None, ("data", "expert")))
    assert length.sharding.is_equivalent_to(over, 2)


def collectives(kind: str, mesh_name: str) -> dict[str, int]:
    axes, rules = MESHES[mesh_name]
    model, mesh = build("dense", kind), mesh_of(axes)
    with jax.set_mesh(mesh):
        placed = eqx.filter_shard(model, mode.placement(model, mesh, rules))
        batch = jax.device_put(tokens(), mode.placement(tokens(), mesh, mode.BATCH))
        run = eqx.filter_jit(lambda model, tokens: model(tokens)[0])
        text = run.lower(placed, batch).compile().compiled.as_text()
    kinds = ("all-to-all", "all-gather", "all-reduce", "reduce-scatter", "collective-permute")
    return {name: count for name in kinds if (count := text.count(f" {name}("))}


def test_two_exchanges_and_no_more() -> None:
    """There and back again; the gather is the top-k of XLA's CPU backend, which TPUs do without."""
    assert collectives("dense", "data") == {}
    found = collectives("moe", "expert")
    assert found.pop("all-to-all") == 2
    assert found in ({}, {"all-gather": 1})


def test_without_a_mesh_nothing_is_constrained() -> None:
    layer = KINDS["moe"](KEY)
    program = jax.make_jaxpr(lambda x: layer(x)[0])(jnp.ones((4, 16, DIM)))
    assert "sharding_constraint" not in str(program)


def test_a_mesh_of_other_axes_is_left_alone() -> None:
    """Parameters may be divided over an axis of the user's own."""
    mesh = mesh_of({"model": 4})
    model = build("dense")
    rules = (mode.Rule(r"qkv", (None, "model")), mode.Rule(""))
    expected = model(tokens())[0]
    with jax.set_mesh(mesh):
        placed = eqx.filter_shard(model, mode.placement(model, mesh, rules))
        text = str(jax.make_jaxpr(lambda t: placed(t)[0])(tokens()))
        assert "sharding_constraint" not in text
        assert_close(eqx.filter_jit(placed)(tokens())[0], expected, scale=4)


def explicit() -> Any:
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    return mode.placement(build("dense"), mesh)


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "explicit axes": (
        explicit,
        r"`mesh` must have axes of type `Auto`, .*Explicit",
    ),
    "experts that do not divide": (
        lambda: mode.placement(build("moe"), mesh_of({"expert": 3})),
        r"axis 1 of .*experts.*, of 8, must divide over the 3 devices along expert",
    ),
    "a batch that does not divide": (
        lambda: mode.placement(tokens()[:6], mesh_of({"data": 4}), mode.BATCH),
        r"axis 0 of the array, of 6, must divide over the 4 devices along data",
    ),
    "no rule": (
        lambda: mode.placement(build("dense"), mesh_of({"data": 4}), (mode.Rule("qkv"),)),
        r"`rules` must be for every array, but none is for \.embedding",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_placed_says_why(name: str) -> None:
    call, words = REFUSED[name]
    with pytest.raises(ValueError, match=words):
        call()
