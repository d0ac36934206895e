"""The variants of the study: a routed layer, and how it is trained, under a name."""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from forms import OnePlus, Perturbed, Scorer, Softplus, noise, random_slots
from jaxtyping import Array, PRNGKeyArray

import mode
from mode.routing import Routings


@dataclasses.dataclass(frozen=True)
class Variant:
    """A routed layer and how it is trained; `arm` is one of those of the tasks."""

    arm: str = "learned"
    select: mode.AbstractSelector | None = None
    gate: mode.AbstractGate = dataclasses.field(default_factory=mode.AbsoluteGate)
    weigh_values: bool = True
    std: float = 1.0  # times dim ** -0.5
    rate: float = 1.0  # the router's learning rate, times that of the rest
    normed: bool = False
    keys_for_all: bool = False
    recipe: dict[str, float] = dataclasses.field(default_factory=dict)
    square: float = 0.0  # the coefficient of `router_z_loss`, of one choice the squared logit

    def layer(
        self, block: mode.TransformerBlock, dim: int, capacity: mode.Capacity, *, key: PRNGKeyArray
    ) -> Callable:
        """Builds the routed layer."""
        options: dict[str, Any] = {
            "select": mode.ExpertChoice() if self.select is None else self.select,
            "gate": self.gate,
            "router_std": self.std * dim**-0.5 / self.rate,
        }
        if self.keys_for_all:
            layer = mode.MixtureOfQueries(block, dim, capacity, **options, key=key)
        else:
            options["weigh_values"] = self.weigh_values
            layer = mode.MixtureOfDepths(block, dim, capacity, **options, key=key)
        norm = mode.RMSNorm(dim) if self.normed else None
        scorer = Scorer(layer.router.scorer, norm, self.rate)  # pyright: ignore
        return eqx.tree_at(lambda m: m.router.scorer, layer, scorer)

    def squared_cost(self, routings: Routings) -> Array:
        """The cost of large logits."""
        squares = [self.square * mode.router_z_loss(routing) for routing in routings]
        return jnp.mean(jnp.stack(squares)) if squares else jnp.zeros(())


@dataclasses.dataclass(frozen=True)
class Experts(Variant):
    """Attention for all tokens, and eight experts, which choose, at the cost of the dense block."""

    gate: mode.AbstractGate = dataclasses.field(default_factory=mode.SoftmaxGate)

    def layer(
        self, block: mode.TransformerBlock, dim: int, capacity: mode.Capacity, *, key: PRNGKeyArray
    ) -> Callable:
        """Builds the layer. The capacity of the arms of Mixture-of-Depths has no meaning here."""
        del capacity
        experts = mode.MixtureOfExperts(
            lambda key: mode.SwiGLUFeedForward(dim, key=key),
            dim,
            8,
            gate=self.gate,
            router_std=self.std * dim**-0.5,
            key=key,
        )
        return mode.Residual(eqx.tree_at(lambda b: b.feedforward, block, experts))


_EQUATION = {"gate": mode.IdentityGate(), "weigh_values": False}
_NO_COST = {"router_cost": 0.0}
VARIANTS = {
    "default": Variant(),
    "dense": Variant("dense"),
    "left-out": Variant("left-out"),
    "oracle": Variant("oracle"),
    "random": Variant("random"),
    "strided": Variant("strided"),
    "equation 1 as first shipped": Variant(**_EQUATION, std=0.16, recipe=_NO_COST),
    "equation 1": Variant(**_EQUATION),
    "equation 1, squared cost": Variant(**_EQUATION, recipe=_NO_COST, square=0.01),
    "raw gate": Variant(gate=mode.IdentityGate()),
    "values not weighed": Variant(weigh_values=False),
    "no cost": Variant(recipe=_NO_COST),
    "cost 0.01": Variant(recipe={"router_cost": 0.01}),
    "cost 0.1": Variant(recipe={"router_cost": 0.1}),
    "squared cost 0.01": Variant(recipe=_NO_COST, square=0.01),
    "squared cost 0.03": Variant(recipe=_NO_COST, square=0.03),
    "sigmoid": Variant(gate=mode.SigmoidGate()),
    "twice sigmoid": Variant(gate=mode.SigmoidGate(2.0)),
    "twice sigmoid, no cost": Variant(gate=mode.SigmoidGate(2.0), recipe=_NO_COST),
    "softplus": Variant(gate=Softplus()),
    "1 + logit": Variant(gate=OnePlus()),
    "no ramp": Variant(recipe={"ramp": 0.0}),
    "ramp 0.1": Variant(recipe={"ramp": 0.1, "ramp_stages": 1}),
    "ramp 0.3 in 3": Variant(recipe={"ramp": 0.3, "ramp_stages": 3}),
    "noise for the ramp": Variant(select=Perturbed(noise), recipe={"ramp": 0.0}),
    "random slots for the ramp": Variant(select=Perturbed(random_slots), recipe={"ramp": 0.0}),
    "half the std": Variant(std=0.5),
    "twice the std": Variant(std=2.0),
    "router rate x 0.2": Variant(rate=0.2),
    "router rate x 5": Variant(rate=5.0),
    "normed input": Variant(normed=True),
    "no weight decay": Variant(recipe={"weight_decay": 0.0}),
    "random, values not weighed": Variant("random", weigh_values=False),
    "random, no cost": Variant("random", recipe=_NO_COST),
    "keys for all": Variant(weigh_values=False, keys_for_all=True),
    "keys for all, no cost": Variant(weigh_values=False, keys_for_all=True, recipe=_NO_COST),
    "keys for all, random": Variant("random", weigh_values=False, keys_for_all=True),
    "keys for all, random, no cost": Variant(
        "random", weigh_values=False, keys_for_all=True, recipe=_NO_COST
    ),
    "keys for all, normed input": Variant(weigh_values=False, keys_for_all=True, normed=True),
    # Of 64 features: a standard deviation of 0.02, the default of `MixtureOfExperts`.
    "experts": Experts(std=0.16),
    "experts, std dim ** -0.5": Experts(),
    "experts, std 2 dim ** -0.5": Experts(std=2.0),
    "experts, squared cost 0.001": Experts(std=0.16, square=0.001),
    "experts, sigmoid": Experts(std=0.16, gate=mode.SigmoidGate()),
    "experts, random": Experts("random", std=0.16),
}
