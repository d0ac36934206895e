"""The paper's claims that can be tested at a small scale, their tests, and the report of them."""

import dataclasses
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
from rich.console import Console

from ..console import say
from ..files import write_text
from ..folder import read_settings
from ..intervals import Interval
from ..tables import prose, to_console, to_markdown
from .frame import PAIR, Runs, to_frame
from .records import Store, SweepSettings


Verdict = Literal["reproduced", "contradicted", "not resolved at this scale", "not run"]
UNRESOLVED: Verdict = "not resolved at this scale"


@dataclasses.dataclass(frozen=True)
class Claim:
    """A claim of arXiv:2404.02258, in our words: some values lie between `low` and `high`.

    `values` gives them from the runs: by what they are, series indexed by budget and seed. NaN is a
    fit that has no lowest point, infinity one that is never low enough. `spec` and `unit` are the
    format of the numbers, `source` a section or figure of the paper.
    """

    source: str
    statement: str
    values: Callable[[Runs], dict[str, pd.Series]]
    spec: str = "+.4f"
    unit: str = " bits per byte"
    low: float = 0.0
    high: float = math.inf

    def test(self, runs: Runs) -> tuple[str, Verdict]:
        """Tests the claim on the runs of a folder: the numbers in words, and the verdict."""
        values = {name: series for name, series in self.values(runs).items() if len(series)}
        if not values:
            return "no such runs", "not run"
        texts, verdicts = zip(*itertools.starmap(self._judge, values.items()), strict=True)
        worst = max(verdicts, key=("reproduced", UNRESOLVED, "contradicted").index)
        return "; ".join(texts), worst

    def _judge(self, name: str, series: pd.Series) -> tuple[str, Verdict]:
        count, series = len(series), series.dropna()
        never = series[np.isinf(series)]
        if series.empty:
            return f"{name}: no optimum is between the sizes run", UNRESOLVED
        if len(never):
            text = f"{name}: never in {len(never)} of {len(series)} pairs of fits"
            return text, "contradicted" if len(never) == len(series) else UNRESOLVED
        whole = Interval.of(series)
        text = f"{name}: {whole.text(self.spec, self.unit)}"
        groups = list(series.groupby(level="budget"))
        for budget, group in groups if len(groups) > 1 else ():
            text += f", {Interval.of(group).text(self.spec)} at {budget:.3g}"
        if len(series) < count:
            text += f", no optimum in {count - len(series)} of {count} pairs of fits"
        if self.low < whole.low and whole.high < self.high:
            return text, "reproduced"
        outside = whole.high < self.low or self.high < whole.low
        return text, "contradicted" if outside else UNRESOLVED


def _better(source: str, statement: str, one: str, other: str) -> Claim:
    """Claims that an arm has a lower causal loss than another one, at the reference."""

    def values(runs: Runs) -> dict[str, pd.Series]:
        losses = runs.at_reference(other)["causal"] - runs.at_reference(one)["causal"]
        return {f"{other} minus {one}": losses.dropna()}

    return Claim(source, statement, values)


def _auxiliary(statement: str, arm: str, low: float, high: float) -> Claim:
    """Claims that an auxiliary loss adds between `low` and `high` per cent to the top-k loss."""

    def values(runs: Runs) -> dict[str, pd.Series]:
        base, other = (runs.at_reference(name)["top_k"] for name in ("mod-after", arm))
        return {f"top-k loss of {arm} above mod-after": (100 * (other - base) / base).dropna()}

    return Claim("3.5", statement, values, "+.2f", " %", low, high)


def _optimum(source: str, statement: str, lower: str, higher: str) -> Claim:
    """Claims that one arm's lowest loss over sizes is lower than another's."""

    def values(runs: Runs) -> dict[str, pd.Series]:
        pairs = runs.fits.reindex(columns=[lower, higher]).dropna()
        losses = pairs.map(lambda fit: fit.lowest)
        return {f"{lower} below {higher}": 100 * (1 - losses[lower] / losses[higher])}

    return Claim(source, statement, values, "+.2f", " %")


