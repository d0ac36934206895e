"""What `mode-lab analyze` prints and saves."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import rich.box
from jaxtyping import Int
from rich.console import Console
from rich.table import Table

from .analysis_plots import plot_analysis, unit_of
from .arms import Arm, Size
from .files import write_json, write_text
from .measures import CLASSES, Estimate
from .passage import Passage
from .summary import Summary, number
from .versions import versions


@dataclasses.dataclass(frozen=True)
class About:
    """What was analysed: the run, its text in a few words, and what to know of that text."""

    checkpoint: Path
    arm: Arm
    steps: int
    size: Size
    text: str
    notes: tuple[str, ...]
    seed: int


@dataclasses.dataclass(frozen=True)
class Shown:
    """The routing map's text, and by selection how many experts of each layer took its tokens."""

    passage: Passage
    taken: Mapping[str, Int[np.ndarray, "layers tokens"]]


_NOTHING = """\
**Nothing is routed.** Every layer of this model computes every token, so that there is no routing
map, no router weight and no depth to count: each token has the same compute, each class of bytes
has its share of the tokens as its share of the compute, and no correlation with anything is
defined. What is left is how hard each class is to predict.
"""

_READING = """\
## How to read it

- **The causal row is the one that counts.** Top-k over a sequence looks at the future: whether a
  token is taken depends on tokens after it, and no sampler can have that.{trained}
- *Compute* of a token is how many {unit} of all routed layers took it.{inside} Attention and dense
  layers, which compute every token, are not in it.
- *Ratio* is the share of compute over the share of tokens: 1 is as much as the average token gets.
- *Entropy* is of the model's prediction of the next byte, made at the token whose compute is
  counted. *r* is Pearson's correlation, *rho* Spearman's, of the two, over tokens.
- In brackets, 95 % intervals of a bootstrap over the {sequences} sequences: tokens of one sequence
  compete for the same slots, so tokens are not drawn apart. A dash is a number that is not defined:
  where every token has the same compute, no token any, or there is one sequence. A class of fewer
  than 20 tokens has no interval.
- *Router weights* are the gate's output, which multiplies the update of a token that is taken, for
  the pairs of a token and an expert that were taken and for those that were passed by. The bins at
  both ends hold what lies beyond. The paper's figure 5 shows the sigmoid of such, under its
  auxiliary loss; above 0.5 there is what was taken.
- Padding, and tokens whose next byte is in another file, are left out of all numbers.

Classes of bytes:

{classes}

## What it does not show

- **One model, one seed.** Another seed may route otherwise; nothing here is an average of runs.
- **Correlation is no cause.** A class of bytes may be both harder to predict and computed more for
  another reason, and a token's own compute changes the prediction whose entropy is taken.
- The intervals are of the text, not of training.
- Shares do not say whether the compute was well spent: the loss of an arm that routes at random,
  at equal FLOPs, does. See `mode-lab ablate`.
- The routing map is one passage, the first readable one from a third of the text on; it was not
  chosen for what it shows.
"""

_PICTURES = {
    "routing_map": "Which bytes of a text were computed. An orange line is where a sequence begins "
    "and the model knows nothing of what comes before",
    "router_weights": "Weights of what was taken and what was passed by, layer by layer",
    "depth_used": "How many tokens had how much compute; dots: if layers chose independently",
    "compute_by_class": "Shares of tokens and compute by class of bytes, and their ratio",
    "compute_and_entropy": "Entropy of predictions by compute: box for quartiles, whisker for 5 to "
    "95 %, dot for the mean",
    "expert_loads": "The share of a layer's tokens that each expert took, in %",
}


