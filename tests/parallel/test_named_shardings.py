"""Where the arrays of models, optimizer states, batches and decode states lie."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import optax
import pytest
from jax.sharding import AxisType, PartitionSpec

import mode

from .meshes import mesh_of
from .models import BATCH, build, tokens
from .test_roles import renamed


BOTH = ("data", "expert")


def test_parameters_are_sharded() -> None:
    """Experts over `expert`, the rest over all devices, but for routers and vectors."""
    mesh = mesh_of(data=2, expert=4)
    model = build("dense", "moe")
    shardings = mode.named_shardings(model, mesh)
    moe = shardings.stacks[0].layers[1].block.feedforward
    assert moe.experts.up.weight.spec == PartitionSpec(None, "expert", None, "data")
    assert moe.router.scorer.weight.spec == PartitionSpec()
    assert moe.router.state.threshold.spec == PartitionSpec()
    attention = shardings.stacks[0].layers[0].block.attention
    assert attention.qkv.weight.spec == PartitionSpec(None, None, BOTH)
    assert shardings.embedding.spec == PartitionSpec(BOTH)
    assert shardings.norm.weight.spec == PartitionSpec()
    optimizer = optax.adam(1e-3)
    state = eqx.filter_eval_shape(optimizer.init, eqx.filter(model, mode.is_trainable(model)))
    mirrored = mode.named_shardings(state, mesh)[0].mu.stacks[0].layers[1].block.feedforward
    assert mirrored.experts.up.weight.spec == moe.experts.up.weight.spec


def test_the_axis_of_layers_is_never_sharded() -> None:
    """Not even where it is the longest."""
    model = build("dense", "moe", repeats=64)
    shardings = mode.named_shardings(eqx.filter_eval_shape(lambda m: m, model), mesh_of(data=8))
    for leaf in jax.tree.leaves(shardings.stacks):
        assert len(leaf.spec) == 0 or leaf.spec[0] is None


@pytest.mark.parametrize("kind", ["dense", "mod", "moe", "staged", "integrated"])
def test_a_renamed_field_of_any_layer_changes_nothing(kind: str) -> None:
    mesh = mesh_of(data=2, expert=4)
    model = eqx.filter_eval_shape(lambda: build(kind))
    copy = renamed(model)
    assert not hasattr(copy, "embedding")
    expected, specs = (
        [leaf.spec for leaf in jax.tree.leaves(mode.named_shardings(tree, mesh))]
        for tree in (model, copy)
    )
    assert specs == expected


def test_a_router_in_a_layer_of_a_users_own_is_whole() -> None:
    class Own(eqx.Module):
        chooses: mode.Router

    (router,) = mode.routers(build("mod"))
    shardings = mode.named_shardings(Own(router), mesh_of(data=2))
    assert {leaf.spec for leaf in jax.tree.leaves(shardings)} == {PartitionSpec()}


def test_a_decode_states_caches_lie_with_their_sequences() -> None:
    model = mode.make_causal(build("mod", "moe"))
    state, _ = eqx.filter_eval_shape(mode.prefill, model, tokens(), max_tokens=64)
    shardings = mode.named_shardings(state, mesh_of(data=2, expert=4), mode.DECODE_RULES)
    over, behind = PartitionSpec(BOTH), PartitionSpec(None, BOTH)
    assert shardings.length.spec == shardings.logits.spec == over
    assert {leaf.spec for leaf in jax.tree.leaves(shardings.caches)} == {behind}
    shapes = [leaf.shape[:2] for leaf in jax.tree.leaves(state.caches)]
    assert set(shapes) == {(2, BATCH)}


def test_a_batch_lies_over_both_axes() -> None:
    batch = {"tokens": tokens(), "lengths": tokens()[:, 0]}
    shardings = mode.named_shardings(batch, mesh_of(data=2, expert=4), mode.BATCH_RULES)
    assert {leaf.spec for leaf in jax.tree.leaves(shardings)} == {PartitionSpec(BOTH)}


def test_a_mesh_with_axes_that_no_rule_names_is_refused() -> None:
    mesh = mesh_of(model=8)
    with pytest.raises(ValueError, match=r"`mesh` must have an axis `data`.* got only model"):
        mode.named_shardings(build("dense"), mesh)
    own = (mode.ShardingRule("embedding", ("model",)), mode.ShardingRule(None))
    shardings = mode.named_shardings(build("dense"), mesh, own)
    assert shardings.embedding.spec == PartitionSpec("model")
    assert shardings.stacks[0].layers[0].block.attention.qkv.weight.spec == PartitionSpec()


def test_the_first_rule_of_a_role_decides() -> None:
    mesh = mesh_of(data=8)
    rules = (mode.ShardingRule("embedding", (None, "data")), *mode.PARAMETER_RULES)
    shardings = mode.named_shardings(build("dense"), mesh, rules)
    assert shardings.embedding.spec == PartitionSpec(None, "data")


def test_roles_are_inherited() -> None:
    """A rule for a feed-forward is for the experts in it, where no earlier rule is."""
    rules = (mode.ShardingRule("feedforward", ("expert",)), *mode.PARAMETER_RULES)
    shardings = mode.named_shardings(build("moe"), mesh_of(expert=4), rules)
    experts = shardings.stacks[0].layers[0].block.feedforward.experts
    assert experts.up.weight.spec == PartitionSpec(None, "expert")


def explicit() -> Any:
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    return mode.named_shardings(build("dense"), mesh)


ERRORS: dict[str, tuple[Callable[[], Any], str]] = {
    "explicit axes": (explicit, r"`mesh` must have axes of type `Auto`, .*Explicit"),
    "experts that are not divisible": (
        lambda: mode.named_shardings(build("moe"), mesh_of(expert=3)),
        r"axis 1 of .*experts.*, of size 8, must be divisible by the 3 devices along expert",
    ),
    "a batch that is not divisible": (
        lambda: mode.named_shardings(tokens()[:6], mesh_of(data=4), mode.BATCH_RULES),
        r"axis 0 of the array, of size 6, must be divisible by the 4 devices along data",
    ),
    "no rule": (
        lambda: mode.named_shardings(
            build("dense"),
            mesh_of(data=4),
            (mode.ShardingRule("layers"), mode.ShardingRule("head")),
        ),
        r"`rules` must be for every array, but none is for \.\w+.*, whose roles are \(",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_what_cannot_be_sharded_says_why(name: str) -> None:
    call, words = ERRORS[name]
    with pytest.raises(ValueError, match=words):
        call()
