"""Random inputs of routers and selectors, and the oracle's answer to them."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from numpy.typing import ArrayLike, NDArray

import mode
from tests import reference as ref
from tests.helpers import f64, oracle_router, rng


DIM = 8

# Each gate with the oracle's name for it and its scale.
GATES: dict[str, tuple[mode.AbstractGate, ref.Gate, float]] = {
    "absolute": (mode.AbsoluteGate(), "absolute", 1.0),
    "identity": (mode.IdentityGate(), "raw", 1.0),
    "sigmoid": (mode.SigmoidGate(), "sigmoid", 1.0),
    "twice sigmoid": (mode.SigmoidGate(2.0), "sigmoid", 2.0),
    "tanh": (mode.TanhGate(0.5), "tanh", 0.5),
    "softmax": (mode.SoftmaxGate(), "softmax", 1.0),
    "selected softmax": (mode.SelectedSoftmaxGate(), "selected_softmax", 1.0),
}


def draw_valid(seed: int, groups: tuple[int, ...], tokens: int) -> ref.Bools:
    """Padding at random tokens; the last of several groups is all padding."""
    valid = rng(seed).random((*groups, tokens)) < 0.7
    if groups:
        valid[(-1,) * len(groups)] = False
    return valid


def draw_scores(kind: str, seed: int, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Distinct scores, scores with many ties, or ties and scores of minus infinity."""
    if kind == "distinct":
        return rng(seed).normal(size=shape).astype(np.float32)
    scores = rng(seed).integers(-1, 2, shape).astype(np.float32)
    if kind == "barred":
        scores[rng(seed + 1).random(shape) < 0.4] = -np.inf
    return scores


def selector_inputs(
    scores: ArrayLike, valid: ArrayLike, experts: int, slots: int, **fields: Any
) -> mode.RoutingInputs:
    """Inputs that are enough for a selector which reads the scores alone."""
    scores = jnp.asarray(scores, jnp.float32)
    given = {
        "logits": scores,
        "predictor": None,
        "threshold": jnp.zeros(experts),
        "free": None,
        **fields,
    }
    return mode.RoutingInputs(scores=scores, valid=jnp.asarray(valid), slots=slots, **given)


def pad_load(assignment: ref.Assignment, noop: int) -> ref.Assignment:
    """The oracle's load, with zeros for no-ops that its rule does not know."""
    width = [(0, 0)] * (assignment.load.ndim - 1) + [(0, noop)]
    return ref.Assignment(assignment.index, np.pad(assignment.load, width))


def assert_assigned(got: mode.Assignment | mode.Routing, expected: ref.Assignment) -> None:
    """The slots and the load are the oracle's, number by number, in int32."""
    assert got.index.dtype == got.load.dtype == jnp.int32
    np.testing.assert_array_equal(got.index, expected.index)
    np.testing.assert_array_equal(got.load, expected.load)


def make_router(seed: int, **options: Any) -> mode.Router:
    """A router whose logits are far from 0, with a random bias, threshold and predictor."""
    router_key, predictor_key = jax.random.split(jax.random.key(seed))
    experts, noop = options.get("num_experts", 3), options.get("num_noop", 0)
    defaults = {
        "num_experts": experts,
        "capacity": 1 / 3,
        "select": mode.ExpertChoice(),
        "gate": mode.IdentityGate(),
        "predictor": mode.Predictor(DIM, experts, key=predictor_key),
        "std": 1.0,
    }
    router = mode.Router(DIM, key=router_key, **{**defaults, **options})
    bias = jnp.asarray(rng(seed).normal(size=experts + noop), jnp.float32)
    threshold = jnp.asarray(0.3 * rng(seed + 1).normal(size=experts) - 1, jnp.float32)
    return eqx.tree_at(lambda r: (r.state.bias, r.state.threshold), router, (bias, threshold))


def scorer_weight(router: mode.Router) -> Float[Array, "dim choices"]:
    """The weights of a router's scorer."""
    assert isinstance(router.scorer, mode.Linear)
    return router.scorer.weight


def predictor_logits(routing: mode.Routing) -> Float[Array, "*groups tokens experts"]:
    """The predictor's logits of a routing that has them."""
    assert routing.predictor is not None
    return routing.predictor


