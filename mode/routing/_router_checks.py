"""Checks of what a router is built from, and of what its selector returns."""

from .._checks import is_finite
from ._gates import AbstractGate, SelectedSoftmaxGate
from ._selector import AbstractSelector, AbstractTokenSelector, Assignment, RoutingInputs
from ._token_selectors import TokenChoice


def check_target(
    target: float | None, num_experts: int, num_noop: int, select: AbstractSelector
) -> None:
    """Refuses a number of experts per token that the choices do not allow."""
    if target is None:
        return
    if not isinstance(select, TokenChoice):
        raise ValueError(
            "`experts_per_token` needs a selector under which tokens choose, `TokenChoice(k)`, got "
            f"{select}. Under expert choice, `capacity_factor` is that number."
        )
    least, most = max(0, select.k - num_noop), min(select.k, num_experts)
    if not (is_finite(target) and least <= target <= most and num_noop):
        raise ValueError(
            f"`experts_per_token` must be between {least} and {most}, as a token makes {select.k} "
            f"choices among {num_experts} experts and {num_noop} no-op experts, of which there "
            f"must be one, got {target!r}."
        )


def check_gradient(select: AbstractSelector, gate: AbstractGate) -> None:
    """Refuses a selector and a gate that together give the router no gradient."""
    if isinstance(gate, SelectedSoftmaxGate) and isinstance(select, TokenChoice) and select.k == 1:
        raise ValueError(
            "`gate=SelectedSoftmaxGate()` with `select=TokenChoice(1)` gives every weight the "
            "value 1 and the router no gradient. Use `gate=SoftmaxGate()`, or `TokenChoice(k)` "
            "with k of at least 2."
        )


def check_follows(select: AbstractSelector, slots: int | None) -> None:
    """Refuses what cannot route tokens that follow earlier ones."""
    if not isinstance(select, AbstractTokenSelector):
        raise ValueError(
            "`select` must decide token by token where tokens follow earlier ones, got "
            f"`{type(select).__name__}`, which assigns whole sequences. Use "
            "`mode.make_causal(model)`, or put a `QuantileThreshold` there by `mode.map_routers`."
        )
    if slots is None:
        raise ValueError(
            "`slots` must be given with `used`: the slots of each expert in the whole sequence, "
            "such as `router.slots(max_tokens)`, got None."
        )


def check_assignment(select: AbstractSelector, assignment: object, inputs: RoutingInputs) -> None:
    """Checks what a selector returned."""
    name, groups = type(select).__name__, inputs.valid.shape[:-1]
    if not isinstance(assignment, Assignment):
        raise ValueError(
            f"`select`, {name}, must return an `Assignment(index, load)`, got "
            f"{type(assignment).__name__}."
        )
    rows, load = (*groups, inputs.num_experts), (*groups, inputs.scores.shape[-1])
    if (assignment.index.shape[:-1], assignment.load.shape) != (rows, load):
        raise ValueError(
            f"`select`, {name}, must return an index of shape [*groups, experts, slots] = "
            f"{(*rows, inputs.slots)} and a load of shape [*groups, choices] = {load}, got "
            f"{assignment.index.shape} and {assignment.load.shape}. "
            "`first_come_first_served` makes such an index, `inputs.pad_noop_load` such a load."
        )
