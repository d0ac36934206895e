"""A decoder in NumPy: one sequence, one token at a time, from the definitions.

It reads the weights of a model and calls none of its code. Nothing in it handles two tokens at
once: each block keeps a list of what it computed, and a new token looks at that list.
"""

from collections.abc import Callable
from typing import Any, Protocol

import equinox as eqx
import jax
import numpy as np

import mode
from tests import reference as ref
from tests.decoding.oracle_router import Router
from tests.helpers import f64, oracle_experts, oracle_function, oracle_options, oracle_projections


class Part(Protocol):
    """A block or a layer: maps the next token's hidden state to its update or its hidden state.

    `weight` multiplies the values of the token, where there are such.
    """

    routers: list[Router]

    def step(
        self, x: ref.Floats, position: int, weight: float = 1.0, *, is_query_alone: bool = False
    ) -> ref.Floats: ...


class Attention:
    """The keys and values of every token so far, and softmax attention from the newest.

    A token that `is_query_alone` left its keys before, and leaves none now.
    """

    def __init__(self, attention: mode.Attention) -> None:
        self.attention = attention
        self.projections = oracle_projections(attention)
        self.routers: list[Router] = []
        self.past: list[tuple[ref.Floats, ref.Floats, int]] = []

    def step(
        self, x: ref.Floats, position: int, weight: float = 1.0, *, is_query_alone: bool = False
    ) -> ref.Floats:
        """Attends from the next token to itself and to those before it."""
        heads, kv_heads = self.attention.num_heads, self.attention.num_kv_heads
        q, k, v = (
            (x @ weight).reshape(count, -1)
            for weight, count in zip(self.projections, (heads, kv_heads, kv_heads), strict=True)
        )
        theta = self.attention.rope_theta
        if theta is not None:
            at = np.array([position])
            q, k = ref.rope(q[None], at, theta)[0], ref.rope(k[None], at, theta)[0]
        if not is_query_alone:
            self.past.append((k, weight * v, position))
        options = oracle_options(self.attention.attend)
        mixed = np.zeros_like(q)
        for head in range(heads):
            group = head * kv_heads // heads
            weights = ref.softmax(
                [
                    ref.attention_score(q[head], k[group], position - at, head, heads, options)
                    for k, _, at in self.past
                ]
            )
            for weight, (_, v, _) in zip(weights, self.past, strict=True):
                mixed[head] += weight * v[group]
        return mixed.reshape(-1) @ f64(self.attention.out.weight)


class FeedForward:
    """A function of one token."""

    def __init__(self, block: mode.PositionWise) -> None:
        function = block.function
        assert isinstance(function, mode.GELUFeedForward | mode.SwiGLUFeedForward)
        self.function = oracle_function(function)
        self.routers: list[Router] = []

    def step(
        self, x: ref.Floats, position: int, weight: float = 1.0, *, is_query_alone: bool = False
    ) -> ref.Floats:
        """Maps the token."""
        return self.function(x)


class Experts:
    """A sum over the experts that selected the token, and all shared ones."""

    def __init__(self, block: mode.MixtureOfExperts, max_tokens: int) -> None:
        self.router = Router(block.router, max_tokens)
        self.routers = [self.router]
        self.experts = oracle_experts(block.experts)
        self.shared = [] if block.shared is None else oracle_experts(block.shared)

    def step(
        self, x: ref.Floats, position: int, weight: float = 1.0, *, is_query_alone: bool = False
    ) -> ref.Floats:
        """Adds up what the token's experts return, by their weights."""
        decision = self.router.decide(x)
        update = np.zeros_like(x)
        for expert in np.flatnonzero(decision.selected):
            update += decision.weight[expert] * self.experts[expert](x)
        return update + sum(shared(x) for shared in self.shared)


class Block:
    """Pre-norm attention and feed-forward as one update."""

    def __init__(self, block: mode.TransformerBlock, max_tokens: int) -> None:
        self.block = block
        self.attention = Attention(block.attention)
        self.feedforward = make_block(block.feedforward, max_tokens)
        self.routers = self.feedforward.routers

    def step(
        self, x: ref.Floats, position: int, weight: float = 1.0, *, is_query_alone: bool = False
    ) -> ref.Floats:
        """Returns attention plus feed-forward, without the residual."""
        normed = ref.rms_norm(x[None], f64(self.block.attention_norm.weight))[0]
        attended = self.attention.step(normed, position, weight, is_query_alone=is_query_alone)
        normed = ref.rms_norm((x + attended)[None], f64(self.block.feedforward_norm.weight))[0]
        return attended + self.feedforward.step(normed, position)