def _cost(runs: Runs) -> dict[str, pd.Series]:
    pairs = runs.fits.reindex(columns=["mod", "dense"]).dropna()
    costs = [mod.cost_of(dense) for mod, dense in pairs.to_numpy()]
    name = "forward FLOPs where MoD is as good as the dense optimum / those of that optimum"
    return {name: pd.Series(costs, pairs.index, float)}


def _capacities(runs: Runs) -> dict[str, pd.Series]:
    frame, best = runs.varying("capacity").query("arm == 'mod'"), runs.reference.capacity
    losses = frame.pivot(index=PAIR, columns="size.capacity", values="causal")
    if best not in losses:
        return {}
    others = losses.drop(columns=best).sub(losses[best], axis="index")
    return {f"loss at {other:g} minus at {best:g}": others[other].dropna() for other in others}


def _shapes(runs: Runs) -> dict[str, pd.Series]:
    """A deeper and a wider model of equal cost within a tenth, both larger than the reference."""
    frame = runs.varying("dim", "depth", "heads").query("arm == 'mod'")
    losses = frame.pivot(index=PAIR, columns="shape", values="causal")
    sizes = frame.drop_duplicates("shape").set_index("shape")
    flops = sizes["forward_flops"]
    sizes = sizes[flops > runs.at_reference("mod")["forward_flops"].max()]
    return {
        f"{wider} minus {deeper}, at {flops[wider] / flops[deeper]:.2f} of its forward FLOPs": (
            losses[wider] - losses[deeper]
        ).dropna()
        for deeper in sizes.index[sizes["size.dim"] == runs.reference.dim]
        for wider in sizes.index[sizes["size.depth"] == runs.reference.depth]
        if abs(flops[deeper] / flops[wider] - 1) < 0.1
    }


def accuracy(frame: pd.DataFrame) -> pd.Series:
    """Computes how often a causal rule agrees with top-k, as a fraction of the tokens.

    `frame` has the `precision` and `recall` of the rule, and the fraction of the tokens that it
    selects, `slots`, and that top-k selects, `slots_top_k`.
    """
    both = frame["recall"] * frame["slots_top_k"]
    selected = (both / frame["precision"]).where(frame["precision"] > 0, frame["slots"])
    return 1 - (selected - both) - (frame["slots_top_k"] - both)


def _accuracies(runs: Runs) -> dict[str, pd.Series]:
    frame = runs.at_reference("mod-predictor")
    if frame.empty:
        return {}
    name = "accuracy"
    for place, when in ((0, "an eighth"), (3, "half")):
        marks = [row[min(place, len(row) - 1)] for row in frame["marks"]]
        early = pd.DataFrame(marks, frame.index).assign(slots_top_k=frame["slots_top_k"])
        name += f" {100 * accuracy(early).mean():.1f} % after {when},"
    nothing = 100 * (1 - frame["slots_top_k"].iloc[0])
    precision, recall = frame["precision"].mean(), frame["recall"].mean()
    name += f" {nothing:.1f} % of a rule that selects nothing; at the end precision {precision:.2f}"
    return {f"{name}, recall {recall:.2f}, accuracy": 100 * accuracy(frame)}


def _gap(runs: Runs) -> dict[str, pd.Series]:
    frame = runs.at_reference("mod-predictor")
    above = 100 * (frame["causal"] / frame["top_k"] - 1)
    return {"causal loss of mod-predictor above its top-k loss": above}


def _recovery(arm: str, low: float) -> Claim:
    """Claims, as this library does, that an arm recovers a part of the routed blocks' worth."""

    def values(runs: Runs) -> dict[str, pd.Series]:
        gains = runs.recoveries
        return {f"recovery of {arm}": 100 * gains[arm].dropna()} if arm in gains else {}

    statement = f"`{arm}` recovers over {low:.0f} % of the blocks' worth at equal steps"
    return Claim("ours", statement, values, "+.0f", " %", low)


