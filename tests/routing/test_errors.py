"""Errors of routing: each names the argument, the rule, the value and the fix."""

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from jaxtyping import Array

import mode
from tests.routing.draws import DIM, make_router, plain_router, route


pytestmark = pytest.mark.usefixtures("without_type_checks")
KEY = jax.random.key(0)
TOKENS = 12


def unchecked(value: Any) -> Any:
    """The value, for a parameter of another type."""
    return value


def replayed(recorder: mode.Router, player: mode.Router, *shape: int) -> mode.Routing:
    """What the second router returns under `Replay` of a routing of the first."""
    select = mode.Replay(route(recorder, *shape))
    return route(eqx.tree_at(lambda r: r.select, player, select))


class Wide(mode.AbstractGate):
    """A gate that forgets to cut off the no-ops."""

    def scores(self, logits: Array) -> Array:
        return logits

    def __call__(self, logits: Array, selected: Array) -> Array:
        return logits


class Pairs(mode.AbstractSelector):
    """A selector that returns a pair instead of an `Assignment`."""

    is_causal = False
    max_capacity = None

    def __call__(self, inputs: mode.RoutingInputs, *, key: Array | None = None) -> Any:
        return mode.first_come_first_served(inputs.scores > 0, inputs.slots), None


class Short(mode.AbstractSelector):
    """A selector whose load leaves out the no-ops."""

    is_causal = False
    max_capacity = None

    def __call__(self, inputs: mode.RoutingInputs, *, key: Array | None = None) -> mode.Assignment:
        requested = inputs.scores[..., : inputs.num_experts] > 0
        index = mode.first_come_first_served(requested, inputs.slots)
        return mode.Assignment(index, jnp.sum(requested, axis=-2, dtype=jnp.int32))


def swapped() -> mode.Routing:
    """A router whose selector was replaced after it was built."""
    router = make_router(0, select=mode.TokenChoice(2), gate=mode.SelectedSoftmaxGate())
    return route(eqx.tree_at(lambda r: r.select, router, mode.TokenChoice(1)))


def continued(select: mode.AbstractSelector, **options: Any) -> mode.Routing:
    """Tokens after earlier ones."""
    used = jnp.zeros((2, 3), jnp.int32)
    return route(make_router(0, select=select), used=used, **options)


