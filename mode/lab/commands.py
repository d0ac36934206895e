"""The options of the commands. Nothing heavy is imported here: help texts are to come at once."""

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro
from annotated_types import Ge, Le

from .options import (
    ARM_TEXTS,
    DEFAULT_NAMES,
    NAMES,
    OWN_TASK_ARMS,
    TASK_ARMS,
    TASK_TEXTS,
    Count,
    Data,
    Devices,
    Flops,
    NotNegative,
    Positive,
    Recipe,
    Seed,
    Size,
    UpToOne,
)
from .presets import preset_named, presets_help


_Arm = Annotated[
    str, tyro.conf.arg(help=f"What to train: {', '.join(NAMES)}; see `mode-lab ablate -h`.")
]
# The sweeps of `isoflop`, which `evidence.presets` defines.
SWEEP_TEXTS = {
    "cpu-hour": "about an hour on two cores: 10 to 220 thousand parameters, 2e11 and 6e11 training "
    "FLOPs",
    "h100-half-hour": "half an hour on one H100: 4 to 44 million parameters, 3e15 and 1e16 "
    "training FLOPs",
    "tiny": "some minutes, to see that everything works: its numbers mean nothing",
}


def _texts(first: str, texts: dict[str, str]) -> str:
    """The help of an option with several values, each of which has a text."""
    return f"{first} " + "; ".join(f"{name}: {text}" for name, text in texts.items()) + "."


@dataclasses.dataclass(frozen=True)
class Ablation:
    """Train routing arms on bytes of real text at equal training FLOPs, and compare them.

    A run that was interrupted goes on where it stood: the same command skips finished arms.
    """

    out: Path = Path("runs/ablation")
    """Folder for results. One of another configuration is refused."""
    data: Data = None
    budget: Positive = 1.0
    """Training FLOPs of every arm, as a multiple of the default, which takes these arms of the
    default size 6 to 10 minutes on two cores. Steps grow with it in proportion."""
    arms: Annotated[
        tuple[str, ...],
        tyro.conf.arg(
            help=_texts("Which to train. Recovery needs dense, left-out and one more.", ARM_TEXTS),
            metavar="ARM ...",
        ),
    ] = DEFAULT_NAMES
    seed: Seed = 0
    """Seed of parameters, data order and random routing."""
    held_out: Count = 512
    """Sequences to evaluate on, at most."""
    recall: bool = True
    """Whether to train routers on the task `recall` of `mode-lab tasks` as well, whose answers say
    which tokens a router should select."""
    size: Size = dataclasses.field(default_factory=Size)
    recipe: Recipe = dataclasses.field(default_factory=Recipe)


@dataclasses.dataclass(frozen=True)
class Rereport:
    """Write the report of a finished or interrupted ablation or sweep again, without training."""

    out: Path = Path("runs/ablation")
    """The folder of the run."""


# In these tasks two tokens are of use together alone: routers must have seen both.
TASK_RECIPE = Recipe(learning_rate=3e-3, ramp=0.2)


