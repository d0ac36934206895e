"""The oracle's answers, and the records of a model in a form that compares with them."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Int
from numpy.typing import NDArray

import mode
from tests import reference as ref
from tests.decoding.cases import build, draw_texts
from tests.decoding.oracle import Decoder


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
            inside = isinstance(layer, mode.MixtureOfDepths | mode.MixtureOfQueries)
            flags.extend(inside and at > 0 for at in range(len(mode.routers(layer))))
    return flags


def _from_slots(values: NDArray[Any], outer: mode.Routing) -> NDArray[Any]:
    """Moves what happened to slots to the tokens in them."""
    moved = np.zeros((*outer.logits.shape[:-1], values.shape[-1]), values.dtype)
    for *group, expert, slot in np.argwhere(outer.index < moved.shape[-2]):
        moved[(*group, outer.index[(*group, expert, slot)])] = values[(*group, slot)]
    return moved
