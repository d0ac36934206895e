"""What moves between devices in the compiled programs of whole models, and how many bytes."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

import mode
from mode.aot import Collective
from mode.aot._hlo import parse_collectives
from mode.parallel import array_roles

from .meshes import MESHES, mesh_of
from .models import BATCH, DIM, KEY, KINDS, TOKENS, build, tokens


def compiled_collectives(function: Callable[..., Array], *args: Any) -> list[Collective]:
    """Those of `function(*args)`.

    Without the gather that XLA's CPU backend makes of a router's top-k; TPUs do without it. From
    JAX 0.12 it has the name of the transposition before it.
    """
    parts = [eqx.partition(arg, eqx.is_array) for arg in args]

    def run(*arrays: Any) -> Array:
        return function(
            *(eqx.combine(part, rest) for part, (_, rest) in zip(arrays, parts, strict=True))
        )

    text = jax.jit(run).lower(*(part for part, _ in parts)).compile().as_text() or ""
    of_top_k = ("mode.Router/top_k", "mode.Router/transpose")
    return [one for one in parse_collectives(text) if not one.name.endswith(of_top_k)]


def collectives(mesh_name: str, *kinds: str) -> list[Collective]:
    """Those of the forward pass of a model on a mesh."""
    axes, rules = MESHES[mesh_name]
    model, mesh = build(*kinds), mesh_of(**axes)
    with jax.set_mesh(mesh):
        placed = eqx.filter_shard(model, mode.named_shardings(model, mesh, rules))
        batch = jax.device_put(tokens(), mode.named_shardings(tokens(), mesh, mode.BATCH_RULES))
        return compiled_collectives(lambda model, tokens: model(tokens)[0], placed, batch)


def spread_bytes(mesh_name: str, *kinds: str) -> int:
    """Bytes of the parameters that lie in parts: on a device, when it has gathered them once."""
    axes, rules = MESHES[mesh_name]
    model = build(*kinds)
    arrays = eqx.filter(model, eqx.is_array)
    shardings = mode.named_shardings(arrays, mesh_of(**axes), rules)
    total = 0
    for leaf, roles, sharding in zip(
        jax.tree.leaves(arrays), array_roles(arrays), jax.tree.leaves(shardings), strict=True
    ):
        if sharding.spec != PartitionSpec():
            own = axes.get("expert", 1) if "experts" in roles.roles else 1
            total += leaf.size * leaf.dtype.itemsize // own
    return total


@pytest.mark.parametrize("kind", ["dense", "mod"])
def test_data_parallel_moves_nothing(kind: str) -> None:
    assert collectives("data", kind) == []


@pytest.mark.parametrize(
    ("mesh_name", "kind", "exchanges"),
    [("fsdp", "dense", 0), ("fsdp", "mod", 0), ("all", "moe", 2)],
)
def test_sharded_parameters_are_gathered_once_and_activations_stay(
    mesh_name: str, kind: str, exchanges: int
) -> None:
    """In every repeat of a scan its own layer alone, to the byte."""
    moved = collectives(mesh_name, kind)
    gathers = [one for one in moved if one.kind == "all-gather"]
    rest = [one.kind for one in moved if one.kind != "all-gather"]
    assert rest == ["all-to-all"] * exchanges
    assert sum(one.bytes * (one.times or 0) for one in gathers) == spread_bytes(mesh_name, kind)


@pytest.mark.parametrize("kind", ["moe", "integrated"])
def test_experts_are_two_exchanges_and_no_more(kind: str) -> None:
    """There and back again, in each of the two layers of a scan."""
    moved = collectives("expert", kind)
    assert [(one.kind, one.times) for one in moved] == [("all-to-all", 2)] * 2


WHOLE_INPUTS: dict[str, tuple[Callable[[mode.Transformer, Array], Array], tuple[int, ...]]] = {
    "embedding": (lambda model, x: model.embed(x.astype(int)[..., 0]), (BATCH, TOKENS, 1)),
    "layers": (lambda model, x: model.stacks[0](x)[0], (BATCH, TOKENS, DIM)),
    "logits": (lambda model, x: model.unembed(x), (BATCH, TOKENS, DIM)),
}


@pytest.mark.parametrize("part", WHOLE_INPUTS)
def test_hidden_states_lie_with_their_sequences(part: str) -> None:
    """Even where what goes in, and every parameter, is whole on each device."""
    run, shape = WHOLE_INPUTS[part]
    mesh = mesh_of(data=8)
    whole = NamedSharding(mesh, PartitionSpec())
    with jax.set_mesh(mesh):
        placed = eqx.filter_shard((build("dense"), jnp.ones(shape)), whole)
        result = eqx.filter_jit(run)(*placed)
    assert result.sharding.is_equivalent_to(NamedSharding(mesh, PartitionSpec("data")), 3)


def test_the_embedding_is_gathered_for_the_batch() -> None:
    """Once, and no hidden states are summed over the devices, each with rows of its own."""
    model, mesh = build("dense"), mesh_of(data=8)
    with jax.set_mesh(mesh):
        placed = eqx.filter_shard(model, mode.named_shardings(model, mesh))
        batch = jax.device_put(tokens(), mode.named_shardings(tokens(), mesh, mode.BATCH_RULES))
        moved = compiled_collectives(lambda model, tokens: model.embed(tokens), placed, batch)
    assert [(one.kind, one.bytes) for one in moved] == [("all-gather", model.embedding.nbytes)]


STATED: dict[str, tuple[Callable[[], Any], tuple[int, ...], int]] = {
    "both ends of both exchanges": (lambda: KINDS["moe"](KEY), (BATCH, TOKENS, DIM), 4),
    "the embedding, whole, and its rows": (
        lambda: lambda x: (build("dense").embed(x.astype(int)), ()),
        (BATCH, TOKENS),
        2,
    ),
}


@pytest.mark.parametrize("name", STATED)
def test_constraints_that_the_partitioner_may_find_itself(name: str) -> None:
    """In these small programs it does; in others it may not."""
    make, shape, count = STATED[name]
    layer = make()
    with jax.set_mesh(mesh_of(data=2, expert=4)):
        program = str(jax.make_jaxpr(lambda x: layer(x)[0])(jnp.ones(shape)))
    assert program.count("sharding_constraint[") == count