ERRORS: dict[str, tuple[Callable[[], Any], str]] = {
    "a selector's class": (
        lambda: plain_router(select=mode.ExpertChoice),
        r"`select` must be an instance of `AbstractSelector`, such as `ExpertChoice\(\)`, got the "
        "class `ExpertChoice`",
    ),
    "a selector's name": (
        lambda: plain_router(select="expert choice"),
        "`select` must be an instance of `AbstractSelector`.* got 'expert choice'",
    ),
    "a gate's class": (
        lambda: plain_router(gate=mode.SigmoidGate),
        r"`gate` must be an instance of `AbstractGate`, such as `SigmoidGate\(\)`, got the class "
        "`SigmoidGate`",
    ),
    "a gate that is a function": (
        lambda: plain_router(gate=jax.nn.sigmoid),
        "`gate` must be an instance of `AbstractGate`",
    ),
    "a predictor's class": (
        lambda: plain_router(predictor=mode.Predictor),
        "`predictor` must map hidden states to one logit per expert.*got <class",
    ),
    "a predictor that cannot be called": (
        lambda: plain_router(predictor=3),
        "`predictor` must map hidden states to one logit per expert.*got 3",
    ),
    "more choices than there are": (
        lambda: route(make_router(0, num_noop=1, select=mode.TokenChoice(6))),
        r"`k` of `TokenChoice` must be at most the number of choices .*4, got 6",
    ),
    "random choice without a key": (
        lambda: route(plain_router(select=mode.RandomChoice())),
        "`key` is needed by `RandomChoice`, got None",
    ),
    "strided beyond 32 bits": (
        lambda: route(plain_router(select=mode.Strided(), capacity=1), 2**16),
        r"`Strided` counts in 32-bit integers: .* got 65536 \* 65537",
    ),
    "strided with a phase beyond 32 bits": (  # the largest rank is tokens * slots + tokens - 1
        lambda: route(
            plain_router(select=mode.Strided(), capacity=Fraction(2**15, 2**16 - 1)), 2**16 - 1
        ),
        r"tokens \* \(slots \+ 1\) must be below 2\*\*31, got 65535 \* 32769",
    ),
    "a pair without a gradient": (
        lambda: plain_router(
            num_experts=3, gate=mode.SelectedSoftmaxGate(), select=mode.TokenChoice(1)
        ),
        r"`gate=SelectedSoftmaxGate\(\)` with `select=TokenChoice\(1\)` .* no gradient",
    ),
    "a pair without a gradient after surgery": (
        swapped,
        r"`gate=SelectedSoftmaxGate\(\)` with `select=TokenChoice\(1\)` .* no gradient",
    ),
    "a record of another length": (
        lambda: replayed(plain_router(), plain_router(), 2, 16),
        r"`routing` of `Replay` .*\(2, 1, 12\) and 1 choices, got \(2, 1, 16\)",
    ),
    "a record of other groups": (
        lambda: replayed(plain_router(), plain_router(), 3, TOKENS),
        r"`routing` of `Replay` .*\(2, 1, 12\) and 1 choices, got \(3, 1, 12\)",
    ),
    "a record of other experts": (
        lambda: replayed(make_router(0), plain_router()),
        r"`routing` of `Replay` .*\(2, 1, 12\) and 1 choices, got \(2, 3, 12\) and 3 choices",
    ),
    "a record of other choices": (
        lambda: replayed(make_router(0, num_noop=1), make_router(0)),
        r"`routing` of `Replay` .* 3 choices, got \(2, 3, 12\) and 4 choices",
    ),
    "a threshold without its predictor": (
        lambda: route(plain_router(select=mode.PredictorThreshold())),
        "`PredictorThreshold` needs a router with a predictor, got a router without one.*"
        r"`predictor=Predictor\(dim, key=key\)`.*`QuantileThreshold\(\)`",
    ),
    "a predictor for another number of experts": (
        lambda: route(make_router(0, predictor=mode.Predictor(DIM, key=KEY))),
        r"`predictor` must return one logit per expert, \(2, 12, 3\), got \(2, 12, 1\)",
    ),
    "a gate that weights the no-ops": (
        lambda: route(make_router(0, num_noop=2, gate=Wide())),
        r"`gate`, Wide, must return one weight .* \(2, 12, 3\), without the no-ops, got "
        r"\(2, 12, 5\)",
    ),
    "a selector that returns no assignment": (
        lambda: route(make_router(0, select=Pairs())),
        r"`select`, Pairs, must return an `Assignment\(index, load\)`, got tuple",
    ),
    "a selector without a load of the no-ops": (
        lambda: route(make_router(0, num_noop=2, select=Short())),
        r"`select`, Short, must return .* = \(2, 3, 4\) .* = \(2, 5\), got \(2, 3, 4\) and "
        r"\(2, 3\)\. `first_come_first_served` .* `inputs\.pad_noop_load`",
    ),
    "a predictor's loss without a predictor": (
        lambda: mode.predictor_bce(route(plain_router())),
        "`routing` must come from a router with a predictor, got one without",
    ),
    "a routing that is not in a tuple": (
        lambda: mode.update_router_state(plain_router(), unchecked(route(plain_router()))),
        r"`routings` must be the tuple .* got a single Routing\. Pass `\(routing,\)`",
    ),
    "too few routings": (
        lambda: mode.update_router_state(plain_router(), ()),
        "`routings` must hold one routing per router of `model`, 1, got 0",
    ),
    "routings of another model": (
        lambda: mode.causal_selection(plain_router(), (route(make_router(0)),)),
        r"`routings` must be in the order of the routers .*\(\(\), 1, 1\), got \(\(\), 3, 3\)",
    ),
    "a prediction of other tokens": (
        lambda: mode.selection_accuracy(route(plain_router()), jnp.zeros((2, 8, 1), bool)),
        r"`predicted` must have the axes .*\(2, 12, 1\), got \(2, 8, 1\)",
    ),
    "a max_capacity beside a threshold": (
        lambda: mode.make_causal(plain_router(), threshold=mode.LogitThreshold(), max_capacity=0.5),
        r"`max_capacity` must be left out .*got 0\.5 beside LogitThreshold\(\)\. Write "
        r"`threshold=LogitThreshold\(max_capacity=0\.5\)`",
    ),
    "a threshold's class": (
        lambda: mode.make_causal(plain_router(), threshold=unchecked(mode.LogitThreshold)),
        r"`threshold` must be an instance of `AbstractThreshold`, such as `QuantileThreshold\(\)`, "
        "got the class `LogitThreshold`",
    ),
    "a threshold's class for a selection": (
        lambda: mode.causal_selection(
            plain_router(), (route(plain_router()),), threshold=unchecked(mode.LogitThreshold)
        ),
        "`threshold` must be an instance of `AbstractThreshold`",
    ),
    "top-k after earlier tokens": (
        lambda: continued(mode.ExpertChoice(), slots=4),
        "`select` must decide token by token .* got `ExpertChoice`, which assigns whole "
        r"sequences\. Use `mode\.make_causal\(model\)`",
    ),
    "strided after earlier tokens": (
        lambda: continued(mode.Strided(), slots=4),
        "`select` must decide token by token .* got `Strided`",
    ),
    "used slots of an unknown number": (
        lambda: continued(mode.TokenChoice(1)),
        r"`slots` must be given with `used`: .*`router\.slots\(max_tokens\)`, got None",
    ),
    "positions that are not integers": (
        lambda: mode.TokenInfo(jnp.zeros((2, 8)), jnp.ones((2, 8), int)),
        "`positions` must be of an integer dtype, got float32",
    ),
    "segments that are not integers": (
        lambda: mode.TokenInfo(jnp.zeros((2, 8), int), jnp.ones((2, 8), bool)),
        "`segment_ids` must be of an integer dtype, got bool",
    ),
    "weights of another shape": (
        lambda: mode.TokenInfo.plain((2, 3)).with_weight(jnp.ones((3, 2))),
        r"`weight` must be floating-point numbers .*\(2, 3\), got float32 of shape \(3, 2\)",
    ),
    "weights that are integers": (
        lambda: mode.TokenInfo.plain((2, 3)).with_weight(jnp.ones((2, 3), int)),
        "`weight` must be floating-point numbers .* got int32",
    ),
    "a schedule of a fraction of a step": (
        lambda: mode.capacity_schedule(plain_router(), unchecked(1.5)),
        "`steps` must be an integer of at least 1, got 1.5",
    ),
    "capacities that are no numbers": (
        lambda: mode.with_capacity([plain_router()], unchecked("a")),
        "`capacity` must be a finite number above 0, got 'a'",
    ),
    "positions and segments of two shapes": (
        lambda: mode.TokenInfo(jnp.zeros((2, 8), int), jnp.ones((8,), int)),
        r"`positions` and `segment_ids` must have the same shape, got \(2, 8\) and \(8,\)",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_what_cannot_work_raises(name: str) -> None:
    """A `ValueError` when the router is built or the program is traced; nothing need run."""
    call, words = ERRORS[name]
    with pytest.raises(ValueError, match=words):
        eqx.filter_eval_shape(call)


class Flat(mode.AbstractTokenSelector):
    """A rule that forgets the axis of choices, or gives numbers for booleans."""

    mask: Callable[[Array], Array] = eqx.field(static=True)
    max_capacity = None

    def requested_mask(self, inputs: mode.RoutingInputs) -> Array:
        return self.mask(inputs.scores)


@pytest.mark.parametrize(
    ("mask", "got"),
    [
        (lambda scores: scores[..., 0] > 0, r"bool of \(3, 12\)"),
        (lambda scores: jnp.ones((TOKENS, 1), bool), r"bool of \(12, 1\)"),
        (lambda scores: scores, r"float32 of \(3, 12, 1\)"),
    ],
)
def test_a_rule_that_returns_no_mask_is_named(mask: Any, got: str) -> None:
    layer = mode.MixtureOfDepths(mode.PositionWise(jnp.tanh), DIM, select=Flat(mask), key=KEY)
    rule = rf"`requested_mask` of Flat must return booleans of \(3, 12, 1\), .*, got {got}"
    with pytest.raises(ValueError, match=rule):
        layer(jnp.ones((3, TOKENS, DIM)))