class Dense:
    """x + f(x)."""

    def __init__(self, layer: mode.Residual, max_tokens: int) -> None:
        self.block = make_block(layer.block, max_tokens)
        self.routers = self.block.routers

    def step(
        self, x: ref.Floats, position: int, weight: float = 1.0, *, is_query_alone: bool = False
    ) -> ref.Floats:
        """Adds the block's update."""
        return x + self.block.step(x, position)


class Depths:
    """x + r f(x) for a selected token, x for the others, which leave nothing behind."""

    def __init__(self, layer: mode.MixtureOfDepths, max_tokens: int) -> None:
        self.router = Router(layer.router, max_tokens)
        self.block = make_block(layer.block, self.router.slots)
        self.weigh_values = layer.weigh_values
        self.routers = [self.router, *self.block.routers]

    def step(
        self, x: ref.Floats, position: int, weight: float = 1.0, *, is_query_alone: bool = False
    ) -> ref.Floats:
        """Runs the block on a selected token, with the position that it had in the text."""
        decision = self.router.decide(x)
        if decision.selected[0]:
            given = decision.weight[0] if self.weigh_values else 1.0
            return x + decision.weight[0] * self.block.step(x, position, given)
        for router in self.block.routers:
            router.decisions.append(None)
        return x


class Normed:
    """A block of a normed input."""

    def __init__(self, block: mode.PreNorm, max_tokens: int) -> None:
        assert isinstance(block.norm, mode.RMSNorm)
        self.weight = f64(block.norm.weight)
        self.block = make_block(block.block, max_tokens)
        self.routers = self.block.routers

    def step(
        self, x: ref.Floats, position: int, weight: float = 1.0, *, is_query_alone: bool = False
    ) -> ref.Floats:
        """Runs the block on the normed token."""
        return self.block.step(ref.rms_norm(x[None], self.weight)[0], position, weight)


class Queries:
    """x + r f(x) for a selected token, x for the others, which leave their keys all the same."""

    def __init__(self, layer: mode.MixtureOfQueries, max_tokens: int) -> None:
        self.router = Router(layer.router, max_tokens)
        # Of all tokens: a skipped one leaves its keys, and the rest of its update is not used.
        self.block = make_block(layer.block, max_tokens)
        self.routers = [self.router]
        assert not self.block.routers

    def step(
        self, x: ref.Floats, position: int, weight: float = 1.0, *, is_query_alone: bool = False
    ) -> ref.Floats:
        """Runs the block on every token, and adds its update to a selected one."""
        decision, update = self.router.decide(x), self.block.step(x, position)
        return x + decision.weight[0] * update if decision.selected[0] else x


class Layers:
    """Layers in turn."""

    def __init__(self, layer: mode.Sequential, max_tokens: int) -> None:
        self.layers = [make_layer(one, max_tokens) for one in layer.layers]
        self.routers = [router for one in self.layers for router in one.routers]

    def step(
        self, x: ref.Floats, position: int, weight: float = 1.0, *, is_query_alone: bool = False
    ) -> ref.Floats:
        """Runs each on what the one before returned."""
        for layer in self.layers:
            x = layer.step(x, position)
        return x


class Rounds:
    """h + w f(h) in as many rounds as a token stays; keys of each round, or of the first alone."""

    def __init__(
        self,
        layer: mode.Recursion | mode.TokenChoiceRecursion | mode.Loop,
        repeats: int,
        share_keys: bool,
        max_tokens: int,
    ) -> None:
        self.share_keys = share_keys
        self.blocks = [make_block(layer.block, max_tokens) for _ in range(repeats)]
        self.routers: list[Router] = []

    def round(self, x: ref.Floats, number: int, position: int, weight: float) -> ref.Floats:
        """Runs one round on a token."""
        if self.share_keys:
            update = self.blocks[0].step(x, position, is_query_alone=number > 0)
        else:
            update = self.blocks[number].step(x, position, weight)
        return x + weight * update


class Looped(Rounds):
    """Every token takes part in every round, with weight 1."""

    def __init__(self, layer: mode.Loop, max_tokens: int) -> None:
        super().__init__(layer, layer.repeats, False, max_tokens)

    def step(
        self, x: ref.Floats, position: int, weight: float = 1.0, *, is_query_alone: bool = False
    ) -> ref.Floats:
        """Runs all rounds."""
        for number in range(len(self.blocks)):
            x = self.round(x, number, position, 1.0)
        return x


