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

    `bound` says that its routing is bound to the shape of the input: random numbers are drawn by
    shape and a record is replayed on the groups it was made on, so `vmap` is not the batch.
    """

    name: str
    make: Callable[[PRNGKeyArray], Any]
    bound: bool = False

    def __str__(self) -> str:
        return self.name


class Blend(eqx.Module):
    """A small block of a user's own: each token gets the running mean of those before it, mapped.

    It looks at positions and segments, so that a layer which mixes these up is found out.
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


def expert(key: PRNGKeyArray) -> mode.GELU:
    return mode.GELU(DIM, DIM, key=key)


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


def replayed(key: PRNGKeyArray) -> mode.MixtureOfDepths:
    layer = depth(key)
    _, (routing,) = layer(hidden())
    return eqx.tree_at(lambda m: m.router.select, layer, mode.Replay(routing))


def predicted(key: PRNGKeyArray, **options: Any) -> mode.MixtureOfDepths:
    layer_key, predictor_key = jax.random.split(key)
    return depth(layer_key, predictor=mode.Predictor(DIM, key=predictor_key), **options)


def stack(key: PRNGKeyArray, **options: Any) -> mode.Stack:
    """Layers of a decoder, dense and routed in turns, scanned over."""
    makers = mode.every_other(lambda key: mode.Residual(Blend(key)), depth, options.pop("depth", 4))
    return mode.Transformer(VOCAB, DIM, makers, key=key, **options).stacks[0]


CASES = [
    Case("dense", lambda key: mode.Residual(transformer_block(key))),
    Case("dense_position_wise", lambda key: mode.Residual(mode.PositionWise(expert(key)))),
    Case("dense_delta", lambda key: mode.Residual(mode.Delta(Skipping(key)))),
    Case("moe_expert_choice", lambda key: experts(key)),
    Case("moe_token_choice", lambda key: experts(key, select=mode.TokenChoice(2))),
    Case("moe_noop", lambda key: experts(key, num_noop=2)),
    Case("moe_noop_top_1", lambda key: experts(key, num_noop=2, select=mode.TokenChoice(1))),
    Case("moe_shared_sigmoid", lambda key: experts(key, num_shared=2, gate=mode.Sigmoid())),
    Case(
        "moe_selected_softmax",
        lambda key: experts(key, gate=mode.SelectedSoftmax(), select=mode.TokenChoice(2)),
    ),
    Case("moe_strided", lambda key: experts(key, select=mode.Strided())),
    Case("moe_by_logit", lambda key: experts(key, select=mode.Threshold(mode.ByLogit(), 0.5))),
    Case("mod", lambda key: depth(key, functools.partial(transformer_block, num_kv_heads=1))),
    Case("mod_own_block", lambda key: depth(key)),
    Case("mod_delta", lambda key: depth(key, lambda k: mode.Delta(Skipping(k)))),
    Case("mod_random", lambda key: depth(key, select=mode.RandomChoice()), bound=True),
    Case("mod_strided", lambda key: depth(key, select=mode.Strided(), gate=mode.Sigmoid(2.0))),
    Case("mod_tanh", lambda key: depth(key, gate=mode.Tanh())),
    Case("mod_replay", replayed, bound=True),
    Case("mod_predictor", predicted),
    Case("mod_by_quantile", lambda key: depth(key, select=mode.Threshold())),
    Case("mod_by_logit", lambda key: depth(key, select=mode.Threshold(mode.ByLogit(), 0.5))),
    Case(
        "mod_by_predictor",
        lambda key: predicted(key, select=mode.Threshold(mode.ByPredictor(), limit=None)),
    ),
    Case("staged", lambda key: mode.staged_mode(expert, DIM, 2, 2, capacity=0.5, key=key)),
    Case("integrated", lambda key: mode.integrated_mode(expert, DIM, 2, 3, 1, key=key)),
    Case("reduced", lambda key: mode.reduced_capacity_moe(expert, DIM, 2, 3, 1, key=key)),
    Case("stack", lambda key: stack(key)),
    Case("stack_remat", lambda key: stack(key, remat=True)),
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
    """What the layer of a case makes of `hidden()`: `(hidden, routings)`."""
    return run(build(case), hidden())


def loss(parameters: PyTree, rest: PyTree, x: Array, info: mode.TokenInfo | None = None) -> Array:
    """A loss on the output that no symmetry cancels, mean over groups."""
    out, _ = eqx.combine(parameters, rest)(x, info, key=jax.random.key(2))
    return jnp.sum(jnp.sin(out.astype(jnp.float32))) / x.shape[0]


def split(layer: Any) -> tuple[PyTree, PyTree]:
    """Parameters and the rest."""
    return eqx.partition(layer, mode.trainable(layer))


class One(mode.AbstractGate):
    """A gate of a user's own: every weight is 1, so that the layer is the block it routes to."""

    def scores(self, logits: Array) -> Array:
        return logits

    def __call__(self, logits: Array, selected: Array) -> Array:
        return jnp.ones_like(logits[..., : selected.shape[-1]])


def ranked(layer: Any) -> Any:
    """The layer with a router that reads the first feature: the test decides who is selected."""

    def reads_first(router: mode.Router) -> mode.Router:
        weight = jnp.zeros_like(router.scorer.weight).at[..., 0, 0].set(1)
        return eqx.tree_at(lambda r: r.scorer.weight, router, weight)

    return mode.map_routers(reads_first, layer)


def with_selector(select: mode.AbstractSelector, layer: Any) -> Any:
    return mode.map_routers(lambda r: eqx.tree_at(lambda r: r.select, r, select), layer)


def with_bias(bias: Array, layer: Any) -> Any:
    """The layer with a selection bias in each of its routers."""
    return mode.map_routers(lambda r: eqx.tree_at(lambda r: r.state.bias, r, bias), layer)
