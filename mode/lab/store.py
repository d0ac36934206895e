"""What an ablation leaves on disk, so that killing it at any moment costs no finished arm.

An arm's record is moved to its place last: where it stands, all that belongs to the arm does.
"""

import dataclasses
import io
import json
from pathlib import Path

import equinox as eqx
import numpy as np

import mode

from .evaluate import RouterReport
from .files import write_atomically, write_json


@dataclasses.dataclass(frozen=True)
class ArmResult:
    """All that is known of a finished arm.

    **Attributes:**

    - `name`, `description`: of the arm.
    - `parameters`: how many it has.
    - `forward_flops`: of a forward pass, per token, under the training selection.
    - `step_flops`, `steps`: FLOPs of one step's loss and gradient, and how many steps it took.
    - `step_seconds`, `seconds`: median time of a step; training with compilation.
    - `bits_top_k`, `bits_causal`: held-out bits per byte, as trained and as sampled from.
    - `bytes`: held-out bytes predicted.
    - `routers`: what each router of a routed layer did.
    - `losses`: training loss of every step, in bits per byte.
    - `change`: the step from which training ran under the causal rule; `steps` where it never did.
    """

    name: str
    description: str
    parameters: int
    forward_flops: float
    step_flops: int
    steps: int
    step_seconds: float
    seconds: float
    bits_top_k: float
    bits_causal: float
    bytes: int
    routers: tuple[RouterReport, ...]
    losses: tuple[float, ...]
    change: int


def save_arm(
    out: Path, result: ArmResult, model: mode.Transformer, sample: dict[str, np.ndarray]
) -> None:
    """Parameters, routing sample and, last, the record of a finished arm."""
    arms = out / "arms"
    arms.mkdir(exist_ok=True)
    write_atomically(
        arms / f"{result.name}.eqx", lambda beside: eqx.tree_serialise_leaves(str(beside), model)
    )
    packed = io.BytesIO()
    np.savez_compressed(packed, allow_pickle=False, **sample)
    write_atomically(
        arms / f"{result.name}.npz", lambda beside: beside.write_bytes(packed.getvalue())
    )
    write_json(arms / f"{result.name}.json", dataclasses.asdict(result))


def load_result(out: Path, name: str) -> ArmResult | None:
    """The record of an arm; `None` where it is not finished."""
    path = out / "arms" / f"{name}.json"
    if not path.exists():
        return None
    record = json.loads(path.read_text(encoding="utf-8"))
    record["routers"] = tuple(RouterReport(**router) for router in record["routers"])
    record["losses"] = tuple(record["losses"])
    return ArmResult(**record)


def load_sample(out: Path, name: str) -> dict[str, np.ndarray]:
    """The routing sample of a finished arm."""
    with np.load(out / "arms" / f"{name}.npz", allow_pickle=False) as packed:
        return dict(packed)


def load_model(out: Path, name: str, like: mode.Transformer) -> mode.Transformer:
    """The trained parameters and router state of a finished arm, in a model built as it was."""
    return eqx.tree_deserialise_leaves(str(out / "arms" / f"{name}.eqx"), like)
