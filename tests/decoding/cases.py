"""Models that decode, one for each kind of layer, gate and selector, and the oracle's answers."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PRNGKeyArray
from numpy.typing import NDArray

import mode
from tests import reference as ref
from tests.decoding.oracle import Decoder
from tests.helpers import rng


DIM, VOCAB = 8, 11
# Two prompts of different lengths, and the whole text.
BATCH, PROMPT, TOKENS = 2, 5, 12
LENGTHS = jnp.array([5, 2])

MakeLayer = Callable[[PRNGKeyArray], mode.Residual | mode.MixtureOfDepths]


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
    gate: mode.AbstractGate = mode.IdentityGate(), capacity: float = 0.25, predictor: bool = False
) -> MakeLayer:
    """Mixture-of-Depths around a transformer block."""

    def make(key: PRNGKeyArray) -> mode.MixtureOfDepths:
        learned = mode.Predictor(DIM, key=key) if predictor else None
        return mode.MixtureOfDepths(
            block(key), DIM, capacity, gate=gate, predictor=learned, router_std=0.8, key=key
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
        return mode.MixtureOfDepths(block(key, mixture), DIM, 0.5, router_std=0.8, key=key)

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
    "mod quantile identity": Case([dense, mod()], level=0.3, seed=2),
    "mod quantile sigmoid, half of the slots": Case(
        [dense, mod(mode.SigmoidGate(2.0))], mode.QuantileThreshold(0.5), level=-0.5
    ),
    "mod logit tanh, own capacity": Case(
        [dense, mod(mode.TanhGate(0.5))], mode.LogitThreshold(None)
    ),
    "mod predictor": Case([dense, mod(predictor=True)], seed=10),
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


@dataclasses.dataclass(frozen=True)
class RoutedTokens:
    """What one router did with each token of a text, whatever slots its record has.

    `[repeats, batch, tokens, experts]`, and `logits` `[repeats, batch, tokens, choices]`; zeros
    where a token did not come to the router.
    """

    selected: ref.Bools
    weight: ref.Floats
    logits: ref.Floats

    def at(self, tokens: list[list[int]]) -> "RoutedTokens":
        """The part with these tokens of each sequence."""
        index = np.array(tokens)[None, :, :, None]
        return RoutedTokens(
            np.take_along_axis(self.selected, index, axis=2),
            np.take_along_axis(self.weight, index, axis=2),
            np.take_along_axis(self.logits, index, axis=2),
        )


@dataclasses.dataclass(frozen=True)
class Answers:
    """What the oracle says of a text: logits of every next token, and every routing."""

    logits: ref.Floats
    routings: list[RoutedTokens]


def ask(
    model: mode.Transformer, text: Int[Array, "batch tokens"], *, margin: float = 1e-3
) -> Answers:
    """Decodes a text by the oracle, and checks that no choice in it hung by a rounding error."""
    decoders = [Decoder(model, text.shape[1]) for _ in text]
    logits = [
        [decoder.step(int(token)) for token in row]
        for decoder, row in zip(decoders, np.asarray(text), strict=True)
    ]
    routings = []
    for place, repeats in enumerate(decoders[0].routers):
        router = repeats[0].router
        experts, choices = router.num_experts, router.state.bias.shape[-1]
        shape = (len(repeats), *text.shape)
        selected = np.zeros((*shape, experts), bool)
        weight, of_choices = np.zeros((*shape, experts)), np.zeros((*shape, choices))
        for repeat, row in np.ndindex(shape[:2]):
            decisions = decoders[row].routers[place][repeat].decisions
            for token, decision in enumerate(decisions):
                if decision is not None:
                    assert decision.margin > margin, "choose another seed"
                    selected[repeat, row, token] = decision.selected
                    weight[repeat, row, token] = decision.weight
                    of_choices[repeat, row, token] = decision.logits
        routings.append(RoutedTokens(selected, weight, of_choices))
    return Answers(np.array(logits), routings)


@functools.cache
def answers(name: str) -> Answers:
    """The oracle's answers to `draw_texts()`, in which each router selects some tokens."""
    given = ask(build(name), draw_texts())
    for routing in given.routings:
        selected = routing.selected.mean(axis=(1, 2, 3))
        assert ((selected > 0) & (selected < 1)).all()
    return given


def by_token(model: mode.Transformer, routings: tuple[mode.Routing, ...]) -> list[RoutedTokens]:
    """Turns the records of a model's call into what happened to each token."""
    found = []
    outer = None
    for is_nested, record in zip(_is_nested(model), routings, strict=True):
        routing = jax.tree.map(np.asarray, record)
        shape = (*routing.logits.shape[:-1], routing.index.shape[-2])
        selected, weight = np.zeros(shape, bool), np.zeros(shape)
        for *group, expert, slot in np.argwhere(routing.index < shape[-2]):
            token = routing.index[(*group, expert, slot)]
            selected[(*group, token, expert)] = True
            weight[(*group, token, expert)] = routing.weight[(*group, expert, slot)]
        logits = np.where(routing.valid[..., None], routing.logits, 0)
        if is_nested:
            assert outer is not None
            assert not selected[outer.index[..., 0, :] == outer.logits.shape[-2]].any()
            selected, weight = _from_slots(selected, outer), _from_slots(weight, outer)
            logits = _from_slots(logits, outer)
        else:
            outer = routing
        found.append(RoutedTokens(selected, weight, logits))
    return found


def _is_nested(model: mode.Transformer) -> list[bool]:
    """Which routers see the slots of another one."""
    flags: list[bool] = []
    for stack in model.stacks:
        for layer in stack.layers:
            inside = isinstance(layer, mode.MixtureOfDepths)
            flags.extend(inside and at > 0 for at in range(len(mode.routers(layer))))
    return flags


def _from_slots(values: NDArray[Any], outer: mode.Routing) -> NDArray[Any]:
    """Moves what happened to slots to the tokens in them."""
    moved = np.zeros((*outer.logits.shape[:-1], values.shape[-1]), values.dtype)
    for *group, expert, slot in np.argwhere(outer.index < moved.shape[-2]):
        moved[(*group, outer.index[(*group, expert, slot)])] = values[(*group, slot)]
    return moved
