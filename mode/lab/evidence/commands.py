"""The commands `mode-lab isoflop` and `mode-lab claims`."""

from rich.console import Console

from ..commands import Claims, Isoflop
from .presets import PRESETS, Grid, Preset, sizes_like, sweep_arms


def chosen(options: Isoflop) -> Preset:
    """Returns what an `isoflop` is to run.

    **Raises:** `ValueError` for an unknown preset, and for a sweep without arms, sizes, budgets
    or rates, or with one that repeats or is unknown.
    """
    if not (options.arms or options.sizes or options.budgets):
        if options.preset not in PRESETS:
            raise ValueError(
                f"`preset` must be one of {', '.join(PRESETS)}, got {options.preset!r}."
            )
        usual = Isoflop()
        ignored = [
            f"--{name.replace('_', '-')}"
            for name in ("seeds", "rates", "held_out", "base")
            if getattr(options, name) != getattr(usual, name)
        ]
        if ignored:
            raise ValueError(
                f"{', '.join(ignored)} must be left out with a preset, which has its own. Give "
                "`--arms`, `--sizes` and `--budgets` for a sweep of your own."
            )
        return PRESETS[options.preset]
    for name in ("arms", "sizes", "budgets", "rates"):
        values = getattr(options, name)
        if not values or len(set(values)) < len(values):
            raise ValueError(f"`{name}` must be one or more, each once, got {values}.")
    sizes = sizes_like(options.base, *options.sizes)
    middle = sorted(sizes, key=lambda size: size.dim**2 * size.depth)[len(sizes) // 2]
    grid = Grid(sweep_arms(*options.arms), sizes, options.budgets, options.seeds)
    return Preset("of your own", middle, (grid,), options.rates, options.held_out)


def run_isoflop(options: Isoflop, console: Console) -> None:
    """Trains what is missing of a sweep, and reports.

    **Raises:** `ValueError` for bad options, and as `run_sweep` does.
    """
    from .sweep import run_sweep

    rest = (options.out, options.data, options.minutes, console)
    run_sweep(chosen(options), options.recipe, *rest)


def run_claims(options: Claims, console: Console) -> None:
    """Reports on the claims, as `report_claims` does."""
    from .claims import report_claims

    report_claims(options.out, console)