def oracle_predictor(router: mode.Router, x: ref.Floats) -> ref.Floats:
    """The predictor's logits of one group, `[tokens, experts]`."""
    assert isinstance(router.predictor, mode.Predictor)
    inner = x @ f64(router.predictor.up.weight)
    return (inner * ref.sigmoid(inner)) @ f64(router.predictor.down.weight)


def oracle_assignment(
    select: mode.AbstractSelector,
    scores: ref.Floats,
    logits: ref.Floats,
    predictor: ref.Floats,
    threshold: ref.Floats,
    valid: ref.Bools,
    slots: int,
) -> ref.Assignment:
    """What a selector assigns in one group: `scores` and `logits` are `[tokens, choices]`."""
    experts = len(threshold)
    noop = scores.shape[-1] - experts
    if isinstance(select, mode.ExpertChoice):
        return ref.expert_choice(scores, valid, experts, slots)
    if isinstance(select, mode.TokenChoice):
        return ref.token_choice(scores, valid, experts, slots, select.k)
    if isinstance(select, mode.Strided):
        return pad_load(ref.strided(valid, experts, slots), noop)
    if isinstance(select, mode.PredictorThreshold):
        margin = predictor
    elif isinstance(select, mode.LogitThreshold):
        margin = logits[:, :experts]
    else:
        assert isinstance(select, mode.QuantileThreshold)
        margin = scores[:, :experts] - threshold
    return pad_load(ref.threshold(margin, valid, slots), noop)


def oracle_selection(
    router: mode.Router,
    select: mode.AbstractSelector,
    gate: ref.Gate,
    logits: ref.Floats,
    predictor: ref.Floats,
    valid: ref.Bools,
) -> ref.Assignment:
    """What `select` assigns in one group of the router's logits, in its own number of slots."""
    capacity = router.capacity if select.max_capacity is None else select.max_capacity
    return oracle_assignment(
        select,
        ref.selection_scores(logits, gate, f64(router.state.bias)),
        logits,
        predictor,
        f64(router.state.threshold),
        valid,
        ref.token_capacity(len(valid), capacity),
    )


def oracle_logits(router: mode.Router, x: Float[Array, "tokens dim"]) -> ref.Floats:
    """The router's logits of one group, `[tokens, choices]`."""
    return ref.router_logits(f64(x), oracle_router(router))


def draw_routing(
    seed: int,
    experts: int,
    *,
    noop: int = 0,
    k: int | None = None,
    slots: int = 4,
    groups: tuple[int, ...] = (3,),
    tokens: int = 14,
) -> mode.Routing:
    """A routing of random logits with padding and predictor logits; one group is all padding."""
    shape = (*groups, tokens, experts + noop)
    logits = jnp.asarray(2 * rng(seed).normal(size=shape), jnp.float32)
    valid = jnp.asarray(draw_valid(seed + 1, groups, tokens))
    predictor = jnp.asarray(rng(seed + 2).normal(size=(*shape[:-1], experts)), jnp.float32)
    select = mode.ExpertChoice() if k is None else mode.TokenChoice(k)
    assignment = select(selector_inputs(logits, valid, experts, slots))
    weight = rng(seed + 3).normal(size=assignment.index.shape)
    return mode.Routing(
        index=assignment.index,
        weight=jnp.asarray(np.where(assignment.index < tokens, weight, 0), jnp.float32),
        logits=logits,
        load=assignment.load,
        valid=valid,
        predictor=predictor,
    )


def route(router: mode.Router, *shape: int, **options: Any) -> mode.Routing:
    """The routing of ones, `[*shape, DIM]`; two groups of 12 tokens by default."""
    shape = shape or (2, 12)
    return router(jnp.ones((*shape, DIM)), mode.TokenInfo.plain(shape), **options)


def plain_router(**options: Any) -> mode.Router:
    """A router of one expert, as a user builds it."""
    defaults = {
        "capacity": 0.25,
        "select": mode.ExpertChoice(),
        "gate": mode.IdentityGate(),
        "key": jax.random.key(0),
    }
    return mode.Router(DIM, **{**defaults, **options})
