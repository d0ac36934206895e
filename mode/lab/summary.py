"""The numbers of an analysis: tables of what a model did on a text under each rule of selection."""

import dataclasses
from collections.abc import Mapping

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from scipy import stats

from .measures import CLASSES, bin_edges, bootstrap, class_ratios, correlations, count_in_bins
from .observe import Observation


# Tokens below which quantiles and intervals say nothing.
FEW = 20
_QUANTILES = [0.05, 0.25, 0.5, 0.75, 0.95]
_DESCRIBED = ["count", "mean", "5%", "25%", "50%", "75%", "95%"]
Classes = Int[np.ndarray, "sequences tokens"]


@dataclasses.dataclass(frozen=True)
class Summary:
    """Tables with a column `selection`, the rule of selection. What is not defined is NaN.

    *Compute* of a token is the number of experts, or routed blocks, that selected it.

    **Attributes:**

    - `totals`: a row for each selection: `bits_per_byte`, `tokens`, `sequences`, mean `compute` and
        `entropy`, and the correlation of the two, `pearson` and `spearman` with `_low` and `_high`.
    - `classes`: a row for each class of bytes: `tokens`, `token_fraction`, `compute_fraction`, the
        `ratio` of the two with `_low` and `_high`, means of `compute` and `entropy`.
    - `depths`: a row for each `compute`: the `fraction` of tokens with it, the fraction if layers
        selected `independent`ly, and the entropy of their predictions: `count`, `mean`, quantiles.
    - `routers`: a row for each layer of a `router`: the fraction of weights `above_half`, the
        probability of `noop` experts, and the weights of pairs of a token and an expert that were
        selected, or not: `selected_count`, `skipped_mean`, `skipped_95%` and so on.
    - `loads`: a row for each `expert` of these: the `fraction` of the layer's tokens it selected.
    - `histograms`: a row for each bin of weights of these, from `left` to `right`: the numbers of
        `selected` and `skipped` pairs. The outermost bins hold what lies beyond as well.
    - `layers`: the numbers of the routed layers.
    - `max_compute`: the largest compute that a token can have.
    """

    totals: pd.DataFrame
    classes: pd.DataFrame
    depths: pd.DataFrame
    routers: pd.DataFrame
    loads: pd.DataFrame
    histograms: pd.DataFrame
    layers: tuple[int, ...]
    max_compute: int

    @property
    def unit(self) -> str:
        """What compute counts: `"blocks"` of Mixture-of-Depths, or else `"experts"`."""
        return "blocks" if self.max_compute == len(self.layers) else "experts"

    def of(self, table: str) -> dict[str, pd.DataFrame]:
        """Returns the rows of a table by selection, in the order of the selections."""
        frame: pd.DataFrame = getattr(self, table)
        return {name: frame[frame["selection"] == name] for name in self.totals["selection"]}


def summarise(
    observations: Mapping[str, Observation], classes: Classes, *, seed: int, draws: int = 1000
) -> Summary:
    """Computes the tables of one model on one text, from observations by rule of selection.

    `classes` are the numbers in `CLASSES` of the tokens' classes. `seed` and `draws` are those of
    the bootstrap, whose draws are the same for every selection.
    """
    # The same bins for every selection, so that they can be compared.
    by_router = zip(*(observation.routers for observation in observations.values()), strict=True)
    edges = [
        bin_edges(np.concatenate([router.weight[router.counted].ravel() for router in routers]))
        for routers in by_router
    ]
    tables: dict[str, list[pd.DataFrame]] = {}
    for selection, observation in observations.items():
        tokens = _tokens(observation, classes)
        parts = {
            "totals": _totals(tokens, seed, draws),
            "classes": _classes(tokens, seed, draws),
            "depths": _depths(observation, tokens),
            **_routers(observation, edges),
        }
        for name, frame in parts.items():
            frame.insert(0, "selection", selection)
            tables.setdefault(name, []).append(frame)
    joined = {name: pd.concat(frames, ignore_index=True) for name, frames in tables.items()}
    first = next(iter(observations.values()))
    return Summary(**joined, layers=first.layers, max_compute=len(first.fractions))


