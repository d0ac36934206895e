"""Models that decode, one for each kind of layer, gate and selector."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PRNGKeyArray

import mode
from tests.helpers import rng


DIM, VOCAB = 8, 11
# Two prompts of different lengths, and the whole text.
BATCH, PROMPT, TOKENS = 2, 5, 12
LENGTHS = jnp.array([5, 2])

MakeLayer = Callable[[PRNGKeyArray], Any]


def block(
    key: PRNGKeyArray, feedforward: mode.AbstractBlock | None = None
) -> mode.TransformerBlock:
    """Two query heads that share their keys and values."""
    if feedforward is None:
        feedforward = mode.PositionWise(expert(key))
    return mode.TransformerBlock(DIM, 2, num_kv_heads=1, feedforward=feedforward, key=key)


def expert(key: PRNGKeyArray) -> mode.GELUFeedForward:
    """A small feed-forward."""
    return mode.GELUFeedForward(DIM, DIM, key=key)


def dense(key: PRNGKeyArray) -> mode.Residual:
    """A dense layer."""
    return mode.Residual(block(key))


def mod(
    gate: mode.AbstractGate = mode.AbsoluteGate(),
    capacity: float = 0.25,
    predictor: bool = False,
    weigh_values: bool = True,
) -> MakeLayer:
    """Mixture-of-Depths around a transformer block."""

    def make(key: PRNGKeyArray) -> mode.MixtureOfDepths:
        learned = mode.Predictor(DIM, key=key) if predictor else None
        return mode.MixtureOfDepths(
            block(key),
            DIM,
            capacity,
            gate=gate,
            weigh_values=weigh_values,
            predictor=learned,
            router_std=0.8,
            key=key,
        )

    return make


def queries(key: PRNGKeyArray) -> mode.MixtureOfQueries:
    """Skipped tokens are keys."""
    return mode.MixtureOfQueries(block(key), DIM, 0.25, router_std=0.8, key=key)


def apart(key: PRNGKeyArray) -> mode.Sequential:
    """Queries of the attention, and the feed-forward, each by a router of its own."""
    keys = jax.random.split(key)
    attention, feedforward = block(key).split()
    return mode.Sequential(
        [
            mode.MixtureOfQueries(attention, DIM, 0.5, router_std=0.8, key=keys[0]),
            mode.MixtureOfDepths(feedforward, DIM, 0.5, router_std=0.8, key=keys[1]),
        ]
    )


def recursion(share_keys: bool) -> MakeLayer:
    """Three rounds."""

    def make(key: PRNGKeyArray) -> mode.Recursion:
        capacities = (0.75, 0.5, 0.25)
        return mode.Recursion(
            block(key), DIM, capacities, share_keys=share_keys, router_std=0.8, key=key
        )

    return make


def exit_by_update(key: PRNGKeyArray) -> mode.Recursion:
    """Three rounds, which a token leaves after one that changed it little."""
    rule = mode.UpdateThreshold(0.45)
    return mode.Recursion(block(key), DIM, (0.75, 0.5, 0.5), select=rule, key=key)


def token_choice_recursion(share_keys: bool) -> MakeLayer:
    """Up to three rounds, whose slots run out."""

    def make(key: PRNGKeyArray) -> mode.TokenChoiceRecursion:
        return mode.TokenChoiceRecursion(
            block(key), DIM, 3, share_keys=share_keys, router_std=0.8, key=key
        )

    return make


def experts(
    *,
    gate: mode.AbstractGate = mode.SoftmaxGate(),
    select: mode.AbstractSelector = mode.ExpertChoice(),
    num_noop: int = 0,
    num_shared: int = 0,
    capacity_factor: float = 1.0,
    predictor: bool = False,
    inside: str = "block",
) -> MakeLayer:
    """Three experts: alone in a layer, in a transformer block, or in Mixture-of-Depths."""

    def make(key: PRNGKeyArray) -> mode.Residual | mode.MixtureOfDepths:
        mixture = mode.MixtureOfExperts(
            expert,
            DIM,
            3,
            gate=gate,
            select=select,
            num_noop=num_noop,
            num_shared=num_shared,
            capacity_factor=capacity_factor,
            predictor=mode.Predictor(DIM, 3, key=key) if predictor else None,
            router_std=0.8,
            key=key,
        )
        if inside == "layer":
            return mode.Residual(mixture)
        if inside == "block":
            return mode.Residual(block(key, mixture))
        gate_of_depths = mode.IdentityGate()  # whose scores are about 0, as the level supposes
        return mode.MixtureOfDepths(
            block(key, mixture), DIM, 0.5, gate=gate_of_depths, router_std=0.8, key=key
        )

    return make


@dataclasses.dataclass(frozen=True)
class Case:
    """A model: a period of layers, twice, and the rule by which it is made causal.

    `level` is about where the running quantiles are; `seed` one for which the routers select some
    tokens and not others, and drop some where there are few slots.
    """

    period: Sequence[MakeLayer]
    threshold: mode.AbstractThreshold | None = None
    level: float = 0.0
    seed: int = 0
    tied: bool = True


TOP_1 = mode.TokenChoice(1)
TOP_2 = mode.TokenChoice(2)
SELECTED = mode.SelectedSoftmaxGate()

CASES = {
    "dense": Case([dense], tied=False),
    "mod quantile absolute": Case([dense, mod()], level=0.9, seed=2),
    "mod quantile identity": Case([dense, mod(mode.IdentityGate())], level=0.3, seed=2),
    "mod of equation 1": Case(
        [dense, mod(mode.IdentityGate(), weigh_values=False)], level=0.3, seed=2
    ),
    "mod quantile sigmoid, half of the slots": Case(
        [dense, mod(mode.SigmoidGate(2.0))], mode.QuantileThreshold(0.5), level=-0.5
    ),
    "mod logit tanh, own capacity": Case(
        [dense, mod(mode.TanhGate(0.5))], mode.LogitThreshold(None)
    ),
    "mod predictor": Case([dense, mod(predictor=True)], seed=10),
    "queries": Case([dense, queries], level=1.4, seed=3),
    "queries, half of the slots": Case([queries], mode.QuantileThreshold(0.5), level=0.3),
    "attention and feed-forward apart": Case([dense, apart], level=1.4, seed=1),
    "loop": Case([lambda key: mode.Loop(block(key), 2)]),
    "recursion": Case([recursion(False)], seed=4),
    "recursion, shared keys, half of the slots": Case(
        [dense, recursion(True)], mode.QuantileThreshold(0.5), seed=4
    ),
    "recursion, exit by the size of the update": Case([dense, exit_by_update], seed=1),
    "token choice recursion": Case([dense, token_choice_recursion(False)], seed=2),
    "token choice recursion, shared keys": Case([token_choice_recursion(True)], seed=1),
    "experts quantile softmax, no-op": Case([experts(num_noop=1)], level=-1.2, seed=13),
    "experts logit selected softmax, half of the slots": Case(
        [dense, experts(gate=SELECTED, num_shared=1, inside="layer")],
        mode.LogitThreshold(0.5),
        seed=6,
    ),
    "experts predictor sigmoid, own capacity": Case(
        [experts(gate=mode.SigmoidGate(), predictor=True)], mode.PredictorThreshold(None), seed=8
    ),
    "token choice 2 selected softmax": Case([experts(gate=SELECTED, select=TOP_2)], seed=1),
    "token choice 1 softmax, no-ops": Case(
        [experts(select=TOP_1, num_noop=2, capacity_factor=0.75)], seed=17
    ),
    "staged quantile softmax": Case([experts(inside="depths")], level=-1.0, seed=23),
    "staged token choice, half of the slots": Case(
        [dense, experts(select=TOP_1, inside="depths")], mode.LogitThreshold(0.5)
    ),
}


@functools.cache
def build(name: str, dtype: str = "float32") -> mode.Transformer:
    """The causal model of a case, with thresholds and selection biases that differ by layer."""
    case = CASES[name]
    key = jax.random.key(case.seed)
    model = mode.Transformer(VOCAB, DIM, case.period, 2, tied=case.tied, dtype=dtype, key=key)

    def with_state(router: mode.Router) -> mode.Router:
        state = router.state
        bias = 0.3 * rng(1).normal(size=state.bias.shape)
        threshold = case.level + 0.2 * rng(2).normal(size=state.threshold.shape)
        return eqx.tree_at(
            lambda r: (r.state.bias, r.state.threshold),
            router,
            (jnp.asarray(bias, jnp.float32), jnp.asarray(threshold, jnp.float32)),
        )

    return mode.make_causal(mode.map_routers(with_state, model), threshold=case.threshold)


def draw_texts(seed: int = 0, batch: int = BATCH, tokens: int = TOKENS) -> Int[Array, "batch new"]:
    """Random token ids."""
    return jnp.asarray(rng(seed).integers(0, VOCAB, (batch, tokens)), jnp.int32)
