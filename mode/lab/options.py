"""Options that several commands share, their ranges, and the check of all options at once."""

import dataclasses
import math
import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import pydantic
import tyro
from annotated_types import Ge, Gt, Le, Lt


# The bytes, and the start of a document.
VOCAB = 257

# The arms of the ablation, which `arms` builds.
ARM_TEXTS = {
    "dense": "every token through every block",
    "left-out": "the control: the dense model without the blocks that other arms route",
    "mod": "Mixture-of-Depths: top-k, the last fifth of training under a running quantile",
    "mod-predictor": "Mixture-of-Depths as published: top-k to the end, a predictor for sampling",
    "mod-random": "the control: Mixture-of-Depths that selects tokens at random",
    "moe": "expert-choice Mixture-of-Experts at the dense model's FLOPs",
    "moe-reduced": "the control: Mixture-of-Experts with the slots of mode-integrated and no no-op "
    "experts",
    "mode-staged": "staged MoDE: first into or around the block, then to an expert inside it",
    "mode-integrated": "integrated MoDE: experts and no-op experts in one routing",
}
# Those that `ablate` trains if none is named; the others are a name away.
DEFAULT_NAMES = tuple(ARM_TEXTS)
ARM_TEXTS |= {
    "mod-queries": "Mixture-of-Depths in which skipped tokens are still keys",
    "mod-queries-random": "the control of mod-queries: tokens at random",
    "mod-attention": "Mixture-of-Depths of the attention alone",
    "mod-feedforward": "Mixture-of-Depths of the feed-forward alone",
    "mod-both": "attention and feed-forward, each by a router of its own",
    "loop": "one block in a loop of all layers but the first and the last",
    "recursion": "the same in rounds of fewer and fewer tokens",
    "recursion-random": "the control of recursion: tokens at random",
    "recursion-shared": "recursion in which later rounds read the keys of the first",
    "recursion-depth": "recursion in which a token chooses its depth at the start",
    "mode-free": "token choice of two among experts, no-ops, a copy and a constant, of which three "
    "quarters of an expert are real",
    "moe-threshold": "Mixture-of-Experts by Expert Threshold: running quantiles in training, too",
}
NAMES = tuple(ARM_TEXTS)

# The tasks with known answers, which `tasks.sequences` makes.
TASK_TEXTS = {
    "recall": "values of keys, by questions after filler",
    "s3": "products of permutations of three points among filler",
    "s5": "the same of five points",
    "copy": "a span that comes again later",
    "arithmetic": "sums of variables, by questions after filler",
}
# Arms of a task alone, which are those that `tasks` trains if none is named.
OWN_TASK_ARMS = {
    "dense": "a second layer for every token",
    "left-out": "no second layer",
    "oracle": "a routed one that selects by the class of a token",
    "learned": "Mixture-of-Depths",
    "random": "its control: tokens at random",
    "strided": "evenly spaced tokens",
}
# Any other arm of the ablation may be the second layer.
TASK_ARMS = OWN_TASK_ARMS | {
    name: text
    for name, text in ARM_TEXTS.items()
    if name not in ("dense", "left-out", "mod", "mod-random")
}
RECURSIONS = ("recursion", "recursion-random", "recursion-shared")

# Ranges: `check_options` refuses numbers outside of them, and so does every record that is read.
Count = Annotated[int, Ge(1), Le(10**9)]
Seed = Annotated[int, Ge(0), Lt(2**32)]
Positive = Annotated[float, Gt(0), Le(1e9)]
NotNegative = Annotated[float, Ge(0), Le(1e9)]
Flops = Annotated[float, Gt(0), Le(1e27)]
UpToOne = Annotated[float, Gt(0), Le(1)]

_DATA = 'Text to train on, a quoted glob: "texts/**/*.txt". By default the Python standard library.'
Data = Annotated[str | None, tyro.conf.arg(help=_DATA)]

Options = TypeVar("Options")