def _tokens(observation: Observation, classes: Classes) -> pd.DataFrame:
    """Makes a row for each token that counts. Sequences without such tokens get no number."""
    sequence = observation.counted.any(axis=1).cumsum() - 1
    columns = {
        "sequence": np.broadcast_to(sequence[:, None], observation.counted.shape),
        "class": classes,
        "compute": observation.counts.sum(0),
        "entropy": observation.entropy,
        "bits_per_byte": observation.loss,
    }
    return pd.DataFrame({name: values[observation.counted] for name, values in columns.items()})


def _totals(tokens: pd.DataFrame, seed: int, draws: int) -> pd.DataFrame:
    compute, entropy = tokens["compute"].to_numpy(float), tokens["entropy"].to_numpy()
    sequences = int(tokens["sequence"].max()) + 1
    statistic = correlations(compute, entropy, tokens["sequence"].to_numpy())
    estimates = bootstrap(statistic, sequences, seed=seed, draws=draws)
    frame = tokens[["bits_per_byte", "compute", "entropy"]].mean().to_frame().T
    frame.insert(1, "tokens", len(tokens))
    frame.insert(2, "sequences", sequences)
    for name, values in zip(("pearson", "spearman"), estimates, strict=True):
        frame[[name, f"{name}_low", f"{name}_high"]] = values
    return frame


def _classes(tokens: pd.DataFrame, seed: int, draws: int) -> pd.DataFrame:
    numbers = range(len(CLASSES))
    sums = tokens.groupby(["sequence", "class"])["compute"].agg(["size", "sum"])
    size, compute = (
        sums[name].unstack(fill_value=0).reindex(columns=numbers, fill_value=0).to_numpy(float)
        for name in ("size", "sum")
    )
    ratios = bootstrap(class_ratios(size, compute), len(size), seed=seed, draws=draws)
    ratios[size.sum(0) < FEW, 1:] = np.nan
    frame = pd.DataFrame({"class": CLASSES, "tokens": size.sum(0).astype(int)})
    frame["token_fraction"] = size.sum(0) / size.sum()
    frame["compute_fraction"] = compute.sum(0) / (compute.sum() or np.nan)
    frame[["ratio", "ratio_low", "ratio_high"]] = ratios
    return frame.join(tokens.groupby("class")[["compute", "entropy"]].mean())


def _depths(observation: Observation, tokens: pd.DataFrame) -> pd.DataFrame:
    entropy = tokens.groupby("compute")["entropy"].describe(percentiles=_QUANTILES)
    fractions = observation.fractions
    values = np.arange(len(fractions) + 1)
    entropy = entropy[_DESCRIBED].reindex(values)
    entropy["count"] = entropy["count"].fillna(0).astype(int)
    chance = stats.poisson_binom(fractions).pmf(values) if len(fractions) else 1.0
    frame = pd.DataFrame({"compute": entropy.index, "fraction": entropy["count"] / len(tokens)})
    return frame.assign(independent=chance).join(entropy)


def _routers(
    observation: Observation, edges: list[Float[np.ndarray, " edges"]]
) -> dict[str, pd.DataFrame]:
    routers, loads, histograms = [], [], []
    for number, router in enumerate(observation.routers):
        for position, layer in enumerate(router.place.layers):
            counted = router.counted[:, position]
            weight = router.weight[:, position][counted].astype(np.float64)
            selected = router.selected[:, position][counted]
            name = {"router": number, "layer": layer, "nested": router.place.nested}
            row: dict[str, float] = {"above_half": np.nan, "noop": np.nan}
            bins = {"left": edges[number][:-1], "right": edges[number][1:]}
            if len(weight):
                row["above_half"] = (weight > 0.5).mean()
                if router.noop is not None:
                    row["noop"] = router.noop[:, position][counted].mean()
            for kind, values in (("selected", weight[selected]), ("skipped", weight[~selected])):
                described = pd.Series(values).describe(percentiles=_QUANTILES)
                row |= {f"{kind}_{name}": described[name] for name in _DESCRIBED}
                bins[kind] = count_in_bins(values, edges[number])
            routers.append(name | row)
            expert = range(1, weight.shape[1] + 1)
            fraction = selected.mean(0) if len(selected) else np.nan
            loads.append(pd.DataFrame({"expert": expert, "fraction": fraction}).assign(**name))
            histograms.append(pd.DataFrame(bins).assign(**name))
    frames = {"loads": loads, "histograms": histograms}
    tables = {name: pd.concat(parts) if parts else pd.DataFrame() for name, parts in frames.items()}
    return {"routers": pd.DataFrame(routers), **tables}
