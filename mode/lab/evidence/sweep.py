"""Trains the runs that a folder does not hold yet, and reports on all that it holds.

Several processes may work on one folder: each locks a group of runs that share their programs.
"""

import dataclasses
import itertools
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import jax
from rich.console import Console

from ..arms import ARMS, Arm
from ..budget import flops_per_step, steps_for
from ..console import Bars, progress, say, say_progress
from ..data import Corpus, read_corpus
from ..files import lock
from ..folder import claim
from ..options import Recipe
from .perform import perform
from .presets import Grid, Preset
from .records import SEARCH_SEED, Run, Store, SweepSettings, shape_name
from .report import report_sweep


def list_runs(grids: Sequence[Grid], settings: SweepSettings) -> list[Run]:
    """Lists all runs of the grids, each once, at the learning rate of the recipe."""
    common = {"recipe": settings.recipe, "held_out": settings.held_out, "corpus": settings.corpus}
    runs = (
        Run(
            arm=arm.name,
            size=size,
            budget=budget,
            seed=seed,
            equal_steps=grid.equal_steps,
            **common,
        )
        for grid in grids
        for arm, size in itertools.product(grid.arms, grid.sizes)
        for budget, seed in itertools.product(grid.budgets, range(grid.seeds))
    )
    return list(dict.fromkeys(runs))


def list_search(runs: Sequence[Run], settings: SweepSettings) -> list[Run]:
    """Lists the runs that find a learning rate for each size: the dense arm, at every rate."""
    search = []
    for size in {shape_name(run.size): run.size for run in runs}.values():
        shape = {"dim": size.dim, "depth": size.depth, "heads": size.heads}
        size = dataclasses.replace(settings.reference, **shape)
        update = {"arm": "dense", "size": size, "seed": SEARCH_SEED}
        run = runs[0].model_copy(update=update | {"budget": settings.search_budget})
        search += [run.at_rate(rate) for rate in settings.rates]
    return search if len(settings.rates) > 1 else []


def with_rates(
    runs: Iterable[Run], search: Sequence[Run], settings: SweepSettings, store: Store
) -> list[Run]:
    """Returns the runs at the rate that is best for the dense arm of their size, as no arm but the
    baseline is tuned; none before the search is over.

    **Raises:** `ValueError` where no rate gave a result at some size.
    """
    if not all(map(store.is_finished, search)):
        return []
    rates = {}
    for shape, candidates in itertools.groupby(search, lambda run: shape_name(run.size)):
        records = [record for run in candidates if (record := store.get(run))]
        if not records:
            raise ValueError(
                f"`rates` must hold one at which the dense arm of {shape} trains, but none gave a "
                "finite loss. Give lower ones."
            )
        best = min(records, key=lambda record: record.end.causal)
        rates[shape] = best.run.recipe.learning_rate
    return [run.at_rate(rates.get(shape_name(run.size), settings.rates[0])) for run in runs]


def step_count(arm: Arm, run: Run) -> int:
    """Returns how many optimizer steps the budget of a run pays for, of its own arm or the dense.

    **Raises:** `ValueError` for fewer than two, and for a model that cannot be built.
    """
    paid = ARMS[0] if run.equal_steps else arm
    return steps_for(paid, run.budget, flops_per_step(paid, run.size, run.recipe))


def run_sweep(
    preset: Preset,
    recipe: Recipe,
    out: Path,
    data: str | None,
    minutes: float | None,
    console: Console,
) -> None:
    """Trains what is missing of a preset, and reports. Other arguments are those of `Isoflop`.

    **Raises:** `ValueError` for a preset that cannot be run, and where no learning rate of a size
    gave a result.
    """
    end = None if minutes is None else time.monotonic() + 60 * minutes
    corpus = read_corpus(data, length=max(s.length for grid in preset.grids for s in grid.sizes))
    settings = preset.settings(recipe, corpus.fingerprint)
    runs = list_runs(preset.grids, settings)
    search = list_search(runs, settings)
    for run in (*search, *runs):  # before anything is written
        step_count(preset.arms[run.arm], run)
    store = Store(out)
    claim(out, settings)
    finished = sum(map(store.is_finished, with_rates(runs, search, settings, store)))
    before = f"{finished} of them finished before"
    count = f"{len(runs)} runs, {before}, and {len(search)} that search learning rates."
    say_progress(console, count)
    worker = _Worker(preset.arms, store, corpus, end, console)
    worker.train_all(search)
    worker.train_all(with_rates(runs, search, settings, store))
    report_sweep(out, console)


@dataclasses.dataclass(frozen=True)
class _Worker:
    """One of the processes that work on a folder. No run starts after `end`."""

    arms: dict[str, Arm]
    store: Store
    corpus: Corpus
    end: float | None
    console: Console

    def train_all(self, runs: Sequence[Run]) -> None:
        """Trains every run that is missing, and waits for those that other processes train."""
        locks = self.store.folder / "locks"
        locks.mkdir(exist_ok=True)
        missing = [run for run in runs if not self.store.is_finished(run)]
        with progress(self.console, len(missing)) as bars:
            while missing:
                for name, group in itertools.groupby(missing, lambda run: run.group):
                    with lock(locks / f"{name}.lock") as is_mine:
                        for run in group if is_mine else ():
                            if self.end is not None and time.monotonic() > self.end:
                                return
                            if not self.store.is_finished(run):
                                self._train(run, bars)
                        if is_mine:
                            jax.clear_caches()  # the programs of this group are not used again
                count = len(missing)
                missing = [run for run in missing if not self.store.is_finished(run)]
                if len(missing) == count:
                    time.sleep(1)

    def _train(self, run: Run, bars: Bars) -> None:
        arm, start = self.arms[run.arm], time.perf_counter()
        note = ", equal steps" if run.equal_steps else ""
        title, steps = f"{run.arm} {shape_name(run.size)}{note}", step_count(arm, run)
        with bars.arm(title, steps) as watch:
            try:
                record = perform(run, arm, steps, self.corpus, watch)
            except FloatingPointError as error:
                self.store.fail(run, str(error))
                say(self.console, f"{run.name}: {error}", "red")
                return
        self.store.add(record)
        name = f"{title}, {run.budget:.3g} FLOPs, seed {run.seed}"
        losses = f"{record.end.top_k:.4f} bits per byte, causal {record.end.causal:.4f}"
        rate, seconds = run.recipe.learning_rate, time.perf_counter() - start
        say_progress(self.console, f"{name}, rate {rate:g}: {losses}, {seconds:.0f} s.")
