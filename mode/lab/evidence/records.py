"""One record per run, in a folder that can be added to at any time and from any machine.

A record's file is named after its configuration, so that a run is never repeated and two folders
are joined by copying. It is moved to its place when the run is over: where it stands, it is whole.
"""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from ..arms import Size
from ..files import write_json
from ..step import Recipe


# Of what a record holds and what an arm's name means: another one cannot be compared.
FORMAT = 1
# Seeds from here on are for the search of learning rates, apart from all that is compared.
SEARCH_SEED = 1000


@dataclasses.dataclass(frozen=True)
class Run:
    """What decides how a run goes; equal runs give equal results on one machine.

    **Attributes:**

    - `arm`: its name, one of `VARIANTS`.
    - `size`, `recipe`: of the model and its training.
    - `budget`: training FLOPs.
    - `seed`: of parameters, data order and random routing.
    - `held_out`: sequences it is evaluated on.
    - `corpus`: the fingerprint of the text.
    """

    arm: str
    size: Size
    recipe: Recipe
    budget: float
    seed: int
    held_out: int
    corpus: str

    @property
    def name(self) -> str:
        """For the file: readable, and different for every difference."""
        size = size_name(self.size)
        return f"{self.arm}_{size}_{self.budget:.3g}_{self.seed}_{self.digest}"

    @property
    def digest(self) -> str:
        """Of everything in it."""
        text = json.dumps(dataclasses.asdict(self), sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


def size_name(size: Size) -> str:
    """Features and layers, as `32x4`."""
    return f"{size.dim}x{size.depth}"


@dataclasses.dataclass(frozen=True)
class Mark:
    """How a run stood on the way: on fewer held-out sequences than at its end.

    **Attributes:**

    - `step`: steps taken.
    - `bits_top_k`, `bits_causal`: held-out bits per byte, under the training selection, and causal.
    - `precision`, `recall`: of the outermost router's causal rule; `None` where there is none.
    - `compute`: slots filled per token by the outermost router, causally; `None` for a dense arm.
    """

    step: int
    bits_top_k: float
    bits_causal: float
    precision: float | None
    recall: float | None
    compute: float | None


@dataclasses.dataclass(frozen=True)
class Record:
    """All that is known of a finished run.

    **Attributes:**

    - `run`: its configuration.
    - `parameters`: how many it trained.
    - `forward_flops`: of a forward pass, per token, under the training selection.
    - `step_flops`, `steps`: FLOPs of one step's loss and gradient, and how many it took.
    - `end`: as the last of the marks, on all held-out sequences.
    - `compute_top_k`: slots filled per token by the outermost router under the training selection.
    - `marks`: on the way.
    - `curve`: training loss in bits per byte, means of equal parts of the run.
    - `seconds`: of the run, by what they went into: `training`, `waiting` (for data, a part of it),
        `evaluating`.
    - `step_seconds`: median time of a step.
    - `versions`, `machine`: what it was made with.
    """

    run: Run
    parameters: int
    forward_flops: float
    step_flops: int
    steps: int
    end: Mark
    compute_top_k: float | None
    marks: tuple[Mark, ...]
    curve: tuple[float, ...]
    seconds: dict[str, float]
    step_seconds: float
    versions: dict[str, str]
    machine: str


class Store:
    """The records in a folder.

    **Arguments:**

    - `folder`: made where it does not exist.
    """

    def __init__(self, folder: Path):
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"`out` must be a folder or not exist yet, got the file {folder}.")
        self.folder = folder

    def path(self, run: Run) -> Path:
        """Where the record of a run is, or will be."""
        return self.folder / "records" / f"{run.name}.json"

    def has(self, run: Run) -> bool:
        """Whether the run is over, well or badly."""
        return self.path(run).exists() or self._failure(run).exists()

    def get(self, run: Run) -> Record | None:
        """Its record, where it ended well."""
        return read_record(self.path(run)) if self.path(run).exists() else None

    def fail(self, run: Run, why: str) -> None:
        """Keep that a run gave no result, so that it is not begun again."""
        path = self._failure(run)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"format": FORMAT, "run": dataclasses.asdict(run), "why": why})

    def failures(self) -> dict[str, str]:
        """Why runs gave no result, by their names."""
        paths = sorted((self.folder / "failures").glob("*.json"))
        return {path.stem: json.loads(path.read_text(encoding="utf-8"))["why"] for path in paths}

    def _failure(self, run: Run) -> Path:
        return self.folder / "failures" / f"{run.name}.json"

    def add(self, record: Record) -> None:
        """Keep a record, whole or not at all."""
        path = self.path(record.run)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"format": FORMAT, **dataclasses.asdict(record)})

    def all(self) -> list[Record]:
        """Every record, by name.

        **Raises:** `ValueError` for a record of another format, one that is not as it was written,
        and two of one run.
        """
        found: dict[Run, Path] = {}
        paths = sorted((self.folder / "records").glob("*.json"))
        records = {path: read_record(path) for path in paths}
        for path, record in records.items():
            if record.run in found:
                raise ValueError(
                    f"`out` must hold one record of a run, got two, {found[record.run]} and "
                    f"{path}. Delete one."
                )
            found[record.run] = path
        for path, record in records.items():
            if path.stem != record.run.name:
                raise ValueError(
                    f"the record {path} must be named after its run, {record.run.name}: it was "
                    "changed or renamed. Delete it, or give it its name back."
                )
        return list(records.values())


def read_record(path: Path) -> Record:
    """One record.

    **Raises:** `ValueError` where it is not one of this version.
    """
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        version = content.pop("format")
        if version != FORMAT:
            raise ValueError(
                f"the record {path} must be of format {FORMAT}, got {version}, which another "
                "version of this library wrote. Use that version, or another `--out`."
            )
        run = content.pop("run")
        run |= {"size": Size(**run["size"]), "recipe": Recipe(**run["recipe"])}
        content |= {
            "run": Run(**run),
            "end": Mark(**content["end"]),
            "marks": tuple(Mark(**mark) for mark in content["marks"]),
            "curve": tuple(content["curve"]),
        }
        return Record(**content)
    except (KeyError, TypeError, json.JSONDecodeError, AttributeError) as error:
        raise ValueError(
            f"the record {path} is not whole or not of this version ({error!r}). Delete it, and "
            "the same command makes it anew."
        ) from error