def write_analysis(
    out: Path, about: About, summaries: Sequence[Summary], shown: Shown | None, console: Console
) -> None:
    """`analysis.json`, `analysis.md` and, of a routed model, the pictures; and a short table.

    **Arguments:**

    - `summaries`: one for each selection.
    - `shown`: of the routing map; `None` where nothing is routed.
    """
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "analysis.json", _record(about, summaries, shown))
    pictures = []
    if shown is not None:
        pictures = plot_analysis(out, summaries, shown.passage, shown.taken)
    write_text(out / "analysis.md", _markdown(about, summaries, shown, pictures))
    console.print(_heading(about, summaries[0]), highlight=False)
    for note in about.notes:
        console.print(note, highlight=False, style="bold")
    if shown is None:
        console.print("Nothing is routed: every layer computes every token.", highlight=False)
    for summary in summaries:
        title = summary.name if summary.layers else None
        table = Table(title=title, title_justify="left", box=rich.box.SIMPLE)
        heads, rows = _class_table([summary])
        for place, head in enumerate(heads):
            table.add_column(head, justify="right" if place else "left")
        for row in rows:
            table.add_row(*row)
        console.print(table)
    if shown is not None:
        for summary in summaries:
            console.print(_line(summary), highlight=False)
    console.print(f"Numbers, pictures and how to read them: {out / 'analysis.md'}", highlight=False)


def _heading(about: About, summary: Summary) -> str:
    return (
        f"{about.arm.name} after {about.steps} steps, on {about.text}: {summary.tokens:,} "
        f"predictions in {summary.sequences} sequence{'s' if summary.sequences > 1 else ''} of "
        f"{about.size.length}."
    )


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %" if math.isfinite(value) else "-"


def _between(estimate: Estimate) -> str:
    if not math.isfinite(estimate.low):
        return number(estimate.value)
    return f"{number(estimate.value)} [{number(estimate.low)}, {number(estimate.high)}]"


def _line(summary: Summary) -> str:
    return (
        f"{summary.name}: {summary.bits:.3f} bits per byte; compute and entropy r = "
        f"{_between(summary.pearson)}, rho = {_between(summary.spearman)}; mean compute "
        f"{summary.compute:.3f} of {summary.most}."
    )


def _class_table(summaries: Sequence[Summary]) -> tuple[list[str], list[list[str]]]:
    heads = ["class", "of tokens"]
    routed = bool(summaries[0].layers)
    for summary in summaries:
        selection = f", {summary.name}" if len(summaries) > 1 else ""
        if routed:
            heads += [f"of compute{selection}", f"ratio{selection}"]
        heads += [f"entropy{selection}"]
    rows = []
    for n, first in enumerate(summaries[0].classes):
        row = [first.name, _percent(first.token_share)]
        for summary in summaries:
            one = summary.classes[n]
            if routed:
                row += [_percent(one.compute_share), _between(one.ratio)]
            row += [number(one.entropy)]
        rows.append(row)
    return heads, rows


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(heads) + " |", "|---" + "|---:" * (len(heads) - 1) + "|"]
    return [*lines, *("| " + " | ".join(row) + " |" for row in rows), ""]


def _markdown(
    about: About, summaries: Sequence[Summary], shown: Shown | None, pictures: Sequence[str]
) -> str:
    lines = ["# What its routers learned", "", _heading(about, summaries[0]), ""]
    lines += [f"- **{about.arm.name}**: {about.arm.description}.", f"- From {about.checkpoint}."]
    lines += [f"- {note}" for note in about.notes] + [""]
    if shown is None:
        bits, entropy = summaries[0].bits, summaries[0].entropy.mean
        lines += [_NOTHING, f"{bits:.3f} bits per byte; mean entropy {entropy:.3f} bits.", ""]
        lines += ["## By class of byte", "", *_table(*_class_table(summaries))]
        lines += ["Entropy in bits, mean over the tokens of the class.", "", _classes(), ""]
        return "\n".join(lines + _made_with())
    unit = unit_of(summaries[0])
    lines += _table(
        ["selection", "bits / byte", f"compute, {unit} of {summaries[0].most}", "r", "rho"],
        [
            [
                f"**{one.name}**" if one.name != "top-k" else one.name,
                number(one.bits, 3),
                number(one.compute, 3),
                _between(one.pearson),
                _between(one.spearman),
            ]
            for one in summaries
        ],
    )
    lines += ["*r*, *rho*: of compute and the entropy of the prediction.", ""]
    lines += ["## By class of byte", "", *_table(*_class_table(summaries))]
    lines += ["Entropy in bits, mean over the tokens of the class.", ""]
    lines += ["## By compute", "", *_table(*_depth_table(summaries, unit))]
    lines += ["## Routers", "", *_table(*_router_table(summaries))]
    lines += ["Weights: median, and from 5 to 95 %.", "", "## Pictures", ""]
    for name in pictures:
        lines += [f"![{_PICTURES[name]}]({name}.png)", "", f"{_PICTURES[name]}. {name}.pdf", ""]
    nested = any(router.nested for router in summaries[0].routers)
    reading = _READING.format(
        trained=_under_rule(about.arm),
        unit=unit,
        inside=_INSIDE if nested else "",
        sequences=summaries[0].sequences,
        classes=_classes(),
    )
    return "\n".join([*lines, reading, *_made_with()])


