"""What a model did under a selection, summed up: all the numbers of an analysis."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from .measures import (
    CLASSES,
    Estimate,
    Spread,
    bin_edges,
    binned,
    chance,
    class_ratios,
    class_totals,
    correlations,
    estimates,
    expert_shares,
    resamples,
    spread,
)
from .observe import Observed, Router


# Tokens of a class below which draws of them say nothing about others.
_FEW = 20


@dataclasses.dataclass(frozen=True)
class ClassShare:
    """One class of bytes. What has no tokens, or a model without compute to share, is NaN.

    **Attributes:**

    - `name`: of `CLASSES`.
    - `tokens`, `token_share`: how many, and of all tokens.
    - `compute_share`: of all compute.
    - `ratio`: of the two shares; of fewer than 20 tokens without an interval.
    - `compute`, `entropy`: means over its tokens; the entropy in bits.
    """

    name: str
    tokens: int
    token_share: float
    compute_share: float
    ratio: Estimate
    compute: float
    entropy: float


@dataclasses.dataclass(frozen=True)
class Depth:
    """The tokens of one compute.

    **Attributes:**

    - `compute`: how many experts, or blocks, of all routed layers took them.
    - `tokens`, `share`: how many they are, and of all tokens.
    - `chance`: the share there would be if each layer took its tokens whatever the others do.
    - `entropy`: of the predictions made there, in bits.
    """

    compute: int
    tokens: int
    share: float
    chance: float
    entropy: Spread


@dataclasses.dataclass(frozen=True)
class LayerWeights:
    """One layer's router.

    **Attributes:**

    - `layer`: its number, from 1 at the bottom.
    - `taken`, `passed`: weights of pairs of a token and an expert that took it, or did not.
    - `above_half`: share of all pairs whose weight is above 0.5.
    - `taken_bins`, `passed_bins`: how many weights lie between the `edges` of the router.
    - `shares`: of the tokens that came, how many each expert took.
    - `noop`: mean probability of all no-ops together; NaN without any.
    """

    layer: int
    taken: Spread
    passed: Spread
    above_half: float
    taken_bins: tuple[int, ...]
    passed_bins: tuple[int, ...]
    shares: tuple[float, ...]
    noop: float


@dataclasses.dataclass(frozen=True)
class RouterWeights:
    """A router: nested ones are inside a routed block and see its slots.

    `edges` are those of the histograms; the outermost bins hold what lies beyond.
    """

    nested: bool
    edges: tuple[float, ...]
    layers: tuple[LayerWeights, ...]


@dataclasses.dataclass(frozen=True)
class Summary:
    """All numbers of one selection.

    **Attributes:**

    - `name`: of the selection.
    - `bits`: per byte, of this text.
    - `tokens`, `sequences`: that count.
    - `layers`: the routed ones.
    - `most`: the largest compute a token can have.
    - `compute`: mean over the tokens.
    - `entropy`: of the predictions, in bits.
    - `pearson`, `spearman`: correlation of a token's compute and the entropy of its prediction.
    """

    name: str
    bits: float
    tokens: int
    sequences: int
    layers: tuple[int, ...]
    most: int
    compute: float
    entropy: Spread
    pearson: Estimate
    spearman: Estimate
    classes: tuple[ClassShare, ...]
    depths: tuple[Depth, ...]
    routers: tuple[RouterWeights, ...]


def summarise(
    observed: dict[str, Observed],
    classes: Int[np.ndarray, "sequences tokens"],
    *,
    seed: int,
    draws: int = 1000,
) -> list[Summary]:
    """The numbers of every selection of one model on one text.

    **Arguments:**

    - `observed`: by the name of the selection.
    - `classes`: of the text's tokens.
    - `seed`, `draws`: of the bootstrap, and how often it draws; the same for all selections.
    """
    several = list(observed.values())
    # The same bins for all selections: they are to be compared.
    edges = [_edges([one.routers[n] for one in several]) for n in range(len(several[0].routers))]
    # Of sequences without a token that counts there is nothing to draw.
    sequences = int(several[0].counted.any(axis=1).sum())
    drawn = resamples(sequences, draws, seed)
    return [_summary(name, one, classes, drawn, edges) for name, one in observed.items()]


def _summary(
    name: str,
    observed: Observed,
    classes: Int[np.ndarray, "sequences tokens"],
    draws: Int[np.ndarray, "count sequences"],
    edges: Sequence[Float[np.ndarray, " edges"]],
) -> Summary:
    counted = observed.counted
    used = np.flatnonzero(counted.any(axis=1))
    sequence = np.searchsorted(used, np.nonzero(counted)[0])
    entropy = observed.entropy[counted]
    compute = observed.taken.sum(0)[counted]
    spent = compute.astype(np.float64)
    pearson, spearman = estimates(correlations(spent, entropy), sequence, draws)
    return Summary(
        name=name,
        bits=observed.bits,
        tokens=len(entropy),
        sequences=len(used),
        layers=observed.layers,
        most=observed.most,
        compute=float(spent.mean()),
        entropy=spread(entropy),
        pearson=pearson,
        spearman=spearman,
        classes=_classes(classes[counted], spent, entropy, sequence, draws),
        depths=_depths(observed, compute, entropy),
        routers=tuple(map(_router, observed.routers, edges)),
    )


def _classes(
    classes: Int[np.ndarray, " tokens"],
    spent: Float[np.ndarray, " tokens"],
    entropy: Float[np.ndarray, " tokens"],
    sequence: Int[np.ndarray, " tokens"],
    draws: Int[np.ndarray, "count sequences"],
) -> tuple[ClassShare, ...]:
    one = np.ones_like(spent)
    tokens, compute, bits = (class_totals(classes, x, one) for x in (one, spent, entropy))
    ratios = [
        found if count >= _FEW else Estimate(found.value, np.nan, np.nan)
        for found, count in zip(
            estimates(class_ratios(classes, spent), sequence, draws), tokens, strict=True
        )
    ]
    with np.errstate(invalid="ignore"):
        shares, computes, entropies = compute / spent.sum(), compute / tokens, bits / tokens
    return tuple(
        ClassShare(
            name,
            int(tokens[n]),
            float(tokens[n] / len(spent)),
            float(shares[n]),
            ratios[n],
            float(computes[n]),
            float(entropies[n]),
        )
        for n, name in enumerate(CLASSES)
    )


def _depths(
    observed: Observed, compute: Int[np.ndarray, " tokens"], entropy: Float[np.ndarray, " tokens"]
) -> tuple[Depth, ...]:
    expected = chance(observed.rates)
    found = []
    for number in range(observed.most + 1):
        here = compute == number
        share = float(here.mean())
        found.append(
            Depth(number, int(here.sum()), share, float(expected[number]), spread(entropy[here]))
        )
    return tuple(found)


def _edges(routers: Sequence[Router]) -> Float[np.ndarray, " edges"]:
    return bin_edges(np.concatenate([router.weight[router.counted].ravel() for router in routers]))


def _router(router: Router, edges: Float[np.ndarray, " edges"]) -> RouterWeights:
    shares = expert_shares(router.selected, router.counted)
    layers = []
    for place, layer in enumerate(router.layers):
        counted = router.counted[place]
        weight, selected = router.weight[place][counted], router.selected[place][counted]
        taken, passed = weight[selected], weight[~selected]
        noop = np.nan if router.noop is None or not counted.any() else router.noop[place][counted]
        layers.append(
            LayerWeights(
                layer,
                spread(taken),
                spread(passed),
                float((weight > 0.5).mean()) if weight.size else np.nan,
                tuple(binned(taken, edges).tolist()),
                tuple(binned(passed, edges).tolist()),
                tuple(shares[place].tolist()),
                float(np.mean(noop)),
            )
        )
    return RouterWeights(router.nested, tuple(edges.tolist()), tuple(layers))


def number(value: float, digits: int = 2) -> str:
    """For people to read; a dash for what is not defined."""
    # Added 0 takes the sign from a zero.
    return f"{round(value, digits) + 0.0:.{digits}f}" if np.isfinite(value) else "-"
