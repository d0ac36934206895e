"""The runs that a preset stands for, and the learning rate of each."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from ..arms import Size
from ..step import Recipe
from .grids import Preset
from .records import SEARCH_SEED, Run, Store, size_name


class Runs:
    """All runs of a preset over one text, in groups that share their programs.

    Every arm of a size is trained at the learning rate that was best for the dense one: no arm but
    the baseline is tuned.

    **Arguments:**

    - `preset`: what to compare.
    - `recipe`: of all runs, but for the rate.
    - `corpus`: the fingerprint of the text.
    - `store`: where their records are.
    """

    def __init__(self, preset: Preset, recipe: Recipe, corpus: str, store: Store):
        self.preset = preset
        self.recipe = recipe
        self.corpus = corpus
        self.store = store
        self.groups = self._unrated()
        self.searches = []
        if len(preset.rates) > 1:
            sizes = {size_name(group[0].size): group[0].size for group in self.groups}
            self.searches = [list(self._candidates(size)) for size in sizes.values()]

    @property
    def count(self) -> int:
        """Of runs, those of the search left out."""
        return sum(map(len, self.groups))

    def settings(self) -> dict[str, Any]:
        """What all records of a folder share, beside the preset's."""
        return {"recipe": dataclasses.asdict(self.recipe), "corpus": self.corpus}

    def rated(self) -> list[list[Run]] | None:
        """The groups, each at the rate of its size; `None` while a search is not over.

        **Raises:** `ValueError` where no candidate of a size gave a result.
        """
        if not all(self.store.has(run) for group in self.searches for run in group):
            return None
        rates = {size_name(group[0].size): self._best(group[0].size) for group in self.groups}
        return [[_at(run, rates[size_name(run.size)]) for run in group] for group in self.groups]

    def _best(self, size: Size) -> float:
        if not self.searches:
            return self.preset.rates[0]
        found = [record for run in self._candidates(size) if (record := self.store.get(run))]
        if not found:
            raise ValueError(
                f"`rates` must hold one at which the dense arm of {size_name(size)} trains, but "
                "none gave a finite loss. Give lower ones."
            )
        return min(found, key=lambda record: record.end.bits_causal).run.recipe.learning_rate

    def _candidates(self, size: Size) -> Iterator[Run]:
        """The dense arm at the reference's length and batch, at each rate."""
        reference = self.preset.reference
        plain = dataclasses.replace(reference, dim=size.dim, depth=size.depth, heads=size.heads)
        run = self._run("dense", plain, self.preset.search_budget, SEARCH_SEED)
        return (_at(run, rate) for rate in self.preset.rates)

    def _unrated(self) -> list[list[Run]]:
        found: dict[tuple[str, Size], list[Run]] = {}
        for grid in self.preset.grids:
            for arm, size in grid.groups():
                runs = found.setdefault((arm.name, size), [])
                for budget in grid.budgets:
                    runs += [self._run(arm.name, size, budget, seed) for seed in range(grid.seeds)]
        return [list(dict.fromkeys(runs)) for runs in found.values()]

    def _run(self, arm: str, size: Size, budget: float, seed: int) -> Run:
        held_out = self.preset.held_out
        return Run(arm, size, self.recipe, float(budget), seed, held_out, self.corpus)


def _at(run: Run, rate: float) -> Run:
    recipe = dataclasses.replace(run.recipe, learning_rate=rate)
    return dataclasses.replace(run, recipe=recipe)
