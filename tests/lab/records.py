"""Records of runs that never were, for what reads records."""

from mode.lab.evidence.records import Mark, Run, RunRecord, SweepSettings
from mode.lab.options import Recipe, Size


REFERENCE = Size(dim=16, depth=2, heads=1, length=32, batch=2, experts=2, noop=1)
SETTINGS = SweepSettings(
    reference=REFERENCE,
    rates=(0.01,),
    search_budget=1e8,
    held_out=8,
    recipe=Recipe(),
    corpus="text",
)


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
    equal_steps: bool = False,
) -> RunRecord:
    """Makes a record of a run that never was."""
    run = Run(
        arm=arm,
        size=size,
        recipe=Recipe(learning_rate=rate),
        budget=budget,
        seed=seed,
        held_out=8,
        corpus="text",
        equal_steps=equal_steps,
    )
    if mark is None:
        top_k = causal - gap
        mark = Mark(step=10, top_k=top_k, causal=causal, precision=0.9, recall=0.8, slots=0.125)
    return RunRecord(
        run=run,
        parameters=parameters,
        forward_flops=forward,
        step_flops=1e7,
        steps=10,
        end=mark,
        slots_top_k=0.125,
        marks=(mark.model_copy(update={"step": 5}),),
        losses=(3.0, 2.0),
        seconds={"training": 1.0, "waiting": 0.1, "evaluating": 0.5},
        step_seconds=0.1,
        versions={"jax": "0"},
        machine="none",
    )


def pairs(
    one: str,
    other: str,
    difference: float,
    *,
    gap: float = 0.0,
    size: object = REFERENCE,
    parameters: int = 1000,
) -> list[RunRecord]:
    """Runs of two arms. The losses of the second are higher by about `difference`."""
    records = []
    for seed in range(3):
        for budget in (1e8, 3e8):
            loss = 2.0 + 0.3 * seed - 1e-9 * budget
            higher = loss + difference + 1e-3 * (seed - 1)
            records.append(made_up(one, loss, budget=budget, seed=seed))
            options = {"size": size, "gap": gap, "parameters": parameters}
            records.append(made_up(other, higher, budget=budget, seed=seed, **options))
    return records
