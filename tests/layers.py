"""The table of layers: generic tests run over all of them, and a new one joins by one line."""

import collections
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

import mode


DIM, TOKENS, GROUPS, VOCAB = 16, 32, 8, 32


@dataclasses.dataclass(frozen=True)
class Case:
    """One layer of the table.

    With `bound`, its routing depends on the shape of the input: random numbers are drawn by shape
    and a record is replayed on the groups it was made on, so `vmap` is not the batch.
    """

    name: str
    make: Callable[[PRNGKeyArray], Any]
    bound: bool = False

    def __str__(self) -> str:
        return self.name


class Blend(eqx.Module):
    """A small block of a user's own: each token gets a weighted sum of those before it, mapped.

    It reads positions and segments, so that the tests see a layer which mixes them up.
    """

    inner: mode.Linear
    outer: mode.Linear

    def __init__(self, key: PRNGKeyArray):
        inner_key, outer_key = jax.random.split(key)
        self.inner = mode.Linear(DIM, DIM, key=inner_key)
        self.outer = mode.Linear(DIM, DIM, key=outer_key)

    def __call__(
        self, x: Array, info: mode.TokenInfo, *, key: PRNGKeyArray | None = None
    ) -> tuple[Array, tuple[()]]:
        same = info.segment_ids[..., :, None] == info.segment_ids[..., None, :]
        far = jnp.abs(info.positions[..., :, None] - info.positions[..., None, :])
        weight = jnp.where(jnp.tril(same), 1 / (1 + far.astype(x.dtype)), 0)
        return self.outer(jnp.tanh(weight @ self.inner(x))), ()


class Skipping(eqx.Module):
    """A user's own module, `[tokens, dim]` to `[tokens, dim]`, with its own skip connection."""

    linear: eqx.nn.Linear

    def __init__(self, key: PRNGKeyArray):
        self.linear = eqx.nn.Linear(DIM, DIM, key=key)

    def __call__(self, x: Float[Array, "tokens dim"]) -> Float[Array, "tokens dim"]:
        return x + jnp.cumsum(jnp.tanh(jax.vmap(self.linear)(x)), axis=0)


def transformer_block(key: PRNGKeyArray, **options: Any) -> mode.TransformerBlock:
    return mode.TransformerBlock(DIM, 2, key=key, **options)


def expert(key: PRNGKeyArray) -> mode.GELUFeedForward:
    return mode.GELUFeedForward(DIM, DIM, key=key)


def depth(
    key: PRNGKeyArray, make: Callable[[PRNGKeyArray], Any] = Blend, **options: Any
) -> mode.MixtureOfDepths:
    """Mixture-of-Depths around a small block, a quarter of the tokens."""
    block_key, router_key = jax.random.split(key)
    options = {"capacity": 0.25, **options}
    return mode.MixtureOfDepths(make(block_key), DIM, key=router_key, **options)


def experts(key: PRNGKeyArray, **options: Any) -> mode.Residual:
    """Four small experts, whose slots are as many as the tokens."""
    return mode.Residual(mode.MixtureOfExperts(expert, DIM, 4, key=key, **options))


def queries(key: PRNGKeyArray) -> mode.Sequential:
    """Queries of the attention by one router, the feed-forward by another."""
    attention, feedforward = transformer_block(key).split()
    keys = jax.random.split(key)
    return mode.Sequential(
        [
            mode.MixtureOfQueries(attention, DIM, 0.25, key=keys[0]),
            mode.MixtureOfDepths(feedforward, DIM, 0.25, key=keys[1]),
        ]
    )


def recursion(key: PRNGKeyArray, **options: Any) -> mode.Recursion:
    """Two rounds of a transformer block."""
    return mode.Recursion(transformer_block(key), DIM, (0.5, 0.25), key=key, **options)


def replayed(key: PRNGKeyArray) -> mode.MixtureOfDepths:
    layer = depth(key)
    _, (routing,) = layer(hidden())
    return eqx.tree_at(lambda m: m.router.select, layer, mode.Replay(routing))


def predicted(key: PRNGKeyArray, **options: Any) -> mode.MixtureOfDepths:
    layer_key, predictor_key = jax.random.split(key)
    return depth(layer_key, predictor=mode.Predictor(DIM, key=predictor_key), **options)


def stack(key: PRNGKeyArray, *, repeats: int = 2, remat: bool = False) -> mode.LayerStack:
    """A period of a dense and a routed layer, scanned over."""
    period = [lambda key: mode.Residual(Blend(key)), depth]
    return mode.stack_layers(period, repeats, remat=remat, key=key)


