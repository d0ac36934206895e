"""The command `mode-lab isoflop`: runs what a store does not hold yet, and reports on all it holds.

Several of these commands may work on one folder at once: each takes groups of runs that share their
programs, and no other takes a group while it is held. A command that dies lets go of its group.
"""

import contextlib
import dataclasses
import fcntl
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import jax
import tyro
from rich.console import Console

from ..arms import Size
from ..data import Corpus, read_corpus
from ..files import claim
from ..progress import Bars, progress
from ..step import Recipe
from .grids import PRESETS, Preset, custom
from .perform import check_budget, perform
from .records import Run, Store, size_name
from .report import report
from .runs import Runs
from .variants import variants_named


_PRESETS_HELP = "Which runs. " + "; ".join(f"{name}: {p.about}" for name, p in PRESETS.items())


@dataclasses.dataclass(frozen=True)
class Isoflop:
    """Train arms at several sizes and seeds for equal training FLOPs, and fit loss against size.

    A sweep that was interrupted at any moment goes on where it stood: the same command skips what
    is finished. Started twice or more, it shares the work.
    """

    out: Path = Path("runs/isoflop")
    """Folder of the records. One of another text, recipe or reference is refused."""
    preset: Annotated[str, tyro.conf.arg(help=_PRESETS_HELP + ".")] = "cpu-hour"
    arms: tuple[str, ...] = ()
    """Arms of a sweep of your own, instead of a preset; with `--sizes` and `--budgets`."""
    sizes: tuple[str, ...] = ()
    """Its sizes, features and layers, such as 32x4 48x6 64x6."""
    budgets: tuple[float, ...] = ()
    """Its training FLOPs."""
    seeds: int = 3
    """Its seeds, from 0."""
    rates: tuple[float, ...] = (1e-2, 2e-2, 4e-2)
    """Learning rates of which it chooses, for each size, the best of the dense arm."""
    held_out: int = 512
    """Sequences it is evaluated on, at most."""
    base: Size = dataclasses.field(default_factory=Size)
    """All of its sizes but for features, layers and heads."""
    data: str | None = None
    """Files to train on, a quoted glob such as "texts/**/*.txt". By default the source of the
    Python standard library."""
    minutes: float | None = None
    """After so many, no further run is begun: the same command goes on later."""
    recipe: Recipe = dataclasses.field(default_factory=Recipe)
    """But for the learning rate, which is searched."""

    def asked(self) -> Preset:
        """What to run.

        **Raises:** `ValueError` for an unknown preset, or a sweep that cannot be.
        """
        own = (self.arms, self.sizes, self.budgets)
        if any(own):
            if not all(own):
                raise ValueError(
                    "`arms`, `sizes` and `budgets` must be given together for a sweep of your own, "
                    f"got {self.arms}, {self.sizes} and {self.budgets}."
                )
            return custom(*own, self.seeds, self.rates, self.held_out, self.base)
        if self.preset not in PRESETS:
            raise ValueError(f"`preset` must be one of {', '.join(PRESETS)}, got {self.preset!r}.")
        return PRESETS[self.preset]


def run_isoflop(isoflop: Isoflop, console: Console) -> None:
    """Run what is missing, and report.

    **Raises:** `ValueError` for bad settings, and where no learning rate of a size gave a result.
    """
    preset = isoflop.asked()
    if isoflop.minutes is not None and isoflop.minutes <= 0:
        raise ValueError(f"`minutes` must be above 0, got {isoflop.minutes}.")
    corpus = read_corpus(isoflop.data, length=preset.longest)
    runs = Runs(preset, isoflop.recipe, corpus.fingerprint, Store(isoflop.out))
    for group in (*runs.searches, *runs.groups):  # before anything is written
        for run in group:
            check_budget(run)
    claim(isoflop.out, {**preset.settings(), **runs.settings()})
    until = None if isoflop.minutes is None else time.monotonic() + 60 * isoflop.minutes
    sweep = Sweep(runs, corpus, until)
    done = sum(runs.store.has(run) for group in runs.rated() or () for run in group)
    console.print(
        f"{runs.count} runs, {done} of them finished before, and {len(runs.searches)} sizes whose "
        "learning rate is searched.",
        highlight=False,
    )
    sweep.all_of(runs.searches, console)
    rated = runs.rated()
    if rated is not None:
        sweep.all_of(rated, console)
    report(isoflop.out, console)


class Sweep:
    """One of the commands that work on a store.

    **Arguments:**

    - `runs`: what is to be in the store.
    - `corpus`: the text.
    - `until`: when to begin no further run, by `time.monotonic`; `None` for never.
    """

    def __init__(self, runs: Runs, corpus: Corpus, until: float | None):
        self.runs = runs
        self.store = runs.store
        self.corpus = corpus
        self.until = until

    def all_of(self, groups: Sequence[Sequence[Run]], console: Console) -> None:
        """Every run that nobody has done, of groups that nobody holds; returns when all is over."""
        open_groups = [group for group in groups if not self._over(group)]
        with progress(console, len(open_groups)) as bars:
            while open_groups and not self._late():
                before = len(open_groups)
                for group in open_groups:
                    with _held(self.store.folder, group[0]) as mine:
                        if mine:
                            self._perform(group, bars, console)
                            # The programs of this size and arm are of no use any more.
                            jax.clear_caches()
                    if self._late():
                        return
                open_groups = [group for group in open_groups if not self._over(group)]
                if len(open_groups) == before:
                    time.sleep(1)  # others hold them

    def _over(self, group: Sequence[Run]) -> bool:
        return all(self.store.has(run) for run in group)

    def _late(self) -> bool:
        return self.until is not None and time.monotonic() > self.until

    def _perform(self, group: Sequence[Run], bars: Bars, console: Console) -> None:
        (arm,) = variants_named([group[0].arm])
        for run in group:
            if self.store.has(run) or self._late():
                continue
            began = time.perf_counter()
            title = f"{run.arm} {size_name(run.size)}"
            with bars.arm(title, check_budget(run)) as watch:
                try:
                    record = perform(run, arm, self.corpus, watch)
                except FloatingPointError as error:
                    self.store.fail(run, str(error))
                    console.print(f"{run.name}: {error}", style="red", highlight=False)
                    continue
            self.store.add(record)
            console.print(
                f"{title}, {run.budget:.3g} FLOPs, seed {run.seed}, rate "
                f"{run.recipe.learning_rate:g}: {record.end.bits_top_k:.4f} bits per byte, causal "
                f"{record.end.bits_causal:.4f}, {time.perf_counter() - began:.0f} s.",
                highlight=False,
            )


@contextlib.contextmanager
def _held(folder: Path, first: Run) -> Iterator[bool]:
    """Whether this process alone has the group that begins with a run, while the context lasts."""
    locks = folder / "locks"
    locks.mkdir(exist_ok=True)
    with open(locks / f"{first.name}.lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
        else:
            yield True  # the lock goes with the file, and with the process
