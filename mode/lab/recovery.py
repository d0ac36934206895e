"""Recovery: the part of what the routed blocks are worth that an arm gains with fewer tokens."""

from collections.abc import Sequence

import pandas as pd

from .run import TrainResult


def recovery(arm: float, *, dense: float, left_out: float) -> float:
    """Computes (left out - arm) / (left out - dense) of three losses after equal steps.

    1 is as good as computing every token, 0 as bad as leaving the blocks out. NaN where the blocks
    are worth nothing.

    >>> round(recovery(2.1, dense=2.0, left_out=2.4), 2)
    0.75
    """
    return (left_out - arm) / (left_out - dense) if left_out > dense else float("nan")


def recoveries(losses: pd.DataFrame) -> pd.DataFrame:
    """Computes the recovery of every arm, a column, in every run of equal steps, a row.

    What the blocks are worth, left out minus dense, is the mean over the rows: of one seed it is as
    noisy as what it divides.
    """
    worth = (losses["left-out"] - losses["dense"]).mean()
    return losses.rsub(losses["left-out"], axis="index") / worth


def recovery_table(results: Sequence[TrainResult]) -> pd.DataFrame | None:
    """Makes a row for each arm that took equal steps; `None` without `dense` and `left-out`."""
    bits = {result.arm.name: result.evaluation.bits_causal for result in results}
    if not {"dense", "left-out"} <= bits.keys():
        return None
    ends = {"dense": bits["dense"], "left_out": bits["left-out"]}
    rows = [
        {
            "arm": result.arm.name,
            "steps": result.settings.options.steps,
            "bits / byte, CAUSAL": bits[result.arm.name],
            "recovery": recovery(bits[result.arm.name], **ends),
            "without its updates": result.evaluation.bits_without,
        }
        for result in results
    ]
    return pd.DataFrame(rows)
