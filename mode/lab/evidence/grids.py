"""What to run: grids of arms, sizes, budgets and seeds, and the presets that stand for several."""

import dataclasses
import itertools
import re
from collections.abc import Iterator, Sequence
from typing import Any

from ..arms import Arm, Size
from .variants import check_once, variants_named


@dataclasses.dataclass(frozen=True)
class Grid:
    """Every arm at every size, budget and seed.

    **Attributes:**

    - `arms`: names of `VARIANTS`.
    - `sizes`: of the models and their batches.
    - `budgets`: training FLOPs.
    - `seeds`: how many, from 0.
    """

    arms: tuple[str, ...]
    sizes: tuple[Size, ...]
    budgets: tuple[float, ...]
    seeds: int = 3

    def groups(self) -> Iterator[tuple[Arm, Size]]:
        """What shares its programs."""
        return itertools.product(variants_named(self.arms), self.sizes)


@dataclasses.dataclass(frozen=True)
class Preset:
    """Grids over one text that are compared with each other.

    **Attributes:**

    - `about`: what it takes, for the help text.
    - `reference`: the size at which arms are compared that are not compared over sizes.
    - `grids`: what to run, in that order.
    - `rates`: learning rates to choose from, for each size, on the dense arm.
    - `held_out`: sequences to evaluate on, at most.
    """

    about: str
    reference: Size
    grids: tuple[Grid, ...]
    rates: tuple[float, ...]
    held_out: int = 512

    @property
    def longest(self) -> int:
        """Tokens of the longest sequences."""
        return max(size.length for grid in self.grids for size in grid.sizes)

    def settings(self) -> dict[str, Any]:
        """What all records of a folder share."""
        return {
            "reference": dataclasses.asdict(self.reference),
            "rates": list(self.rates),
            "search_budget": self.search_budget,
            "held_out": self.held_out,
        }

    @property
    def search_budget(self) -> float:
        """Training FLOPs of each run of the search: the smallest there are."""
        return min(budget for grid in self.grids for budget in grid.budgets)


