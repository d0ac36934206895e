"""What a training step will need, before there is a device: the command `mode-lab plan`."""

import dataclasses
import itertools
import math
import os
import time
from collections.abc import Iterator

import jax
from rich.console import Console

import mode
from mode.aot import device_memory_bytes, mesh_for

from .arms import arm_named
from .budget import parameter_count
from .commands import MeshSize as MeshSize, Planning as Planning
from .console import say_progress
from .folder import check_out
from .footprint import Program
from .meshes import MeshOf, larger_topologies, meshes
from .options import command_line
from .plan_report import Plan, Trial, binary, write_plan
from .versions import PACKAGES, versions


def run_planning(planning: Planning, console: Console) -> Plan:
    """Plans, prints the result, and saves it.

    **Raises:** `ValueError` for bad settings; `ImportError` where the compiler is not installed.
    """
    began = time.perf_counter()
    # Compiling needs no device, and JAX would search long for one whose driver is absent.
    jax.config.update("jax_platforms", "cpu")
    arm = arm_named(planning.arm)
    check_out(planning.out)
    memory, rule = _memory(planning)
    devices = mesh_for(planning.target).size
    program = Program(arm, planning.size)
    order = _search_order(planning, program, devices)
    what = f"{arm.name}, {parameter_count(program.state.model):,} parameters, for {planning.target}"
    each = f"device{'s' if devices > 1 else ''} with {binary(memory)} each ({rule})."
    say_progress(console, f"{what}: {devices} {each}")
    trials: list[Trial] = []
    for mesh in order:
        left = began + 60 * planning.minutes - time.perf_counter()
        trial = _skipped(program, mesh, memory, trials, left)
        if not trial.why:
            say_progress(console, f"compiling for {mesh} ...")
            report, exchanges = program.compile(mesh.target, mesh.axes)
            fits = "argument_bytes" in report and report["needed_bytes"] <= memory
            trial = Trial(mesh, trial.counted, report, exchanges, fits)
        trials.append(trial)
        say_progress(console, trial.describe(memory))
        if trial.fits:
            break
    preset = () if planning.preset is None else ("--preset", planning.preset)
    defaults = dataclasses.replace(Planning.defaults(preset), preset=None)
    plan = Plan(
        command=command_line("plan", planning, defaults=defaults),
        versions=versions(*PACKAGES, "jaxlib", "libtpu", "jax-cuda13-pjrt"),
        arm=arm.name,
        size=planning.size,
        memory_bytes=memory,
        memory_rule=rule,
        trials=tuple(trials),
        seconds=round(time.perf_counter() - began, 1),
    )
    write_plan(planning.out, plan, console)
    return plan


def _memory(planning: Planning) -> tuple[int, str]:
    """The bytes that a program may use on a device, and where the number comes from."""
    if planning.memory is not None:
        return int(planning.memory * 2**30), "as `memory` says"
    whole = device_memory_bytes(planning.target)
    if not planning.target.startswith("cuda"):
        return whole, "by its compiler"
    name = "XLA_PYTHON_CLIENT_MEM_FRACTION"
    given = os.environ.get(name, "0.75")
    try:
        part = float(given)
    except ValueError:
        part = math.nan
    if not 0 < part <= 1:
        raise ValueError(
            f"`{name}` must be a number above 0 and at most 1, got {given!r}. JAX takes this part "
            "of a GPU's memory."
        )
    return int(part * whole), f"{part:g} of {binary(whole)}, JAX's part: see {name}"


def _search_order(planning: Planning, program: Program, devices: int) -> Iterator[MeshOf]:
    """The meshes in the order in which they are tried; bad settings are refused at once."""
    target, batch = planning.target, planning.size.batch
    data, expert = planning.mesh.data, planning.mesh.expert
    counts = [router.num_experts for router in mode.routers(program.state.model)]
    experts = math.gcd(*(count for count in counts if count > 1)) or 1
    if batch % devices:
        raise ValueError(
            f"`size.batch` must divide over all {devices} devices of {target}, got {batch}. The "
            f"next that does is {-(-batch // devices) * devices}."
        )
    order = meshes(target, experts)
    if data is not None or expert is not None:
        data = devices // (expert or 1) if data is None else data
        expert = devices // data if expert is None else expert
        if data * expert != devices:
            raise ValueError(
                f"`mesh.data` times `mesh.expert` must be all {devices} devices of {target}, got "
                f"{data} times {expert}."
            )
        if experts > 1 and experts % expert:
            raise ValueError(
                f"`mesh.expert` must divide the number of experts, {experts}, got {expert}. Try "
                f"{math.gcd(experts, devices)}."
            )
        order = list(dict.fromkeys([MeshOf(target, data, expert), *order]))
    larger = (mesh for other in larger_topologies(target) for mesh in meshes(other, experts))
    return itertools.chain(order, larger)


def _skipped(program: Program, mesh: MeshOf, memory: int, past: list[Trial], left: float) -> Trial:
    """A trial, and why not to call the compiler: "" where it is to be called."""
    devices, batch = mesh.data * mesh.expert, program.size.batch
    if batch % devices:
        return Trial(mesh, why=f"a batch of {batch} does not divide over {devices}")
    counted = program.count(mesh.axes)
    if counted["argument_bytes"] > memory:
        return Trial(mesh, counted, fits=False, why="the state alone is larger")
    why, compiled = "", [trial for trial in past if trial.compiler]
    if any(t.mesh.target == mesh.target and t.mesh.expert > mesh.expert for t in compiled):
        why = "gathers more weights at once than a mesh that does not fit"
    elif any(trial.compiler["seconds"] > left for trial in compiled):
        why = "no time left: see --minutes"
    return Trial(mesh, counted, why=why)