_INSIDE = (
    " Experts inside a routed block see its slots, not places in the text: their weights and loads "
    "are shown, their choices are not counted."
)


def _under_rule(arm: Arm) -> str:
    if arm.rule is None:
        return (
            " The selection of this model looks at no later token, as it was trained: it is shown "
            "once."
        )
    if not arm.under_rule:
        return ""
    return (
        f" The last {100 * arm.under_rule:.0f} % of a training of this arm run under the causal "
        "rule, with the slots of top-k."
    )


def _classes() -> str:
    return "\n".join(f"- *{name}*: {meaning}." for name, meaning in CLASSES.items())


def _made_with() -> list[str]:
    lines = ["## Made with", ""]
    lines += [f"- {name} {number}" for name, number in _versions().items()]
    return [*lines, ""]


def _versions() -> dict[str, str]:
    return versions("python", "mode-jax", "jax", "equinox", "numpy", "matplotlib")


def _depth_table(summaries: Sequence[Summary], unit: str) -> tuple[list[str], list[list[str]]]:
    heads = [unit]
    for summary in summaries:
        heads += [f"of tokens, {summary.name}", "by chance", "entropy"]
    last = max(n for one in summaries for n, depth in enumerate(one.depths) if depth.tokens)
    rows = []
    for n in range(last + 1):
        row = [str(n)]
        for summary in summaries:
            one = summary.depths[n]
            row += [_percent(one.share), _percent(one.chance), number(one.entropy.mean)]
        rows.append(row)
    return heads, rows


def _router_table(summaries: Sequence[Summary]) -> tuple[list[str], list[list[str]]]:
    heads = ["selection", "layer", "of tokens, each expert", "weights taken", "weights passed by"]
    heads += ["weights above 0.5", "no-op probability"]
    rows = []
    for summary in summaries:
        for router in summary.routers:
            for layer in router.layers:
                shares = [layer.shares[0], layer.shares[-1]]
                if len(layer.shares) > 1:
                    shares = [min(layer.shares), max(layer.shares)]
                within = " to ".join(dict.fromkeys(map(_percent, shares)))
                rows.append(
                    [
                        summary.name,
                        f"{layer.layer}{', inside' if router.nested else ''}",
                        within,
                        _quantiles(layer.taken.quantiles),
                        _quantiles(layer.passed.quantiles),
                        _percent(layer.above_half),
                        _percent(layer.noop),
                    ]
                )
    return heads, rows


def _quantiles(found: Sequence[float]) -> str:
    low, _, median, _, high = found
    if not math.isfinite(median):
        return "-"
    return f"{median:.3f} ({low:.3f} to {high:.3f})"


def _record(about: About, summaries: Sequence[Summary], shown: Shown | None) -> dict[str, Any]:
    record = {
        "checkpoint": str(about.checkpoint),
        "versions": _versions(),
        "arm": about.arm.name,
        "steps": about.steps,
        "size": dataclasses.asdict(about.size),
        "text": about.text,
        "notes": about.notes,
        "seed": about.seed,
        "routed": shown is not None,
        "unit": None if shown is None else unit_of(summaries[0]),
        "class_definitions": CLASSES,
        "selections": {one.name: dataclasses.asdict(one) for one in summaries},
    }
    if shown is not None:
        passage = shown.passage
        record["passage"] = {
            "document": passage.document,
            "tokens": passage.tokens.tolist(),
            "sequence_begins": passage.begins(),
            "taken": {name: counts.tolist() for name, counts in shown.taken.items()},
        }
    return _plain(record)


def _plain(value: Any) -> Any:
    """The same in JSON, which has no number for what is not defined."""
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
