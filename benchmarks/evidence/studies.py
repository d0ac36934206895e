"""Two studies of the runs in a folder: how the gap closes, and what top-k leaks. Trains nothing.

Writes `studies.md`, `gap.png` and `leak.png`. The gap is that between the held-out loss under
top-k, which looks at the future, and the causal loss, which is what a sampler gets. A causal rule
that fills more slots than top-k does is no better rule, so the slots stand beside the loss.

    python benchmarks/evidence/studies.py --out runs/evidence
"""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import tyro
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FormatStrFormatter, NullLocator

from mode.lab.evidence.frame import PAIR, Runs, to_frame
from mode.lab.evidence.records import Store, SweepSettings
from mode.lab.figures import INK, PAGE, arm_colour, caption, save_figure
from mode.lab.files import write_text
from mode.lab.folder import read_settings
from mode.lab.intervals import Interval
from mode.lab.tables import to_markdown


TITLES = {"length": "tokens in a sequence, the routing group", "depth": "layers"}
LEAKING = {"mod-after": "o", "moe-after": "s"}


def depth_arms(runs: Runs) -> pd.DataFrame:
    """Selects runs at the reference of dense, and of arms that route every other layer's depth."""
    frame = runs.varying()
    is_depth = frame["arm"].isin(["dense", "mod"]) | frame["arm"].str.startswith("mod-")
    return frame[is_depth & (frame["arm"] != "mod-every")]


def gap(runs: Runs) -> pd.DataFrame:
    """Compares the arms at each budget, from the lowest causal loss to the highest."""
    frame = depth_arms(runs)
    frame = frame.assign(gap=frame["causal"] - frame["top_k"])
    table = frame.groupby(["budget", "arm"], as_index=False).agg(
        top_k=("top_k", "mean"),
        causal=("causal", "mean"),
        deviation=("causal", "std"),
        gap=("gap", lambda values: Interval.of(values).text() if values.any() else None),
        slots=("slots", "mean"),
    )
    return table.sort_values(["budget", "causal"], ignore_index=True)


def against_default(runs: Runs) -> pd.DataFrame:
    """Compares every arm with `mod`, over all budgets, from the lowest causal loss up."""
    frame = depth_arms(runs)
    losses = frame.pivot(index=PAIR, columns="arm", values="causal")
    losses = losses.sub(losses["mod"], axis="index").drop(columns="mod").dropna(how="all", axis=1)
    order = losses.mean().sort_values().index
    return pd.DataFrame(
        {
            "arm": order,
            "causal loss minus that of mod": [
                Interval.of(losses[a].dropna()).text() for a in order
            ],
            "slots": frame.groupby("arm")["slots"].mean().reindex(order).to_numpy(),
        }
    )


def gain_of_learning(runs: Runs) -> pd.DataFrame:
    """Compares learned with random routing at each size and budget, by the steps of `mod`."""
    frame = runs.varying("dim", "depth", "heads")
    cells = ["shape", "budget"]
    losses = frame.pivot(index=[*cells, "seed"], columns="arm", values="causal")
    gains = (losses["mod-random"] - losses["mod"]).dropna().groupby(level=cells)
    steps = frame[frame["arm"] == "mod"].drop_duplicates(cells).set_index(cells)["steps"]
    table = pd.DataFrame({"gain": gains.agg(lambda values: Interval.of(values).text())})
    return table.join(steps).reset_index().sort_values("steps", kind="stable", ignore_index=True)


def by_batch(runs: Runs) -> pd.DataFrame:
    """Compares arms with `mod` at each budget and batch, the reference's among them."""
    frame = runs.varying("batch").rename(columns={"size.batch": "sequences in a batch"})
    cells = ["budget", "sequences in a batch"]
    losses = frame.pivot(index=[*cells, "seed"], columns="arm", values="causal")
    others = [arm for arm in ("dense", "left-out", "mod-random") if arm in losses]
    own = frame[frame["arm"] == "mod"].drop_duplicates(cells).set_index(cells)
    table = pd.DataFrame(
        {
            f"{arm} minus mod": (losses[arm] - losses["mod"])
            .dropna()
            .groupby(level=cells)
            .agg(lambda values: Interval.of(values).text())
            for arm in others
        }
    )
    return table.join(own["recipe.learning_rate"].rename("learning rate")).reset_index()


def leaks(runs: Runs) -> pd.DataFrame:
    """Measures the gap in per cent where the sequence or the number of layers varies."""
    parts = []
    for field, varied in {"length": ["length", "batch"], "depth": ["depth"]}.items():
        frame = runs.varying(*varied)
        frame = frame[frame["arm"].isin(LEAKING)].rename(columns={f"size.{field}": "value"})
        cells = frame.groupby(["arm", "value"])
        frame = frame[frame["budget"] == cells["budget"].transform("min")]
        gaps = (100 * (frame["causal"] / frame["top_k"] - 1)).rename("gap")
        cells = gaps.groupby([frame["arm"], frame["value"]])
        texts = cells.agg(lambda values: Interval.of(values).text("+.2f", " %")).rename("text")
        part = pd.concat([texts, cells.mean(), cells.std().rename("deviation")], axis="columns")
        parts.append(part.reset_index().assign(field=field))
    table = pd.concat(parts, ignore_index=True)
    order = {name: place for place, name in enumerate((*LEAKING, *TITLES))}
    return table.sort_values(
        ["arm", "field", "value"],
        key=lambda column: column.map(order) if column.name != "value" else column,
        ignore_index=True,
    )


