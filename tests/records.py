"""Records of runs that never were, for what reads records."""

import dataclasses

from mode.lab.arms import Size
from mode.lab.evidence.records import Mark, Record, Run
from mode.lab.step import Recipe


REFERENCE = Size(dim=16, depth=2, heads=1, length=32, batch=2, experts=2, noop=1)


def made_up(
    arm: str,
    causal: float,
    *,
    size: Size = REFERENCE,
    budget: float = 1e8,
    seed: int = 0,
    gap: float = 0.0,
    parameters: int = 1000,
    forward: float = 2000.0,
    mark: Mark | None = None,
    rate: float = 0.01,
) -> Record:
    """A record of a run that never was."""
    run = Run(arm, size, Recipe(learning_rate=rate), budget, seed, 8, "text")
    end = Mark(10, causal - gap, causal, 0.9, 0.8, 0.125) if mark is None else mark
    return Record(
        run=run,
        parameters=parameters,
        forward_flops=forward,
        step_flops=10**7,
        steps=10,
        end=end,
        compute_top_k=0.125,
        marks=(dataclasses.replace(end, step=5),),
        curve=(3.0, 2.0),
        seconds={"training": 1.0, "waiting": 0.1, "evaluating": 0.5},
        step_seconds=0.1,
        versions={"jax": "0"},
        machine="none",
    )
