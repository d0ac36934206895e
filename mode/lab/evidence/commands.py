"""The commands `mode-lab isoflop` and `mode-lab claims`."""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from ..options import Count, Data, Positive, Recipe, Size, check_options
from .presets import PRESETS, Grid, Preset, sizes_like, sweep_arms


_PRESETS_HELP = "Which runs. " + "; ".join(f"{name}: {p.about}" for name, p in PRESETS.items())


@dataclasses.dataclass(frozen=True)
class Isoflop:
    """Train arms at several sizes and seeds for equal training FLOPs, and fit loss against size.

    A sweep that was interrupted continues where it stopped: the same command skips finished runs.
    Several processes with the same command share the work.
    """

    out: Path = Path("runs/isoflop")
    """Folder of the records, of one text, recipe and reference."""
    preset: Annotated[str, tyro.conf.arg(help=_PRESETS_HELP + ".")] = "cpu-hour"
    arms: tuple[str, ...] = ()
    """Arms of a sweep of your own, instead of a preset; with `--sizes` and `--budgets`."""
    sizes: tuple[str, ...] = ()
    """Its sizes, features and layers, such as 32x4 48x6 64x6."""
    budgets: tuple[Positive, ...] = ()
    """Its training FLOPs."""
    seeds: Count = 3
    """Its number of seeds, from 0."""
    rates: tuple[Positive, ...] = (1e-2, 2e-2, 4e-2)
    """Its learning rates. For each size the best one of the dense arm is used."""
    held_out: Count = 512
    """Its held-out sequences, at most."""
    base: Size = dataclasses.field(default_factory=Size)
    """Its sizes, except for features, layers and heads."""
    data: Data = None
    minutes: Positive | None = None
    """No run starts after so many minutes. The same command continues later."""
    recipe: Recipe = dataclasses.field(default_factory=Recipe)
    """How runs are trained, except for the learning rate, which is searched."""

    def chosen(self) -> Preset:
        """Returns what to run.

        **Raises:** `ValueError` for an unknown preset, and for a sweep without arms, sizes, budgets
        or rates, or with one that repeats or is unknown.
        """
        if not (self.arms or self.sizes or self.budgets):
            if self.preset in PRESETS:
                return PRESETS[self.preset]
            raise ValueError(f"`preset` must be one of {', '.join(PRESETS)}, got {self.preset!r}.")
        for name in ("arms", "sizes", "budgets", "rates"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"`{name}` must be one or more, each once, got {values}.")
        sizes = sizes_like(self.base, *self.sizes)
        middle = sorted(sizes, key=lambda size: size.dim**2 * size.depth)[len(sizes) // 2]
        grid = Grid(sweep_arms(*self.arms), sizes, self.budgets, self.seeds)
        return Preset("of your own", middle, (grid,), self.rates, self.held_out)


@dataclasses.dataclass(frozen=True)
class Claims:
    """Test the paper's claims on the runs of `mode-lab isoflop`. Trains nothing."""

    out: Path = Path("runs/isoflop")
    """The folder of the runs."""


def run_isoflop(options: Isoflop, console: Console) -> None:
    """Trains what is missing of a sweep, and reports.

    **Raises:** `ValueError` for bad options, and as `run_sweep` does.
    """
    from .sweep import run_sweep

    options = check_options(options)
    rest = (options.out, options.data, options.minutes, console)
    run_sweep(options.chosen(), options.recipe, *rest)


def run_claims(options: Claims, console: Console) -> None:
    """Reports on the claims, as `report_claims` does."""
    from .claims import report_claims

    report_claims(check_options(options).out, console)
