"""The options of `mode-lab convert` and `mode-lab heal`. Nothing heavy is imported here."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro
from annotated_types import Ge, Le, Lt

from ..options import Count, Data, NotNegative, Positive, Seed, UpToOne


Form = Literal["mod", "mod-queries", "mod-attention", "mod-feedforward", "mod-both"]
_Layers = Annotated[
    tuple[Annotated[int, Ge(0), Le(4096)], ...],
    tyro.conf.arg(help="Numbers of the layers to route, from 0.", metavar="LAYER ..."),
]
_Length = Annotated[int, Ge(2), Le(2**20)]
ARM_TEXTS = {
    "learned": "routers that learn",
    "random": "tokens at random, another draw each time",
    "strided": "evenly spaced tokens",
    "left-out": "without the layers that are to be routed",
}
_ARMS = "; ".join(f"{name}: {text}" for name, text in ARM_TEXTS.items())


@dataclasses.dataclass(frozen=True)
class Converting:
    """Measure what each layer of a pretrained model is worth, choose layers to route, and say what
    routing them changes before any training."""

    model: Path
    """A folder with config.json and safetensors files, or a GGUF file."""
    out: Path = Path("runs/convert")
    """Folder for the table and the picture."""
    data: Data = None
    layers: _Layers = ()
    choose: bool = False
    """Measure every layer, alone and left out, on text to train on, and propose some: those of the
    least loss, with a dense one between any two. Without `--layers`, these are routed."""
    save: Annotated[float, Ge(0), Lt(1)] = 0.15
    """Fraction of the FLOPs that `--choose` is to save, or what half of the layers can."""
    form: Form = "mod-queries"
    """What a routed layer is: see `mode.pretrained.convert`."""
    capacity: UpToOne = 0.5
    """Fraction of the tokens that a routed layer computes."""
    length: _Length = 512
    """Tokens in a sequence."""
    sequences: Count = 4
    """Sequences to measure on: of the text to train on for `--choose`, held out for the losses."""
    seed: Seed = 0
    """Seed of the routers."""


@dataclasses.dataclass(frozen=True)
class Healing:
    """Route layers of a pretrained model and train it to predict what it predicted before.

    Routers learn first, then the norms, then all parameters, on the model's own predictions. A run
    that was interrupted goes on from its last checkpoint: the same command.
    """

    model: Path
    """A folder with config.json and safetensors files, or a GGUF file."""
    layers: _Layers
    out: Path = Path("runs/heal")
    """Folder for results. One of another configuration is refused."""
    data: Data = None
    arms: Annotated[
        tuple[str, ...], tyro.conf.arg(help=f"What to train: {_ARMS}.", metavar="ARM ...")
    ] = ("learned", "random")
    form: Form = "mod-queries"
    """What a routed layer is: see `mode.pretrained.convert`."""
    capacity: UpToOne = 0.5
    """Fraction of the tokens that a routed layer computes."""
    router_steps: Annotated[int, Ge(0), Le(10**9)] = 30
    """Steps in which routers alone learn; arms without routers that learn have none."""
    norm_steps: Annotated[int, Ge(0), Le(10**9)] = 0
    """Steps in which norms and routers learn."""
    steps: Annotated[int, Ge(0), Le(10**9)] = 300
    """Steps in which all parameters learn."""
    length: _Length = 512
    """Tokens in a sequence."""
    batch: Count = 1
    """Sequences in one step."""
    learning_rate: Positive = 3e-4
    """Peak rate of Adam for all parameters but those of routers."""
    router_rate: Positive = 2e-3
    """The same for routers."""
    router_cost: NotNegative = 0.0
    """Times the mean sigmoid of the routers' logits, added to the loss."""
    ramp: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Fraction of the last steps in which capacities fall from 1 to their goal."""
    ramp_stages: Annotated[int, Ge(1), Le(16)] = 2
    """Capacities before the last one. Each compiles the step once more."""
    causal: Annotated[float, Ge(0), Lt(1)] = 0.1
    """Fraction of the last steps in which routers select by the causal rule, as text is sampled."""
    top: Annotated[int, Ge(1), Le(2**16)] = 64
    """How many of the likeliest tokens of the dense model are kept for each token; all others are
    one."""
    held_out: Count = 32
    """Sequences to evaluate on, at most."""
    save_every: Count = 100
    """Steps between two checkpoints."""
    seed: Seed = 0
    """Seed of the routers and of the order of the text."""
