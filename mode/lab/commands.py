"""The options of the commands. Nothing heavy is imported here: help texts are to come at once."""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro
from annotated_types import Ge, Gt, Lt

from .arms import NAMES, arms_help
from .options import Count, Data, Devices, NotNegative, Positive, Recipe, Seed, Size, UpToOne
from .presets import preset_named, presets_help


_Arm = Annotated[
    str, tyro.conf.arg(help=f"What to train: {', '.join(NAMES)}; see `mode-lab ablate -h`.")
]


@dataclasses.dataclass(frozen=True)
class Ablation:
    """Train routing arms on bytes of real text at equal training FLOPs, and compare them.

    A run that was interrupted goes on where it stood: the same command skips finished arms.
    """

    out: Path = Path("runs/ablation")
    """Folder for results. One of another configuration is refused."""
    data: Data = None
    budget: Positive = 1.0
    """Training FLOPs of every arm, as a multiple of the default, which takes all eight arms of the
    default size 6 to 10 minutes on two cores. Time grows with it in proportion."""
    arms: Annotated[tuple[str, ...], tyro.conf.arg(help=arms_help(), metavar="ARM ...")] = NAMES
    seed: Seed = 0
    """Seed of parameters, data order and random routing."""
    held_out: Count = 512
    """Sequences to evaluate on, at most."""
    size: Size = dataclasses.field(default_factory=Size)
    recipe: Recipe = dataclasses.field(default_factory=Recipe)


@dataclasses.dataclass(frozen=True)
class Rereport:
    """Write the report of a finished or interrupted ablation or sweep again, without training."""

    out: Path = Path("runs/ablation")
    """The folder of the run."""


@dataclasses.dataclass(frozen=True)
class Training:
    """Train one arm on bytes of real text, with checkpoints to generate from.

    A run that was interrupted at any moment goes on where it stood: the same command, and the same
    losses as without the interruption.
    """

    out: Path = Path("runs/train")
    """Folder of the run. One of another configuration is refused."""
    arm: _Arm = "mod"
    steps: Annotated[Count, Ge(2)] = 1000
    """Optimizer steps; the learning rate ends with the last."""
    data: Data = None
    seed: Seed = 0
    """Seed of parameters, data order and random routing."""
    held_out: Count = 512
    """Sequences to evaluate on at the end, at most."""
    save_every: Count = 100
    """Steps between two checkpoints; there is one of the last step as well."""
    keep: Count = 3
    """How many checkpoints to keep, the newest."""
    devices: Devices = dataclasses.field(default_factory=Devices)
    size: Size = dataclasses.field(default_factory=Size)
    recipe: Recipe = dataclasses.field(default_factory=Recipe)


@dataclasses.dataclass(frozen=True)
class Generating:
    """Continue a text with a trained model, byte by byte, and print what was computed for it."""

    checkpoint: Path = Path("runs/train")
    """Folder of a `mode-lab train` run; its newest checkpoint is used."""
    prompt: str = ""
    """Text to continue; write --prompt=-x for one that begins with a dash. By default a new
    document begins."""
    steps: Count = 256
    """Bytes to generate, at most: the end of the document ends the text."""
    temperature: NotNegative = 0.8
    """0 takes the likeliest byte, 1 samples from the model's own distribution."""
    top_k: Annotated[int | None, Ge(1)] = None
    """Sample from so many likeliest bytes."""
    top_p: UpToOne = 1.0
    """Sample from the likeliest bytes that together have this probability."""
    max_capacity: UpToOne = 1.0
    """Largest fraction of the text that a routed layer selects: the size of its cache. Tokens that
    find it full are dropped: they pass around the block, and are counted."""
    seed: Seed = 0
    """Seed of the sampling."""
    plot: Path | None = None
    """PNG of which bytes each routed layer computed; by default `generated.png` in the run's
    folder."""


@dataclasses.dataclass(frozen=True)
class MeshSize:
    """How devices are arranged. By default the arrangement is searched for."""

    data: Annotated[int | None, Ge(1)] = None
    """Devices over which batch and parameters are sharded."""
    expert: Annotated[int | None, Ge(1)] = None
    """Devices over which experts are sharded, each `data` times; so is the batch. A divisor of the
    number of experts."""


@dataclasses.dataclass(frozen=True)
class Planning:
    """Print what a training step will need on each device, by the compiler of absent devices.

    The step is that of `mode-lab train`. Where it does not fit, meshes are searched for the first
    on which it does: those of the target from the most devices along `expert` to the fewest, as
    that gathers the fewest weights, and then those of ever larger topologies.
    """

    preset: Annotated[str | None, tyro.conf.arg(help=presets_help())] = None
    target: str = "tpu:v5e:2x2"
    """Device and topology: tpu:v5e:16x16, tpu:v5p:4x4x4, tpu:v6e:2x4, cuda:h100, ..."""
    mesh: MeshSize = dataclasses.field(default_factory=MeshSize)
    memory: Annotated[float | None, Gt(0), Lt(math.inf)] = None
    """GiB that a program may use on a device. By default what the compiler says of a TPU; of a GPU
    the part that JAX takes, XLA_PYTHON_CLIENT_MEM_FRACTION or 0.75 of all."""
    minutes: Positive = 9.0
    """No compilation begins that would, taking as long as the longest before it, end later; one
    that has begun is not cut off."""
    out: Path = Path("runs/plan")
    """Folder for plan.json and plan.md."""
    arm: _Arm = "mod"
    size: Size = dataclasses.field(default_factory=Size)

    @staticmethod
    def defaults(args: Sequence[str]) -> "Planning":
        """The defaults of a command line: those of the preset that it names.

        **Raises:** `ValueError` for an unknown preset.
        """
        name = None
        for arg, following in itertools.pairwise((*args, None)):
            if arg == "--preset":
                name = following
            elif arg is not None and arg.startswith("--preset="):
                name = arg.partition("=")[2]
        if name is None:
            return Planning()
        preset = preset_named(name)
        return Planning(preset=name, arm=preset.arm, size=preset.size)
