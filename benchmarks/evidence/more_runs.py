"""Trains the runs of four studies, beside those of the preset `cpu-hour` and into its folder.

`gap` says how the gap between the loss under top-k and the causal loss closes, and `leak` how much
top-k leaks from the future; their arms differ from one of the lab's in one thing each. `forms`
compares all arms of the lab at equal FLOPs, and `batch` the main ones at half and twice the batch.

    mode-lab isoflop --out runs/evidence
    python benchmarks/evidence/more_runs.py --out runs/evidence
    python benchmarks/evidence/studies.py --out runs/evidence
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import jax.numpy as jnp
import tyro
from jaxtyping import Array, Float

import mode
from mode.lab.arms import ALL_ARMS, Arm, predictor_loss
from mode.lab.console import make_console
from mode.lab.evidence.presets import PRESETS, Grid, Preset, bce_loss, sweep_arms
from mode.lab.evidence.sweep import run_sweep
from mode.lab.layers import depths
from mode.lab.options import Recipe, Size


MOD, PREDICTOR, RANDOM, MOE, AFTER = sweep_arms(
    *("mod", "mod-predictor", "mod-random", "moe", "mod-after")
)
SIGMOID, TWICE = mode.SigmoidGate(), mode.SigmoidGate(scale=2.0)


def with_bce(suffix: str, weight: float, gate: mode.AbstractGate = mode.IdentityGate()) -> Arm:
    """The paper's cross entropy on the router, which then decides causally too."""
    return Arm(
        f"mod-bce-{suffix}",
        f"Mixture-of-Depths with the paper's cross entropy on the router, of weight {weight:g}",
        partial(depths, gate=gate),
        rule=mode.LogitThreshold(),
        auxiliary=partial(bce_loss, weight=weight),
    )


def both_losses(routings: tuple[mode.Routing, ...]) -> Float[Array, ""]:
    """The predictor's loss and cross entropy of weight 0.1 on the router."""
    return jnp.add(predictor_loss(routings), bce_loss(routings, weight=0.1))


def with_gate(arm: Arm, suffix: str, gate: mode.AbstractGate) -> Arm:
    """An arm of Mixture-of-Depths with another gate."""
    assert arm.routed is not None
    name, about = f"{arm.name}-{suffix}", f"{arm.description}; gate {gate}"
    options = arm.routed.keywords if isinstance(arm.routed, partial) else {}
    routed = partial(depths, **options, gate=gate)
    return dataclasses.replace(arm, name=name, description=about, routed=routed)


# When training runs under the causal rule, and how fast the running quantile moves.
SCHEDULES = {"tenth": 0.1, "half": 0.5, "start": 0.95}
RATES = (0.003, 0.01, 0.1)
GAP_ARMS: tuple[Arm, ...] = (
    *(
        dataclasses.replace(MOD, name=f"mod-{name}", under_rule=fraction)
        for name, fraction in SCHEDULES.items()
    ),
    *(dataclasses.replace(MOD, name=f"mod-rate-{rate}", quantile_rate=rate) for rate in RATES),
    *(with_bce(f"{weight:g}", weight) for weight in (0.01, 1.0)),
    with_bce("0.1-sigmoid", 0.1, SIGMOID),
    dataclasses.replace(PREDICTOR, name="mod-predictor-bce-0.1", auxiliary=both_losses),
    with_gate(MOD, "twice-sigmoid", TWICE),
    with_gate(PREDICTOR, "sigmoid", SIGMOID),
    with_gate(PREDICTOR, "twice-sigmoid", TWICE),
    with_gate(RANDOM, "sigmoid", SIGMOID),
)
# Trained under top-k to the end, and then run causally.
LEAK_ARMS = (AFTER, dataclasses.replace(MOE, name="moe-after", under_rule=0.0))


# The form in which selection on text has something to find, and its control.
QUERIES = sweep_arms("mod-queries", "mod-queries-random")

COMPARED = sweep_arms("dense", "mod", "mod-random", "left-out")

Study = Literal["gap", "leak", "forms", "batch"]
STUDIES: tuple[Study, ...] = get_args(Study)


def of_length(reference: Size, length: int) -> Size:
    """The reference with shorter or longer sequences, and as many tokens in a step."""
    batch = reference.batch * reference.length // length
    return dataclasses.replace(reference, length=length, batch=batch)


def studies(
    base: Preset, names: Sequence[str], seeds: int, which: Sequence[Study] = STUDIES
) -> Preset:
    """The runs of studies at the reference of a preset, of all arms or of those named."""
    reference, budgets = base.reference, base.grids[0].budgets
    lengths = tuple(of_length(reference, length) for length in (16, 32, 64, 256))
    layers = tuple(dataclasses.replace(reference, depth=depth) for depth in (2, 6, 8))
    batches = tuple(
        dataclasses.replace(reference, batch=batch)
        for batch in (reference.batch // 2, 2 * reference.batch)
    )
    gap, leak, forms, queries, compared = (
        tuple(arm for arm in arms if not names or arm.name in names)
        for arms in ((*GAP_ARMS, LEAK_ARMS[1]), LEAK_ARMS, ALL_ARMS, QUERIES, COMPARED)
    )
    grids = {
        "gap": (Grid(gap, (reference,), budgets, seeds),),
        "leak": (Grid(leak, (*lengths, *layers), budgets[:1], seeds),),
        "forms": (
            Grid(forms, (reference,), budgets[:1], seeds),
            Grid(queries, (reference,), budgets[1:], seeds),
        ),
        "batch": (Grid(compared, batches, budgets, seeds),),
    }
    chosen = tuple(grid for study in which for grid in grids[study])
    return dataclasses.replace(base, about="the studies", grids=chosen)


def main(
    out: Path = Path("runs/evidence"),
    arms: tuple[str, ...] = (),
    seeds: int = 3,
    minutes: float | None = None,
    study: tuple[Study, ...] = STUDIES,
) -> None:
    """Train the runs of the studies that are not in the folder yet.

    Args:
        out: The folder of the preset `cpu-hour`.
        arms: Of these arms alone.
        seeds: The number of seeds, from 0.
        minutes: No run starts after so many.
        study: Which studies.
    """
    preset = studies(PRESETS["cpu-hour"], arms, seeds, study)
    run_sweep(preset, Recipe(), out, None, minutes, make_console())


if __name__ == "__main__":
    tyro.cli(main)
