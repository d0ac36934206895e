"""The arms of a task: one routed layer, or what stands in its place, above a dense one."""

import dataclasses
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, PRNGKeyArray

import mode
from mode._types import Scalar
from mode.routing import Routings, masked_mean

from ..arms import Arm, arm_named
from ..options import OWN_TASK_ARMS, RECURSIONS, Recipe, Size
from .fit import fit
from .records import Score
from .sequences import Sequence, Task, with_oracle


# Builds the routed layer from a block, the number of features, the capacity and a key.
MakeRouted = Callable[..., Callable]

# Selectors of the controls.
CONTROLS = {"random": mode.RandomChoice(), "strided": mode.Strided()}
# Sequences: tested, for the thresholds, and recorded one by one.
_TESTED, _CALIBRATED, _SHOWN = 512, 256, 8


@dataclasses.dataclass(frozen=True)
class TaskSize:
    """The model and the batches of a task."""

    dim: int = 48
    heads: int = 4
    batch: int = 32


def mixture_of_depths(
    block: Callable, dim: int, capacity: mode.Capacity, *, key: PRNGKeyArray
) -> mode.MixtureOfDepths:
    """The routed layer as the library makes it. A router of your own takes its place."""
    return mode.MixtureOfDepths(block, dim, capacity, key=key)


def _lab_arm(name: str) -> Arm | None:
    """The arm of the ablation, where the name is none of a task's own."""
    return None if name in OWN_TASK_ARMS else arm_named(name)


def _routed(
    name: str,
    block_size: TaskSize,
    make_routed: MakeRouted,
    capacity: mode.Capacity,
    key: PRNGKeyArray,
) -> Callable:
    """The routed layer of an arm."""
    arm = _lab_arm(name)
    if arm is not None and arm.routed is not None:
        # Of four layers, a loop or a recursion stands for the two in the middle.
        size = Size(dim=block_size.dim, heads=block_size.heads, depth=4, capacity=float(capacity))
        # The second round of a recursion has the slots of the task.
        rounds = {"capacities": (min(1, 2 * capacity), capacity)}
        return arm.routed(size, key, **(rounds if name in RECURSIONS else {}))
    block_key, router_key = jax.random.split(key)
    block = mode.TransformerBlock(block_size.dim, block_size.heads, key=block_key)
    layer = make_routed(block, block_size.dim, capacity, key=router_key)
    if name not in CONTROLS:
        return layer
    return mode.map_routers(lambda r: eqx.tree_at(lambda r: r.select, r, CONTROLS[name]), layer)


def build(
    arm: str,
    size: TaskSize,
    make_routed: MakeRouted,
    *,
    vocab: int,
    capacity: mode.Capacity,
    repeats: int = 1,
    key: PRNGKeyArray,
) -> mode.Transformer:
    """Builds the model of an arm: a dense layer, and above it what the arm puts there."""

    def dense(key: PRNGKeyArray) -> mode.Residual:
        return mode.Residual(mode.TransformerBlock(size.dim, size.heads, key=key))

    def routed(key: PRNGKeyArray) -> Callable:
        return _routed(arm, size, make_routed, capacity, key)

    upper = {"dense": [dense], "left-out": []}.get(arm, [routed])
    return mode.Transformer(vocab, size.dim, [dense, *upper], repeats, key=key)


def train_and_score(
    task: Task,
    arm: str,
    recipe: Recipe,
    *,
    steps: int,
    seed: int,
    size: TaskSize = TaskSize(),
    make_routed: MakeRouted = mixture_of_depths,
    auxiliary: Callable[[Routings], Scalar] | None = None,
) -> tuple[Score, Score | None]:
    """Trains the model of an arm on a task.

    `make_routed` builds the routed layer, of a router of your own as well, and `auxiliary` is added
    to the loss beside the recipe's cost. An arm of the ablation has its own.

    **Returns:** its scores as it was trained and, where that looks at the future, causally.
    """
    lab_arm = _lab_arm(arm)
    rule = None if lab_arm is None else lab_arm.rule
    if auxiliary is None and lab_arm is not None:
        auxiliary = lab_arm.auxiliary
    keys = jax.random.split(jax.random.key(seed), 4)
    sizes = {"vocab": task.vocab, "capacity": task.capacity}
    model = eqx.filter_jit(build)(arm, size, make_routed, **sizes, key=keys[0])

    def run(
        model: mode.Transformer, batch: Sequence, key: PRNGKeyArray
    ) -> tuple[Float[Array, "batch tokens vocab"], Routings]:
        model = with_oracle(model, task, batch) if arm == "oracle" else model
        return model(batch.tokens, key=key)

    def objective(
        model: mode.Transformer, data: PRNGKeyArray, key: PRNGKeyArray
    ) -> tuple[Scalar, Routings]:
        batch = task.batch(data, size.batch)
        logits, routings = run(model, batch, key)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.targets)
        loss = masked_mean(losses, batch.scored)
        return loss if auxiliary is None else loss + auxiliary(routings), routings

    model = fit(model, objective, jax.random.split(keys[1], steps), recipe, key=keys[2])
    test_key, calibration_key = jax.random.split(keys[3])
    # Jitted, as some hundred small programs take longer to compile than one.
    draw = jax.jit(task.batch, static_argnums=1)
    batch = draw(test_key, _TESTED)
    measure = eqx.filter_jit(lambda model, *given: _measure(*run(model, *given), given[0]))
    top_k, causal = _score(task, batch, *measure(model, batch, keys[2])), None
    if arm != "oracle" and any(not router.select.is_causal for router in mode.routers(model)):
        text = draw(calibration_key, _CALIBRATED).tokens
        model = mode.calibrate_thresholds(model, text)
        causal_model = mode.make_causal(model, threshold=rule)
        causal = _score(task, batch, *measure(causal_model, batch, keys[2]))
    return top_k, causal


def _measure(
    logits: Float[Array, "batch tokens vocab"], routings: Routings, batch: Sequence
) -> tuple[Scalar, list[Bool[Array, "batch tokens"]]]:
    right = (jnp.argmax(logits, axis=-1) == batch.targets).astype(logits.dtype)
    # Of the outermost router; of layers that repeat, the last.
    selected = [jnp.any(routing.selected, axis=-1)[-1] for routing in routings[:1]]
    return masked_mean(right, batch.scored), selected


def _score(
    task: Task, batch: Sequence, accuracy: Scalar, selected: list[Bool[Array, "batch tokens"]]
) -> Score:
    classes, hits, shown = np.asarray(batch.classes), {}, ()
    if selected:
        mask = np.asarray(selected[0])
        hits = {name: float(mask[classes == i].mean()) for i, name in enumerate(task.classes)}
        shown = tuple(map(tuple, mask[:_SHOWN].tolist()))
    sequences = tuple(map(tuple, classes[:_SHOWN].tolist()))
    return Score(accuracy=float(accuracy), hits=hits, classes=sequences, selected=shown)