@dataclasses.dataclass(frozen=True)
class Size:
    """Dimensions that all arms share."""

    dim: Annotated[int, Ge(2), Le(2**16)] = 64
    """Features of the hidden states."""
    depth: Annotated[int, Ge(1), Le(4096)] = 6
    """Layers; every other one is routed."""
    heads: Annotated[int, Ge(1), Le(2**16)] = 4
    """Attention heads."""
    length: Annotated[int, Ge(1), Le(2**24)] = 128
    """Tokens in one sequence, the group whose tokens compete for slots."""
    batch: Annotated[int, Ge(1), Le(2**24)] = 8
    """Sequences in one step."""
    capacity: UpToOne = 0.125
    """Fraction of a sequence's tokens that a Mixture-of-Depths layer takes."""
    experts: Annotated[int, Ge(1), Le(2**16)] = 6
    """Experts of the arms with no-op experts and of their control; other arms of experts have
    `experts + noop`."""
    noop: Annotated[int, Ge(0), Le(2**16)] = 2
    """No-op experts of integrated MoDE."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the activations. Parameters, routers and the optimizer are float32 either way."""
    vocab: Annotated[int, Ge(VOCAB), Le(2**24)] = VOCAB
    """Token ids. 257 are used: the bytes and the start of a document."""
    kv_heads: Annotated[int | None, Ge(1), Le(2**16)] = None
    """Key-value heads, which several attention heads share; by default `heads`."""
    remat: bool = False
    """Whether the backward pass computes activations again, two layers at a time, instead of
    keeping them."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How every arm is trained."""

    learning_rate: Positive = 1e-2
    """Peak of the cosine schedule, tuned on the dense arm alone."""
    weight_decay: NotNegative = 0.01
    """Weight decay of AdamW on parameters. Router state has none."""
    clip: Positive = 1.0
    """Largest global norm of a gradient."""
    warmup: Annotated[float, Ge(0), Lt(1)] = 0.05
    """Fraction of the steps over which the rate rises from 0."""
    router_cost: NotNegative = 0.03
    """Times the mean absolute logit of Mixture-of-Depths routers, added to the loss. Tokens of no
    use lose their weight by it, and others come within reach of top-k."""
    ramp: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Fraction of the steps in which Mixture-of-Depths layers have more slots than their capacity;
    0 for none, which is best on text."""
    ramp_stages: Annotated[int, Ge(1), Le(16)] = 1
    """Capacities before the last one, from 1 down. Each compiles the step once more."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """What to do where a loss or gradient is not finite: end the run, or skip the step and print
    it. Parameters are never updated by such a step."""


@dataclasses.dataclass(frozen=True)
class Devices:
    """What to train on. It changes results by rounding alone: a run can go on over other devices
    than it began with."""

    data: Count = 1
    """Devices over which batch and parameters are sharded. A CPU counts as one device; with
    XLA_FLAGS=--xla_force_host_platform_device_count=8 in the environment, as eight."""
    expert: Count = 1
    """Devices over which experts are sharded, each `data` times; so is the batch."""
    processes: Count = 1
    """How many processes there are, each started with this command and its own number. They read
    the same files and write to the same folder."""
    process: Annotated[int, Ge(0), Le(10**9)] = 0
    """The number of this process, from 0."""
    coordinator: str | None = None
    """HOST:PORT at which the others reach process 0. "auto" gets it and the two numbers above from
    the cluster: Slurm, Open MPI, a TPU pod, Kubernetes. It is the default under `srun` and `mpirun`
    and on a TPU pod."""

    @property
    def count(self) -> int:
        """How many devices there are."""
        return self.data * self.expert


def check_options(options: Options) -> Options:
    """Checks the ranges of a command's options. Returns them with `~` in paths expanded.

    **Raises:** `ValueError` that names the first option outside its range.
    """
    values = dataclasses.asdict(options)  # pyright: ignore[reportArgumentType]
    try:
        pydantic.TypeAdapter(type(options)).validate_python(values)
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = ".".join(map(str, first["loc"]))
        raise ValueError(f"`{name}` must be {_rule(first)}, got {first['input']!r}.") from None
    paths = {name: value.expanduser() for name, value in values.items() if isinstance(value, Path)}
    return dataclasses.replace(options, **paths)  # pyright: ignore[reportArgumentType]


def _rule(error: Any) -> str:
    value, bounds = error["input"], error.get("ctx", {})
    if isinstance(value, float) and not math.isfinite(value):
        return "finite"
    for name, words in (("ge", "at least"), ("gt", "above"), ("le", "at most"), ("lt", "below")):
        if name in bounds:
            return f"{words} {bounds[name]:.12g}"
    return error["msg"].removeprefix("Input should be ")


def command_line(name: str, options: Any, *, defaults: Any = None) -> str:
    """The command of `mode-lab NAME` with those options that differ from their defaults."""
    words = ["mode-lab", name]
    usual = flatten(dataclasses.asdict(type(options)() if defaults is None else defaults))
    for option, value in flatten(dataclasses.asdict(options)).items():
        if value == usual[option]:
            continue
        group, dot, flag = option.replace("_", "-").rpartition(".")
        if isinstance(value, bool):
            words += [f"--{group}{dot}{'' if value else 'no-'}{flag}"]
        else:
            values = value if isinstance(value, tuple) else (value,)
            words += [f"--{group}{dot}{flag}", *map(str, values)]
    return shlex.join(words)


def flatten(options: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The entries of a dictionary and of those inside it, by names with dots."""
    flat = {}
    for name, value in options.items():
        name = f"{prefix}{name}"
        flat |= flatten(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return flat


def absolute_glob(data: str | None) -> str | None:
    """The glob of a text as it is found from any folder."""
    return None if data is None else os.path.abspath(os.path.expanduser(data))