CASES = [
    Case("dense", lambda key: mode.Residual(transformer_block(key))),
    Case("dense_position_wise", lambda key: mode.Residual(mode.PositionWise(expert(key)))),
    Case("dense_delta", lambda key: mode.Residual(mode.Delta(Skipping(key)))),
    Case("moe_expert_choice", lambda key: experts(key)),
    Case("moe_token_choice", lambda key: experts(key, select=mode.TokenChoice(2))),
    Case("moe_noop", lambda key: experts(key, num_noop=2)),
    Case("moe_noop_top_1", lambda key: experts(key, num_noop=2, select=mode.TokenChoice(1))),
    Case("moe_shared_sigmoid", lambda key: experts(key, num_shared=2, gate=mode.SigmoidGate())),
    Case(
        "moe_selected_softmax",
        lambda key: experts(key, gate=mode.SelectedSoftmaxGate(), select=mode.TokenChoice(2)),
    ),
    Case("moe_by_logit", lambda key: experts(key, select=mode.LogitThreshold(0.5))),
    Case("mod", lambda key: depth(key, functools.partial(transformer_block, num_kv_heads=1))),
    Case("mod_own_block", lambda key: depth(key)),
    Case("mod_delta", lambda key: depth(key, lambda k: mode.Delta(Skipping(k)))),
    Case("mod_random", lambda key: depth(key, select=mode.RandomChoice()), bound=True),
    Case("mod_strided", lambda key: depth(key, select=mode.Strided(), gate=mode.SigmoidGate(2.0))),
    Case("mod_replay", replayed, bound=True),
    Case("mod_predictor", predicted),
    Case("mod_by_quantile", lambda key: depth(key, select=mode.QuantileThreshold())),
    Case("mod_by_logit", lambda key: depth(key, select=mode.LogitThreshold(0.5))),
    Case(
        "mod_by_predictor",
        lambda key: predicted(key, select=mode.PredictorThreshold(max_capacity=None)),
    ),
    Case("staged", lambda key: mode.staged_mode_layer(expert, DIM, 2, 2, capacity=0.5, key=key)),
    Case("mod_queries", lambda key: queries(key)),
    Case("recursion", lambda key: recursion(key)),
    Case("recursion_shared", lambda key: recursion(key, share_keys=True)),
    Case(
        "recursion_token_choice",
        lambda key: mode.TokenChoiceRecursion(transformer_block(key), DIM, 2, key=key),
    ),
    Case("integrated", lambda key: mode.integrated_mode_layer(expert, DIM, 2, 3, 1, key=key)),
    Case("stack", lambda key: stack(key)),
]


@functools.cache
def build(case: Case) -> Any:
    """The layer of a case: the same one in every test."""
    return case.make(jax.random.key(7))


@functools.cache
def hidden() -> Float[Array, "groups tokens dim"]:
    return jax.random.normal(jax.random.key(1), (GROUPS, TOKENS, DIM))


TRACES = collections.Counter[str]()


@eqx.filter_jit
def run(
    layer: Any, x: Array, info: mode.TokenInfo | None = None, key: PRNGKeyArray | None = None
) -> PyTree:
    """The layer's call, compiled; a key for those that draw."""
    TRACES["run"] += 1
    return layer(x, info, key=jax.random.key(2) if key is None else key)


@functools.cache
def expected(case: Case) -> PyTree:
    """The result of the layer of a case on `hidden()`: `(hidden, routings)`."""
    return run(build(case), hidden())


def loss(parameters: PyTree, rest: PyTree, x: Array, info: mode.TokenInfo | None = None) -> Array:
    """A loss on the output that no symmetry cancels, mean over groups."""
    out, _ = eqx.combine(parameters, rest)(x, info, key=jax.random.key(2))
    return jnp.sum(jnp.sin(out.astype(jnp.float32))) / x.shape[0]


def split(layer: Any) -> tuple[PyTree, PyTree]:
    """Parameters and the rest."""
    return eqx.partition(layer, mode.is_trainable(layer))


class UnitGate(mode.AbstractGate):
    """A gate of a user's own: every weight is 1, so that the layer is the block it routes to."""

    def scores(self, logits: Array) -> Array:
        return logits

    def __call__(self, logits: Array, selected: Array) -> Array:
        return jnp.ones_like(logits[..., : selected.shape[-1]])


def ranked(layer: Any) -> Any:
    """The layer with a router that reads the first feature: the test sets the selected tokens."""

    def reads_first(router: mode.Router) -> mode.Router:
        assert isinstance(router.scorer, mode.Linear)
        weight = jnp.zeros_like(router.scorer.weight).at[..., 0, 0].set(1)
        return eqx.tree_at(lambda r: r.scorer.weight, router, weight)

    return mode.map_routers(reads_first, layer)


def with_selector(select: mode.AbstractSelector, layer: Any) -> Any:
    return mode.map_routers(lambda r: eqx.tree_at(lambda r: r.select, r, select), layer)
