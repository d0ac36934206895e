"""The arms of the ablation: what each one routes, and by which causal rule its text is sampled.

Arms differ in the routed layer and in nothing else, but for the number of steps, which `budget`
sets so that all spend equal training FLOPs.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

import mode
from mode._types import Scalar
from mode.routing import Routings

from .layers import (
    apart,
    dense_block,
    depths,
    free_experts,
    loop,
    queries,
    recursion,
    staged,
    token_choice_recursion,
    with_experts,
)
from .options import ARM_TEXTS, NAMES as NAMES, Size as Size


Tree = TypeVar("Tree")


@dataclasses.dataclass(frozen=True)
class Arm:
    """One model of the ablation.

    `routed` builds the routed layer of a size from a key; every `every`th layer is such, above a
    dense one. `rule` decides which tokens are selected when the model runs causally, `None` where
    the training selection is causal already; the last fraction `under_rule` of training runs under
    it, at the same capacity. `auxiliary` is added to the loss, from the routings of a step.
    `samples` says whether tokens can be routed one by one, so that text can be sampled. With
    `between`, the routed layer stands for all layers between the first and the last. `left_out`
    leaves out the blocks that other arms route, and `recovers` says whether `ablate` measures
    how much of what these are worth the arm gains.
    """

    name: str
    description: str
    routed: Callable[[Size, PRNGKeyArray], Callable] | None = None
    every: int = 2
    rule: mode.AbstractThreshold | None = None
    under_rule: float = 0.0
    quantile_rate: float = 0.03
    auxiliary: Callable[[Routings], Scalar] | None = None
    samples: bool = True
    between: bool = False
    left_out: bool = False
    recovers: bool = False

    def build(self, size: Size, *, key: PRNGKeyArray) -> mode.Transformer:
        """Builds the model, with fresh parameters.

        **Raises:** `ValueError` as the layers do.
        """

        def dense(key: PRNGKeyArray) -> mode.Residual:
            return mode.Residual(dense_block(size, key))

        left_out = len(range(1, size.depth, self.every)) if self.left_out else 0
        stacks = [([dense], size.depth - left_out)]
        if self.between and self.routed is not None:
            stacks = [([dense], 1), ([partial(self.routed, size)], 1), ([dense], 1)]
        elif self.routed is not None:
            routed, offset = partial(self.routed, size), min(1, self.every - 1)
            stacks = mode.interleave(dense, routed, size.depth, every=self.every, offset=offset)
        dtype = jnp.dtype(size.dtype)
        return mode.Transformer(
            size.vocab, size.dim, stacks=stacks, dtype=dtype, remat=size.remat, key=key
        )

    def shapes(self, size: Size) -> mode.Transformer:
        """The shapes of the model, which take no memory."""
        return eqx.filter_eval_shape(lambda: self.build(size, key=jax.random.key(0)))

    def causal(self, model: Tree, *, max_capacity: float | None = 1.0) -> Tree:
        """The model as text is sampled from it; at 1, it computes all tokens that it selects."""
        rule = self.rule
        if rule is not None:
            rule = dataclasses.replace(rule, max_capacity=max_capacity)
        return mode.make_causal(model, threshold=rule)

    def causal_in_training(self, tree: Tree) -> Tree:
        """A tree with the model in it, under the rule, with as many slots as in training."""
        return self.causal(tree, max_capacity=None)

    def change(self, steps: int) -> int:
        """The step from which training runs under `rule`; `steps` where it never does."""
        return steps - round(self.under_rule * steps)


def balance_loss(routings: Routings) -> Scalar:
    """The load balance of token choice, times 0.1 as arXiv:2507.10524 has it."""
    return 0.1 * jnp.mean(jnp.stack([mode.load_balance_loss(routing) for routing in routings]))


def predictor_loss(routings: Routings) -> Scalar:
    """Averages the losses that train the predictors, whose gradient reaches these alone."""
    return jnp.mean(jnp.stack([mode.predictor_bce(routing) for routing in routings]))


# Top-k, and the last fifth of training under a running quantile.
_late_quantile = partial(Arm, rule=mode.QuantileThreshold(), under_rule=0.2)

ARMS: tuple[Arm, ...] = (
    Arm("dense", ARM_TEXTS["dense"]),
    Arm("left-out", ARM_TEXTS["left-out"], left_out=True),
    _late_quantile("mod", ARM_TEXTS["mod"], depths, recovers=True),
    Arm(
        "mod-predictor",
        ARM_TEXTS["mod-predictor"],
        partial(depths, predictor=True),
        rule=mode.PredictorThreshold(),
        auxiliary=predictor_loss,
    ),
    Arm(
        "mod-random",
        ARM_TEXTS["mod-random"],
        partial(depths, select=mode.RandomChoice()),
        samples=False,
        recovers=True,
    ),
    _late_quantile(
        "moe", ARM_TEXTS["moe"], partial(with_experts, mode.integrated_mode_layer, noop=False)
    ),
    _late_quantile(
        "moe-reduced", ARM_TEXTS["moe-reduced"], partial(with_experts, mode.reduced_capacity_moe)
    ),
    _late_quantile("mode-staged", ARM_TEXTS["mode-staged"], staged),
    _late_quantile(
        "mode-integrated",
        ARM_TEXTS["mode-integrated"],
        partial(with_experts, mode.integrated_mode_layer),
    ),
)


MORE_ARMS: tuple[Arm, ...] = (
    _late_quantile("mod-queries", ARM_TEXTS["mod-queries"], queries, recovers=True),
    Arm(
        "mod-queries-random",
        ARM_TEXTS["mod-queries-random"],
        partial(queries, select=mode.RandomChoice()),
        samples=False,
        recovers=True,
    ),
    _late_quantile(
        "mod-attention", ARM_TEXTS["mod-attention"], partial(apart, parts=("attention",))
    ),
    _late_quantile(
        "mod-feedforward", ARM_TEXTS["mod-feedforward"], partial(apart, parts=("feedforward",))
    ),
    _late_quantile(
        "mod-both", ARM_TEXTS["mod-both"], partial(apart, parts=("attention", "feedforward"))
    ),
    Arm("loop", ARM_TEXTS["loop"], loop, between=True),
    _late_quantile("recursion", ARM_TEXTS["recursion"], recursion, between=True),
    Arm(
        "recursion-random",
        ARM_TEXTS["recursion-random"],
        partial(recursion, select=mode.RandomChoice()),
        samples=False,
        between=True,
    ),
    _late_quantile(
        "recursion-shared",
        ARM_TEXTS["recursion-shared"],
        partial(recursion, share_keys=True),
        between=True,
    ),
    Arm(
        "recursion-depth",
        ARM_TEXTS["recursion-depth"],
        token_choice_recursion,
        auxiliary=balance_loss,
        between=True,
    ),
    Arm("mode-free", ARM_TEXTS["mode-free"], free_experts),
    dataclasses.replace(
        ARMS[NAMES.index("moe")],
        name="moe-threshold",
        description=ARM_TEXTS["moe-threshold"],
        under_rule=0.95,
    ),
)
ALL_ARMS = (*ARMS, *MORE_ARMS)


def arms_named(names: Sequence[str]) -> list[Arm]:
    """Finds arms by their names, in the order of `ALL_ARMS`.

    **Raises:** `ValueError` for no name, an unknown one, or one that is given twice.
    """
    wrong = sorted({name for name in names if name not in NAMES or names.count(name) > 1})
    if wrong or not names:
        raise ValueError(
            f"`arms` must be one or more of {', '.join(NAMES)}, each once, got "
            f"{', '.join(wrong) or 'none'}."
        )
    return [arm for arm in ALL_ARMS if arm.name in names]


def arm_named(name: str) -> Arm:
    """Finds an arm by its name; raises `ValueError` for an unknown one."""
    if name not in NAMES:
        raise ValueError(f"`arm` must be one of {', '.join(NAMES)}, got {name!r}.")
    return ALL_ARMS[NAMES.index(name)]