def sized(reference: Size, name: str) -> Size:
    """The reference with other features and layers, and heads of its size.

    **Raises:** `ValueError` for anything but two numbers, such as `48x6`.
    """
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", name)
    if found is None:
        raise ValueError(f"`sizes` must be features and layers, such as 48x6, got {name!r}.")
    dim, depth = int(found[1]), int(found[2])
    heads = max(1, dim * reference.heads // reference.dim)
    return dataclasses.replace(reference, dim=dim, depth=depth, heads=heads)


def of_length(reference: Size, length: int) -> Size:
    """The reference with shorter or longer sequences, and as many tokens in a step."""
    batch = max(1, reference.batch * reference.length // length)
    return dataclasses.replace(reference, length=length, batch=batch)


def custom(
    arms: Sequence[str],
    sizes: Sequence[str],
    budgets: Sequence[float],
    seeds: int,
    rates: Sequence[float],
    held_out: int,
    base: Size,
) -> Preset:
    """One grid of the user's own.

    **Raises:** `ValueError` for names that repeat or are unknown, no size or budget, and numbers
    out of range.
    """
    variants_named(arms)
    for name, values in (("sizes", sizes), ("budgets", budgets), ("rates", rates)):
        if not values:
            raise ValueError(f"`{name}` must name at least one, got none.")
        check_once(name, values)
    for name, values in (("budgets", budgets), ("rates", rates)):
        if not all(0 < value < float("inf") for value in values):
            raise ValueError(f"`{name}` must be finite numbers above 0, got {tuple(values)}.")
    for name, value in (("seeds", seeds), ("held_out", held_out)):
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}.")
    shapes = tuple(sized(base, name) for name in sizes)
    grid = Grid(tuple(arms), shapes, tuple(budgets), seeds)
    middle = sorted(shapes, key=lambda size: size.dim**2 * size.depth)[len(shapes) // 2]
    return Preset("of your own", middle, (grid,), tuple(rates), held_out)


# The paper's comparison, and what is told apart at one size.
_COMPARED = ("dense", "mod", "mod-random")
_GAP = (
    *("mod-after", "mod-tenth", "mod-half", "mod-start"),
    *("mod-rate-0.003", "mod-rate-0.01", "mod-rate-0.1", "mod-position"),
    *("mod-predictor", "mod-bce-0.01", "mod-bce-0.1", "mod-bce-1", "mod-predictor-bce-0.1"),
    *("mod-sigmoid", "mod-twice-sigmoid", "mod-predictor-sigmoid", "mod-predictor-twice-sigmoid"),
    *("mod-bce-0.1-sigmoid", "mod-random-sigmoid"),
)
_EXPERTS = ("moe", "moe-reduced", "mode-staged", "mode-integrated")
_LEAKING = ("mod-after", "moe-after")


def _all(
    reference: Size,
    sizes: Sequence[str],
    budgets: tuple[float, ...],
    *,
    deeper: str,
    wider: str,
    depths: Sequence[int],
    lengths: Sequence[int],
    seeds: int,
) -> tuple[Grid, ...]:
    """Everything that is asked of one scale, the comparison over sizes first."""
    shapes = tuple(sized(reference, name) for name in sizes)
    shares = (0.0625, 0.25, 0.5, 1.0)
    capacities = tuple(dataclasses.replace(reference, capacity=share) for share in shares)
    leaking = (
        *(of_length(reference, length) for length in lengths),
        *(dataclasses.replace(reference, depth=depth) for depth in depths),
    )
    return (
        Grid(_COMPARED, shapes, budgets, seeds),
        Grid(_GAP, (reference,), budgets, seeds),
        Grid((*_EXPERTS, "mod-every"), (reference,), budgets, seeds),
        Grid(("mod",), capacities, budgets, seeds),
        Grid(("mod",), (sized(reference, deeper), sized(reference, wider)), budgets, seeds),
        Grid(("moe-after",), (reference,), budgets, seeds),
        Grid(_LEAKING, leaking, budgets[:1], seeds),
    )


_SMALL = Size(dim=32, depth=4, heads=2)
_TINY = Size(dim=16, depth=2, heads=1, length=32, batch=4, experts=2, noop=1)
_LARGE = Size(dim=384, depth=12, heads=6, length=512, batch=32, dtype="bfloat16")

PRESETS = {
    "cpu-hour": Preset(
        "about an hour on two cores: 10 to 220 thousand parameters, 2e11 and 6e11 training FLOPs",
        _SMALL,
        _all(
            _SMALL,
            # Of one depth: a parabola does not fit what changes in two ways at once.
            ("12x4", "16x4", "24x4", "32x4", "48x4", "64x4"),
            (2e11, 6e11),
            deeper="32x8",
            wider="48x4",
            depths=(2, 6, 8),
            lengths=(16, 32, 64, 256),
            seeds=3,
        ),
        rates=(1e-2, 2e-2, 4e-2),
    ),
    "h100-half-hour": Preset(
        "half an hour on one H100: 4 to 44 million parameters, 3e15 and 1e16 training FLOPs",
        _LARGE,
        (
            Grid(
                _COMPARED,
                tuple(sized(_LARGE, name) for name in ("192x8", "256x10", "384x12", "512x14")),
                (3e15, 1e16),
                2,
            ),
            Grid(("mod-after", "mod-predictor", "mod-bce-0.1"), (_LARGE,), (3e15,), 2),
            Grid(("moe", "mode-staged", "mode-integrated"), (_LARGE,), (3e15,), 2),
        ),
        rates=(1e-3, 2e-3, 4e-3),
    ),
    "tiny": Preset(
        "some minutes, to see that everything works: its numbers mean nothing",
        _TINY,
        (
            Grid(
                _COMPARED, tuple(sized(_TINY, name) for name in ("8x2", "16x2", "24x2")), (4e8,), 2
            ),
            Grid(("mod-after", "mod-predictor", "moe-after", "mode-staged"), (_TINY,), (4e8,), 2),
        ),
        rates=(1e-2,),
        held_out=16,
    ),
}
