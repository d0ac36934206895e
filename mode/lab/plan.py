"""What a training step will need, before there is a device: the command `mode-lab plan`."""

import dataclasses
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import jax
import tyro
from rich.console import Console

import mode
from mode.testing import memory_of, mesh_for

from .arms import NAMES, Size, arms_named
from .footprint import Counted, Program, Said
from .meshes import Place, meshes, places
from .plan_report import Plan, Tried, binary, decimal, line_of, write_plan
from .presets import preset_named, presets_help


@dataclasses.dataclass(frozen=True)
class MeshSize:
    """How devices are arranged. By default the arrangement is searched for."""

    data: int | None = None
    """Devices that batch and parameters are divided over."""
    expert: int | None = None
    """Devices that experts are divided over, each `data` times; so is the batch. A divisor of their
    number."""


@dataclasses.dataclass(frozen=True)
class Planning:
    """Say what a training step will need on each device, by the compiler of devices not there.

    The step is that of `mode-lab train`. Where it does not fit, meshes are searched for the first
    on which it does: those of the target from the most devices along `expert` to the fewest, as
    that gathers the fewest weights, and then those of ever larger topologies.
    """

    preset: Annotated[str | None, tyro.conf.arg(help=presets_help())] = None
    target: str = "tpu:v5e:2x2"
    """Device and topology: tpu:v5e:16x16, tpu:v5p:4x4x4, tpu:v6e:2x4, cuda:h100, ..."""
    mesh: MeshSize = dataclasses.field(default_factory=MeshSize)
    memory: float | None = None
    """GiB that a program may use on a device. By default what the compiler says of a TPU; of a GPU
    the share that JAX takes, XLA_PYTHON_CLIENT_MEM_FRACTION or 0.75 of all."""
    minutes: float = 9.0
    """No compilation begins that would, taking as long as the longest before it, end later; one
    that has begun is not cut off."""
    out: Path = Path("runs/plan")
    """Folder for plan.json and plan.md."""
    arm: Annotated[
        str, tyro.conf.arg(help=f"What to train: {', '.join(NAMES)}; see `mode-lab ablate -h`.")
    ] = "mod"
    size: Size = dataclasses.field(default_factory=Size)

    @staticmethod
    def asked(args: Sequence[str]) -> "Planning":
        """The defaults of a command line: those of the preset that it names.

        **Raises:** `ValueError` for an unknown preset.
        """
        named = None
        for place, arg in enumerate(args):
            if arg.startswith("--preset="):
                named = arg.partition("=")[2]
            elif arg == "--preset" and place + 1 < len(args):
                named = args[place + 1]
        if named is None:
            return Planning()
        preset = preset_named(named)
        return Planning(preset=named, arm=preset.arm, size=preset.size)


def run_planning(planning: Planning, console: Console, *, command: str) -> Plan:
    """Plan, print what was found, and save it.

    **Raises:** `ValueError` for bad settings; `ImportError` where the compiler is not installed.
    """
    began = time.perf_counter()
    # Compiling needs no device, and JAX would look long for one whose driver is not there.
    jax.config.update("jax_platforms", "cpu")
    _check(planning)
    memory, rule = _memory(planning)
    devices = mesh_for(planning.target).size
    (arm,) = arms_named([planning.arm])
    program = Program(arm, planning.size)
    experts = _experts(program)
    asked = _asked(planning, devices, experts)
    counted = program.counted(asked[0])
    console.print(
        f"{arm.name}, {decimal(counted.parameters).strip()} parameters, for {planning.target}: "
        f"{devices} device{'s' if devices > 1 else ''} with {binary(memory)} each ({rule}).",
        highlight=False,
    )
    tried = []
    for place in places(planning.target, asked, experts):
        tried.append(_try(program, place, memory, tried, planning.minutes * 60, began, console))
        console.print(line_of(tried[-1], memory), highlight=False)
        if tried[-1].fits:
            break
    plan = Plan(
        command=command,
        arm=arm.name,
        size=planning.size,
        memory_bytes=memory,
        memory_rule=rule,
        tried=tuple(tried),
        seconds=time.perf_counter() - began,
    )
    write_plan(planning.out, plan, console)
    return plan