def draw_gap(table: pd.DataFrame) -> Figure:
    """Draws a line for each arm and a panel for each budget, from the top-k loss to the causal."""
    counts = table.groupby("budget").size()
    figure = Figure(figsize=(PAGE, 0.125 * counts.sum() + 0.6 * len(counts)))
    panels = figure.subplots(len(counts), 1, squeeze=False, height_ratios=list(counts + 1.5))
    for axes, (budget, rows) in zip(panels[:, 0], table.groupby("budget"), strict=True):
        for height, row in zip(range(len(rows) - 1, -1, -1), rows.itertuples(), strict=True):
            colour = arm_colour(str(row.arm))
            axes.plot([row.top_k, row.causal], [height, height], color=colour)
            axes.plot(row.top_k, height, "o", color=colour, markerfacecolor="white", markersize=5)
            axes.errorbar(row.causal, height, xerr=row.deviation, fmt="o", color=colour)
        names = [
            arm if pd.isna(slots) else f"{arm}  {slots:.3f}"
            for arm, slots in zip(rows["arm"], rows["slots"], strict=True)
        ]
        axes.set_yticks(range(len(rows)), names[::-1])
        axes.set_ylim(-0.7, len(rows) - 0.3)
        axes.set_title(f"{budget:.3g} training FLOPs")
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x")
    panels[-1, 0].set_xlabel("held-out loss, bits per byte")
    caption(
        figure,
        "Held-out loss under top-k (ring) and causally (dot), means over seeds, with the standard "
        "deviation of the causal loss. After each name: slots filled per token, causally; top-k "
        "fills 0.125.",
    )
    return figure


def draw_leaks(table: pd.DataFrame) -> Figure:
    """Draws the gap in per cent against the routing group, and against the layers."""
    figure = Figure(figsize=(PAGE, 2.6))
    for axes, (field, title) in zip(figure.subplots(1, 2), TITLES.items(), strict=True):
        rows = table[table["field"] == field]
        for arm, part in rows.groupby("arm"):
            colour, marker = arm_colour(str(arm).removesuffix("-after")), LEAKING[str(arm)]
            axes.errorbar(
                *(part["value"], part["gap"], part["deviation"]),
                color=colour,
                marker=marker,
                label=arm,
            )
        axes.set_xscale("log" if field == "length" else "linear")
        axes.xaxis.set_major_locator(FixedLocator(sorted(rows["value"].unique())))
        axes.xaxis.set_major_formatter(FormatStrFormatter("%d"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.axhline(0, color=INK, linewidth=0.6, linestyle="--")
        axes.set(xlabel=title, ylabel="causal loss above top-k loss, %")
        axes.grid()
        axes.legend()
    caption(
        figure,
        "Arms trained under top-k to the end and then run under the running quantile, 3 seeds with "
        "their standard deviation. Every other layer is routed. The difference holds what top-k "
        "knew of the future, and what the threshold gets wrong.",
    )
    return figure


def sections(runs: Runs, out: Path) -> Sequence[str]:
    """Writes the figures, and returns the tables."""
    gaps, leaking = gap(runs), leaks(runs)
    save_figure(lambda: draw_gap(gaps), out / "gap.png")
    save_figure(lambda: draw_leaks(leaking), out / "leak.png")
    names = {"budget": "training FLOPs", "top_k": "top-k", "shape": "size"}
    names |= {"gain": "mod-random minus mod, causal"}
    formats = {"training FLOPs": ".3g", "top-k": ".4f", "causal": ".4f", "slots": ".3f"}
    formats |= {"steps": ","}
    learning = gain_of_learning(runs)[["shape", "budget", "steps", "gain"]].rename(columns=names)
    leaking = leaking.rename(columns={"field": "varied", "text": "causal above top-k"})
    columns = ["arm", "varied", "value", "causal above top-k"]
    return (
        "# The gap and the leak",
        "## Closing the gap",
        to_markdown(gaps.drop(columns="deviation").rename(columns=names), formats),
        "## Against the default",
        to_markdown(against_default(runs), formats),
        "## What learning to route gains",
        to_markdown(learning, formats),
        "## Against the batch",
        to_markdown(by_batch(runs).rename(columns=names), formats),
        "## The leak",
        to_markdown(leaking[columns]),
    )


def main(out: Path = Path("runs/evidence")) -> None:
    """Write the studies of the runs in a folder.

    Args:
        out: The folder of the runs, with those of `more_runs.py`.
    """
    settings = read_settings(out, SweepSettings)
    runs = Runs.of(to_frame(Store(out).all(settings)), settings.reference)
    write_text(out / "studies.md", "\n\n".join(sections(runs, out)) + "\n")


if __name__ == "__main__":
    tyro.cli(main)
