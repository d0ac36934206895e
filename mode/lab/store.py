"""What a run leaves on disk, so that killing it at any moment costs no finished arm.

Every file is written beside its place and then moved there, which the system does at once or not at
all. An arm's record is moved last: where it stands, all that belongs to the arm does.
"""

import dataclasses
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import numpy as np

import mode

from .evaluate import RouterReport


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


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """`write` to a file beside `path`, then move it there. A partial file never has the name."""
    beside = path.with_name(f".{path.name}.part")
    write(beside)
    with open(beside, "rb") as file:
        os.fsync(file.fileno())
    os.replace(beside, path)


def write_text(path: Path, text: str) -> None:
    """A text file, whole or not at all."""
    write_atomically(path, lambda beside: beside.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    """A JSON file, whole or not at all."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def claim(out: Path, settings: dict[str, Any]) -> None:
    """Make `out` the folder of a run with these settings, or find that it already is.

    **Raises:** `ValueError` where it belongs to a run with others, or is no folder.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"`out` must be a folder or not exist yet, got the file {out}.")
    (out / "arms").mkdir(parents=True, exist_ok=True)
    path = out / "config.json"
    if not path.exists():
        write_json(path, settings)
        return
    there, asked = _flat(read_settings(out)), _flat(settings)
    differences = [
        f"  {name}: {there.get(name, 'absent')} there, {asked.get(name, 'absent')} asked for"
        for name in sorted(there.keys() | asked.keys())
        if there.get(name, "absent") != asked.get(name, "absent")
    ]
    if differences:
        raise ValueError(
            f"`out` must be new or hold a run of the same configuration, got {out}, where\n"
            + "\n".join(differences)
            + "\nArms of two configurations do not compare. Choose another `--out`, or delete it."
        )


def read_settings(out: Path) -> dict[str, Any]:
    """The settings of the run in `out`.

    **Raises:** `ValueError` where there is no run.
    """
    try:
        return json.loads((out / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(
            f"`out` must be the folder of a run, got {out}, which has no config.json. "
            "`mode-lab ablate` makes one."
        ) from None
    except json.JSONDecodeError as error:
        raise ValueError(
            f"`out` must be the folder of a run, got {out}, whose config.json is not JSON "
            f"({error}). Choose another `--out`, or delete it."
        ) from None


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def save_arm(
    out: Path, result: ArmResult, model: mode.Transformer, sample: dict[str, np.ndarray]
) -> None:
    """Parameters, routing sample and, last, the record of a finished arm."""
    arms = out / "arms"
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