def _check(planning: Planning) -> None:
    if planning.arm not in NAMES:
        raise ValueError(f"`arm` must be one of {', '.join(NAMES)}, got {planning.arm!r}.")
    for name in ("memory", "minutes"):
        value = getattr(planning, name)
        if value is not None and not (math.isfinite(value) and value > 0):
            raise ValueError(f"`{name}` must be a finite number above 0, got {value}.")
    for name in ("data", "expert"):
        value = getattr(planning.mesh, name)
        if value is not None and value < 1:
            raise ValueError(f"`mesh.{name}` must be at least 1 device, got {value}.")
    if planning.out.exists() and not planning.out.is_dir():
        raise ValueError(f"`out` must be a folder or not exist yet, got the file {planning.out}.")


def _memory(planning: Planning) -> tuple[int, str]:
    """Bytes that a program may use on a device, and why so many."""
    if planning.memory is not None:
        return int(planning.memory * 2**30), "as `memory` says"
    whole = memory_of(planning.target)
    if not planning.target.startswith("cuda"):
        return whole, "by its compiler"
    given = os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.75")
    try:
        share = float(given)
    except ValueError:
        share = math.nan
    if not 0 < share <= 1:
        raise ValueError(
            f"`XLA_PYTHON_CLIENT_MEM_FRACTION` must be a number above 0 and at most 1, got "
            f"{given!r}. JAX takes this share of a GPU's memory."
        )
    return int(share * whole), (
        f"{share:g} of {binary(whole)}, JAX's share: see XLA_PYTHON_CLIENT_MEM_FRACTION"
    )


def _experts(program: Program) -> int:
    """What the devices along `expert` must divide; 1 where the model has no experts."""
    found = [router.num_experts for router in mode.routers(program.state.model)]
    return math.gcd(*(count for count in found if count > 1)) or 1


def _asked(planning: Planning, devices: int, experts: int) -> list[dict[str, int]]:
    """Meshes of the target in the order in which they are tried."""
    batch, data, expert = planning.size.batch, planning.mesh.data, planning.mesh.expert
    if batch % devices:
        raise ValueError(
            f"`size.batch` must divide over all {devices} devices of {planning.target}, got "
            f"{batch}. The next that does is {-(-batch // devices) * devices}."
        )
    searched = meshes(devices, experts)
    if data is None and expert is None:
        return searched
    data = devices // (expert or 1) if data is None else data
    expert = devices // data if expert is None else expert
    if data * expert != devices:
        raise ValueError(
            f"`mesh.data` times `mesh.expert` must be all {devices} devices of {planning.target}, "
            f"got {data} times {expert}."
        )
    if experts > 1 and experts % expert:
        raise ValueError(
            f"`mesh.expert` must divide the number of experts, {experts}, got {expert}. Try "
            f"{math.gcd(experts, devices)}."
        )
    given = {"data": data, "expert": expert}
    return [given, *(axes for axes in searched if axes != given)]


def _try(
    program: Program,
    place: Place,
    memory: int,
    before: Sequence[Tried],
    limit: float,
    began: float,
    console: Console,
) -> Tried:
    """Whether a place fits, without the compiler where that can be told without."""

    def tried(why: str, counted: Counted | None = None, said: Said | None = None) -> Tried:
        fits = said is not None and said.argument_bytes is not None and said.needed_bytes <= memory
        return Tried(place.target, place.axes, counted, said, fits, why)

    if program.size.batch % place.devices:
        return tried(f"a batch of {program.size.batch} does not divide over {place.devices}")
    counted = program.counted(place.axes)
    if counted.argument_bytes > memory:
        return tried("the state alone is larger", counted)
    refused = [one.axes["expert"] for one in before if one.target == place.target and one.said]
    if refused and place.axes["expert"] < max(refused):
        return tried("gathers more weights at once than a mesh that does not fit", counted)
    longest = max((one.said.seconds for one in before if one.said), default=0.0)
    if longest and time.perf_counter() - began + longest > limit:
        return tried(f"no time left: {limit / 60:g} minutes", counted)
    console.print(f"compiling for {place.target}, {place.named} ...", highlight=False)
    return tried("", counted, program.compiled(place.target, place.axes))
