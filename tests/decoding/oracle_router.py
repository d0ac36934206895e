"""A router in NumPy: one token at a time, first come, first served."""

from typing import NamedTuple

import numpy as np

import mode
from tests import reference as ref
from tests.helpers import f64, oracle_router


GATES: dict[type[mode.AbstractGate], ref.Gate] = {
    mode.AbsoluteGate: "absolute",
    mode.IdentityGate: "raw",
    mode.SigmoidGate: "sigmoid",
    mode.TanhGate: "tanh",
    mode.SoftmaxGate: "softmax",
    mode.SelectedSoftmaxGate: "selected_softmax",
}


class Decision(NamedTuple):
    """What a router decided on one token: `logits` of choices, `selected`, `weight` of experts.

    `margin` is how far the closest choice was from being another one.
    """

    logits: ref.Floats
    selected: ref.Bools
    weight: ref.Floats
    requested: int
    margin: float


class Router:
    """A router with slots for a sequence of `max_tokens`, filled first come, first served."""

    def __init__(self, router: mode.Router, max_tokens: int) -> None:
        capacity = router.select.max_capacity
        self.slots = ref.token_capacity(
            max_tokens, router.capacity if capacity is None else capacity
        )
        self.router = router
        self.scorer = oracle_router(router)
        self.used = np.zeros(router.num_experts, np.int64)
        self.decisions: list[Decision | None] = []

    def decide(self, x: ref.Floats, change: float | None = None) -> Decision:
        """Routes the next token, given how much the last round changed it."""
        gate = GATES[type(self.router.gate)]
        logits = self.scorer @ x
        scores = ref.selection_scores(logits[None], gate, f64(self.router.state.bias))[0]
        requested, margin = self._requested(x, logits, scores, change)
        selected = np.zeros(len(self.used), bool)
        for choice in requested:
            if choice < len(self.used) and self.used[choice] < self.slots:
                selected[choice] = True
                self.used[choice] += 1
        index = np.where(selected, 0, 1)[:, None]  # of one token: 0 is the token, 1 is empty
        scale = getattr(self.router.gate, "scale", 1.0)
        weight = ref.combine_weights(logits[None], index, gate, scale)[:, 0]
        decision = Decision(logits, selected, weight, len(requested), margin)
        self.decisions.append(decision)
        return decision

    def _requested(
        self, x: ref.Floats, logits: ref.Floats, scores: ref.Floats, change: float | None
    ) -> tuple[list[int], float]:
        """The choices that the token requests, and the margin of the closest."""
        select, experts = self.router.select, len(self.used)
        if isinstance(select, mode.TokenChoice):
            ranked = sorted(range(len(scores)), key=lambda choice: (-scores[choice], choice))
            best = [float(scores[choice]) for choice in ranked]
            last = best[select.k - 1] - best[select.k] if select.k < len(best) else np.inf
            return ranked[: select.k], last
        if isinstance(select, mode.QuantileThreshold):
            above = scores[:experts] - f64(self.router.state.threshold)
        elif isinstance(select, mode.LogitThreshold):
            above = logits[:experts]
        elif isinstance(select, mode.UpdateThreshold):
            assert change is not None
            above = np.array([change - select.least])
        else:
            assert isinstance(select, mode.PredictorThreshold)
            assert isinstance(self.router.predictor, mode.Predictor)
            inner = x @ f64(self.router.predictor.up.weight)
            above = (inner * ref.sigmoid(inner)) @ f64(self.router.predictor.down.weight)
        return [e for e in range(experts) if above[e] > 0], float(np.abs(above).min())