@dataclasses.dataclass(frozen=True)
class Tasks:
    """Train routers on tasks in which the tokens that matter are known: which get a slot?

    A run that was interrupted goes on where it stood: the same command skips finished runs.
    """

    out: Path = Path("runs/tasks")
    """Folder for results. One of another recipe, density or number of steps is refused."""
    tasks: Annotated[
        tuple[str, ...], tyro.conf.arg(help=_texts("Which tasks.", TASK_TEXTS), metavar="TASK ...")
    ] = ("recall",)
    arms: Annotated[
        tuple[str, ...],
        tyro.conf.arg(help=_texts("What to compare.", TASK_ARMS), metavar="ARM ..."),
    ] = tuple(OWN_TASK_ARMS)
    seeds: Count = 3
    """How many seeds, from 0."""
    steps: Annotated[int | None, Ge(2), Le(10**9)] = None
    """Optimizer steps; by default enough for the dense model of each task."""
    density: UpToOne = 0.0625
    """Fraction of the tokens of s3 and s5 that are permutations."""
    recipe: Recipe = TASK_RECIPE


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
    log_every: Count = 50
    """Steps between two lines of progress, where the output is no terminal."""
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
    top_k: Annotated[int | None, Ge(1), Le(10**9)] = None
    """Sample from so many likeliest bytes."""
    top_p: UpToOne = 1.0
    """Sample from the likeliest bytes that together have this probability."""
    max_capacity: UpToOne = 1.0
    """Largest fraction of the text that a routed layer selects: the size of its cache. Tokens that
    find it full are dropped: they pass around the block, and are counted."""
    seed: Seed = 0
    """Seed of the sampling."""
    plot: Path | None = None
    """PNG of which bytes each routed layer computed, and beside it NAME.routers.json with how many;
    by default `generated.png` in the run's folder."""


@dataclasses.dataclass(frozen=True)
class Analysis:
    """Show what the routers of a trained model do: which tokens are computed, in which layers, and
    how that depends on the kind of byte and on the uncertainty of the prediction.

    Everything is shown under the top-k selection of training, which sees the future, and under the
    causal rule that a sampler uses.
    """

    checkpoint: Path = Path("runs/train")
    """Folder of a `mode-lab train` run. Its newest checkpoint is used."""
    data: str | None = None
    """Files to read, all of them, a quoted glob such as "texts/**/*.txt". By default the run's own
    held-out text."""
    sequences: Count = 512
    """Sequences of the run's length, at most; evenly spread over the text."""
    out: Path | None = None
    """Folder for the pictures, analysis.md and analysis.json; by default `analysis` in the run's
    folder."""
    seed: Seed = 0
    """Seed of random routing and of the bootstrap."""


@dataclasses.dataclass(frozen=True)
class Isoflop:
    """Train arms at several sizes and seeds for equal training FLOPs, and fit loss against size.

    A sweep that was interrupted continues where it stopped: the same command skips finished runs.
    Several processes with the same command share the work.
    """

    out: Path = Path("runs/isoflop")
    """Folder of the records, of one text, recipe and reference."""
    preset: Annotated[str, tyro.conf.arg(help=_texts("Which runs.", SWEEP_TEXTS))] = "cpu-hour"
    arms: tuple[str, ...] = ()
    """Arms of a sweep of your own, instead of a preset; with `--sizes` and `--budgets`."""
    sizes: tuple[str, ...] = ()
    """Its sizes, features and layers, such as 32x4 48x6 64x6."""
    budgets: tuple[Flops, ...] = ()
    """Its training FLOPs."""
    seeds: Count = 3
    """Its number of seeds, from 0."""
    rates: tuple[Positive, ...] = (1e-2, 2e-2, 4e-2)
    """Its learning rates. For each size the best one of the dense arm is used."""
    held_out: Count = 512
    """Its held-out sequences, at most."""
    base: Size = dataclasses.field(default_factory=Size)
    """Its sizes, except for features, layers and heads."""
    data: Data = None
    minutes: Positive | None = None
    """No run starts after so many minutes. The same command continues later."""
    recipe: Recipe = dataclasses.field(default_factory=Recipe)
    """How runs are trained, except for the learning rate, which is searched."""


@dataclasses.dataclass(frozen=True)
class Claims:
    """Test the paper's claims on the runs of `mode-lab isoflop`. Trains nothing."""

    out: Path = Path("runs/isoflop")
    """The folder of the runs."""


@dataclasses.dataclass(frozen=True)
class MeshSize:
    """How devices are arranged. By default the arrangement is searched for."""

    data: Annotated[int | None, Ge(1), Le(10**9)] = None
    """Devices over which batch and parameters are sharded."""
    expert: Annotated[int | None, Ge(1), Le(10**9)] = None
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
    memory: Positive | None = None
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
