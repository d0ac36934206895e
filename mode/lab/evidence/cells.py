"""Records by what they were run for: an arm at a size and a budget, seed by seed."""

import dataclasses
from collections.abc import Callable, Iterable

from ..arms import Size
from .records import SEARCH_SEED, Record
from .statistics import Spread


# An arm and a size; budgets and seeds are what runs of two cells are paired over.
Cell = tuple[str, Size]
Value = Callable[[Record], float]


def causal(record: Record) -> float:
    """Held-out loss as a sampler gets it."""
    return record.end.bits_causal


def top_k(record: Record) -> float:
    """Held-out loss under the training selection."""
    return record.end.bits_top_k


def gap_per_cent(record: Record) -> float:
    """How much higher the causal loss is than that under top-k, of which it is a share."""
    return 100 * (causal(record) / top_k(record) - 1)


class Cells:
    """What a store holds, the search of learning rates left out.

    **Arguments:**

    - `records`: of the store.
    - `reference`: the size at which arms are compared.
    """

    def __init__(self, records: Iterable[Record], reference: Size):
        self.reference = reference
        self._found: dict[Cell, dict[tuple[float, int], Record]] = {}
        for record in records:
            run = record.run
            if run.seed < SEARCH_SEED:
                cell = self._found.setdefault((run.arm, run.size), {})
                cell[run.budget, run.seed] = record

    def at(self, arm: str, size: Size | None = None) -> dict[tuple[float, int], Record]:
        """Records of an arm by budget and seed, at a size, by default the reference."""
        return self._found.get((arm, self.reference if size is None else size), {})

    def sizes(self, arm: str, **varied: object) -> list[Size]:
        """At which an arm was run, of those that differ from the reference in the fields named.

        **Arguments:**

        - `varied`: by field, anything: their values there are ignored.
        """
        found = []
        for name, size in self._found:
            fields = {field: getattr(size, field) for field in varied}
            if name == arm and size == dataclasses.replace(self.reference, **fields):
                found.append(size)
        return found

    def paired(
        self,
        one: Cell,
        other: Cell,
        value: Value = causal,
        *,
        budget: float | None = None,
        per_cent: bool = False,
    ) -> Spread | None:
        """`other` less `one`, of the same budget and seed; `None` where they share none.

        **Arguments:**

        - `value`: what is compared.
        - `budget`: of this one alone; by default of all.
        - `per_cent`: as a share of `one`.
        """
        first, second = self.at(*one), self.at(*other)
        differences = []
        for place in sorted(first.keys() & second.keys()):
            if budget is None or place[0] == budget:
                base = value(first[place])
                difference = value(second[place]) - base
                differences.append(100 * difference / base if per_cent else difference)
        return Spread.of(differences) if differences else None

    def within(self, cell: Cell, value: Value, *, budget: float | None = None) -> Spread | None:
        """A value of the runs of a cell; `None` where there are none."""
        found = [
            value(record)
            for (spent, _), record in sorted(self.at(*cell).items())
            if budget is None or spent == budget
        ]
        return Spread.of(found) if found else None

    @property
    def budgets(self) -> list[float]:
        """At the reference."""
        found = {
            budget
            for (_, size), cell in self._found.items()
            if size == self.reference
            for budget, _ in cell
        }
        return sorted(found)