class Narrowing(Rounds):
    """A router in each round, which a token that left does not come to."""

    def __init__(self, layer: mode.Recursion, max_tokens: int) -> None:
        super().__init__(layer, len(layer.routers), layer.share_keys, max_tokens)
        self.routers = [Router(router, max_tokens) for router in layer.routers]

    def step(
        self, x: ref.Floats, position: int, weight: float = 1.0, *, is_query_alone: bool = False
    ) -> ref.Floats:
        """Runs rounds until a router does not select the token."""
        is_in, change = True, np.inf
        for number, router in enumerate(self.routers):
            if not is_in:
                router.decisions.append(None)
                continue
            decision = router.decide(x, change)
            is_in = bool(decision.selected[0])
            if is_in:
                after = self.round(x, number, position, decision.weight[0])
                change, x = float(np.linalg.norm(after - x) / np.linalg.norm(x)), after
        return x


class Choosing(Rounds):
    """One router at the start, whose experts are the depths."""

    def __init__(self, layer: mode.TokenChoiceRecursion, max_tokens: int) -> None:
        super().__init__(layer, layer.router.num_experts, layer.share_keys, max_tokens)
        self.routers = [Router(layer.router, max_tokens)]

    def step(
        self, x: ref.Floats, position: int, weight: float = 1.0, *, is_query_alone: bool = False
    ) -> ref.Floats:
        """Runs as many rounds as the token chose."""
        decision = self.routers[0].decide(x)
        for depth in np.flatnonzero(decision.selected):
            for number in range(depth + 1):
                x = self.round(x, number, position, decision.weight[depth])
        return x


class Decoder:
    """A model and the text of one sequence so far, of at most `max_tokens` tokens."""

    def __init__(self, model: mode.Transformer, max_tokens: int) -> None:
        self.model = model
        self.length = 0
        # For each stack, the layers of each repeat of its period.
        self.stacks = [
            [[make_layer(layer, max_tokens) for layer in period] for period in periods(stack)]
            for stack in model.stacks
        ]

    def step(self, token: int) -> ref.Floats:
        """Appends a token and returns the logits of the next one, `[vocab]`."""
        embedding = f64(self.model.embedding)
        x = embedding[token] * np.sqrt(embedding.shape[1])
        for stack in self.stacks:
            for period in stack:
                for layer in period:
                    x = layer.step(x, self.length)
        self.length += 1
        normed = ref.rms_norm(x[None], f64(self.model.norm.weight))[0]
        head = embedding.T if self.model.head is None else f64(self.model.head.weight)
        return normed @ head

    @property
    def routers(self) -> list[list[Router]]:
        """The routers in the order of the model's routings, each with its repeats."""
        found: list[list[Router]] = []
        for stack in self.stacks:
            by_repeat = [[r for layer in period for r in layer.routers] for period in stack]
            found.extend(list(repeats) for repeats in zip(*by_repeat, strict=True))
        return found


def periods(stack: mode.LayerStack) -> list[tuple[Any, ...]]:
    """The layers of each repeat, with the parameters that are their own."""
    arrays, rest = eqx.partition(stack.layers, eqx.is_array)
    return [
        eqx.combine(jax.tree.map(lambda leaf, at=repeat: leaf[at], arrays), rest)
        for repeat in range(stack.repeats)
    ]


def make_block(block: object, max_tokens: int) -> Part:
    """The oracle of a block."""
    if isinstance(block, mode.MixtureOfExperts):
        return Experts(block, max_tokens)
    if isinstance(block, mode.PositionWise):
        return FeedForward(block)
    if isinstance(block, mode.PreNorm):
        return Normed(block, max_tokens)
    if isinstance(block, mode.Attention):
        return Attention(block)
    assert isinstance(block, mode.TransformerBlock), block
    return Block(block, max_tokens)


LAYERS: dict[type, Callable[[Any, int], Part]] = {
    mode.Residual: Dense,
    mode.MixtureOfDepths: Depths,
    mode.MixtureOfQueries: Queries,
    mode.Sequential: Layers,
    mode.Loop: Looped,
    mode.Recursion: Narrowing,
    mode.TokenChoiceRecursion: Choosing,
}


def make_layer(layer: object, max_tokens: int) -> Part:
    """The oracle of a layer."""
    return LAYERS[type(layer)](layer, max_tokens)
