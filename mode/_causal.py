"""From a model trained under top-k, which sees the future, to one that may be sampled from."""

import equinox as eqx
from jaxtyping import Array, Bool, PyTree

from ._block import Routings
from ._capacity import Share, token_capacity
from ._router import Router
from ._routing import Routing
from ._select import Request
from ._state import for_each_router, map_routers
from ._threshold import AbstractRule, ByPredictor, ByQuantile, Threshold


def _rule(router: Router, by: AbstractRule | None) -> AbstractRule:
    if by is not None:
        return by
    return ByQuantile() if router.predictor is None else ByPredictor()


def causal(model: PyTree, *, by: AbstractRule | None = None, limit: Share | None = 1.0) -> PyTree:
    """A copy of `model` in which no token's routing depends on later tokens.

    Each selector that looks ahead becomes `Threshold(by, limit)`; the others, `TokenChoice`,
    `RandomChoice`, `Strided` and `Replay`, are causal as they are. A `Threshold` that stands there
    already is replaced too. Parameters and router state are shared with `model`.

    The running quantile is the default because nothing that was measured beats it, and it needs no
    loss and no parameters. At 57 thousand parameters and groups of 128 tokens, over 3 to 9 seeds
    and 2 training budgets (`benchmarks/EVIDENCE.md`), its causal loss lay within 0.1 % of the top-k
    loss, at 0.124 to 0.133 of the tokens where top-k took 0.125. Quantiles by position or at other
    rates came to the same loss, within 0.0006 bits per byte; at rates below 0.03 they took up to a
    third more tokens when training was short. The predictor, which costs parameters and a loss, was
    not told from it (+0.007 bits, -0.001 to +0.016). Training under the threshold at the end, for
    the last tenth or fifth, was as good as not at all; for the last half or from the start it was
    worse, by 0.002 and 0.008 bits.

    Content is one thing, length another: under `TokenChoice`, `Strided`, or a `limit` below 1 the
    slots are a share of the *whole* length, so a prefix alone may be routed otherwise than inside a
    longer sequence. Compare at one length, padded at the end. (`RandomChoice`, `Strided` and
    `Replay` decide for whole sequences: such a model can be evaluated, but `prefill` refuses it.)

    **Arguments:**

    - `model`: any tree with routers in it: a layer, a model, a training state.
    - `by`: the rule of membership; by default the predictor of a router that has one, the running
        quantile of any other. A quantile that `update_state` never moved is 0 and lets about half
        of the tokens pass; one call, `update_state(model, model(tokens)[1])`, calibrates it. An
        untrained predictor guesses as well as it can.
    - `limit`: slots as a share of the tokens; `1.0` takes every token that asks, and `None` is each
        router's own capacity: the form in which the *training* forward runs under the threshold
        at the cost it had under top-k. Call it inside the loss for that: an optimizer's state has
        the structure of the model it was made for, selectors included.

    >>> import jax, mode
    >>> model = mode.mod_decoder(256, 32, depth=4, num_heads=2, key=jax.random.key(0))
    >>> mode.testing.assert_causal(mode.causal(model), vocab=256, tokens=16)

    *Source:* arXiv:2404.02258, section 3.5.
    """

    def replace(router: Router) -> Router:
        if not (router.select.looks_ahead or isinstance(router.select, Threshold)):
            return router
        return eqx.tree_at(lambda r: r.select, router, Threshold(_rule(router, by), limit))

    return map_routers(replace, model)


def causal_membership(
    model: PyTree, routings: Routings, *, by: AbstractRule | None = None
) -> list[Bool[Array, "*groups tokens experts"]]:
    """Whom the causal rule would take, given the very hidden states that `routings` saw.

    One mask per routing, to hold against `routing.selected` with `agreement`. (Running the causal
    model instead would compare decisions about different hidden states from the second routed
    layer on.)
    """

    def asked(router: Router, routing: Routing) -> Bool[Array, "*groups tokens experts"]:
        request = Request(
            scores=router.scores(routing.logits),
            logits=routing.logits,
            predictor=routing.predictor,
            threshold=router.state.threshold_at(routing.positions).astype(routing.logits.dtype),
            valid=routing.valid,
            slots=token_capacity(routing.num_tokens, 1.0),
        )
        return (_rule(router, by)(request) > 0) & routing.valid[..., None]

    return for_each_router(asked, model, routings)