def _recovery_above(one: str, other: str) -> Claim:
    def values(runs: Runs) -> dict[str, pd.Series]:
        gains = runs.recoveries
        if not {one, other} <= set(gains):
            return {}
        return {f"recovery of {one} minus {other}": 100 * (gains[one] - gains[other]).dropna()}

    return Claim("ours", "Learned recovers more than random at equal steps", values, "+.0f", " %")


def _used(arm: str) -> Claim:
    def values(runs: Runs) -> dict[str, pd.Series]:
        frame = runs.at_reference(arm)
        return {f"{arm} without its updates": (frame["without"] - frame["causal"]).dropna()}

    return Claim("ours", f"A trained `{arm}` uses its routed updates", values)


CLAIMS = (
    _better("4.1, fig. 3", "Learned routing beats random routing", "mod", "mod-random"),
    _optimum("4.1, fig. 3", "Learned beats random, each at its best size", "mod", "mod-random"),
    _optimum("4.1, fig. 3", "Dense beats random, each at its best size", "dense", "mod-random"),
    _better("4.1", "Routing every other block beats routing every block", "mod", "mod-every"),
    Claim("4.1", "A capacity of 12.5 % is the best", _capacities),
    _optimum("4.1, fig. 4", "The best MoD model beats the best dense model", "mod", "dense"),
    Claim(
        "4.1, fig. 4",
        "MoD is as good as the best dense model at fewer FLOPs",
        *(_cost, ".2f", "", 0.0, 1.0),
    ),
    Claim("4.1", "The FLOPs saved are better spent on depth than on width", _shapes),
    Claim(
        "3.5, fig. 6",
        "A predictor agrees with top-k on 97 % of the tokens",
        *(_accuracies, "+.1f", " %", 97.0),
    ),
    _auxiliary("A predictor costs nothing under top-k (within 0.1 %)", "mod-predictor", -0.1, 0.1),
    _auxiliary("Router cross entropy costs 0.2 to 0.3 % under top-k", "mod-bce-0.1", 0.2, 0.3),
    Claim(
        "4.2, fig. 6",
        "Sampling by the predictor costs less than 0.3 % (our bound)",
        *(_gap, "+.2f", " %", -math.inf, 0.3),
    ),
    _better("4.2, fig. 6", "Causal MoD with a predictor beats dense", "mod-predictor", "dense"),
    _better("4.3, fig. 7", "Staged MoDE beats MoE", "mode-staged", "moe"),
    _better("4.3, fig. 7", "Staged MoDE beats MoD", "mode-staged", "mod"),
    _better("4.3", "Integrated MoDE beats smaller capacity", "mode-integrated", "moe-reduced"),
    _better("3.4, 3.5", "A question: our gate beats the raw one of equation 1", "mod", "mod-raw"),
    _better("3.4, 3.5", "A question: our gate beats sigmoid weights", "mod", "mod-sigmoid"),
    _better("ours", "MoD beats a dense model without the routed blocks", "mod", "left-out"),
    _recovery("mod", 0.0),
    _recovery("mod-random", 0.0),
    _recovery_above("mod", "mod-random"),
    _used("mod"),
    _used("mod-random"),
)


def report_claims(out: Path, console: Console) -> None:
    """Tests all claims on the runs of a folder: `claims.md`, `claims.json` and a table.

    **Raises:** `ValueError` where the folder holds no runs, or runs that cannot be compared.
    """
    settings = read_settings(out, SweepSettings)
    records = Store(out).all(settings)
    if not records:
        raise ValueError(f"`out` must hold at least one finished run, got {out}, which has none.")
    runs = Runs.of(to_frame(records), settings.reference)
    rows = [(claim.statement, claim.source, *claim.test(runs)) for claim in CLAIMS]
    table = pd.DataFrame(rows, columns=pd.Index(["claim", "source", "numbers", "verdict"]))
    write_text(out / "claims.json", table.to_json(orient="records", indent=1) + "\n")
    write_text(out / "claims.md", prose("claims", table=to_markdown(table)))
    console.print(to_console(table[["verdict", "claim", "numbers"]], title="Claims"))
    say(console, f"See {out / 'claims.md'}.")
