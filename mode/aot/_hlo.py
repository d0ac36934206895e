"""Reads the collectives off an optimized program, and how often each of them runs."""

import dataclasses
import functools
import math
import re
from collections import defaultdict


@dataclasses.dataclass(frozen=True)
class Collective:
    """An exchange between devices.

    **Attributes:**

    - `kind`: `all-to-all`, `all-gather`, `all-reduce`, `reduce-scatter` or `collective-permute`.
    - `bytes`: size of its result on a device, each time it runs. Of a `reduce-scatter` that a TPU
        compiler writes as an all-reduce and a slice, this is the size before the slice.
    - `name`: the scope it comes from, by `jax.named_scope` and the names of the layers.
    - `times`: how often it runs, `None` if a loop around it does not count up to a constant of the
        program, as those of `jax.lax.scan` do.
    """

    kind: str
    bytes: int
    name: str
    times: int | None = 1


_COMPUTATION = re.compile(r"(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) \(.*\{$")
_CALLED = re.compile(r"(?P<how>\w+)=\{?(?P<names>%[\w.\-]+(?:, %[\w.\-]+)*)")
_COLLECTIVE = re.compile(
    r"= (?P<result>\(.*?\)|\S+) "
    r"(?P<kind>all-to-all|all-gather|all-reduce|reduce-scatter|collective-permute)"
    r"(?P<start>-start)?\((?P<rest>.*)"
)
_CHANNEL = re.compile(r"channel_id=(\d+)")
_NAME = re.compile(r'op_name="([^"]*)"')
_SHAPE = re.compile(r"\b(pred|[a-z]+\d+)\w*\[([\d,]*)\]")
# What XLA found out about a loop; compilers that do not say it leave the condition to be read.
_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_BOUND = re.compile(r"%?(?P<name>[\w.\-]+) = s32\[\]\S* constant\((?P<value>\d+)\)")
_BELOW = re.compile(r"ROOT .* compare\(.*?%?[\w.\-]+, .*?%(?P<name>[\w.\-]+)\), direction=LT")


def parse_collectives(text: str) -> list[Collective]:
    """Returns the collectives of a program, in its order.

    An asynchronous collective is printed in several parts with one channel id; it counts once.
    """
    # Lines before the first computation have the name "", and run once.
    lines: list[str] = []
    computations = {"": lines}
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            lines = computations.setdefault("ENTRY" if head["entry"] else head["name"], [])
        else:
            lines.append(line)
    times = _times(computations)
    collectives: dict[object, Collective] = {}
    for computation, lines in computations.items():
        scattered = computation.startswith("all-reduce-scatter")
        for match in filter(None, map(_COLLECTIVE.search, lines)):
            sizes = [_bytes(dtype, shape) for dtype, shape in _SHAPE.findall(match["result"])]
            # The start of an exchange returns its operand with the result, the larger of the two.
            size = max(sizes, default=0) if match["start"] else sum(sizes)
            kind = "reduce-scatter" if scattered else match["kind"]
            name, channel = _NAME.search(match["rest"]), _CHANNEL.search(match["rest"])
            collective = Collective(kind, size, name[1] if name else "", times[computation])
            # Without a channel, each is another.
            key = (match["kind"], channel[1]) if channel else match
            collectives.setdefault(key, collective)
    return list(collectives.values())


def _times(computations: dict[str, list[str]]) -> dict[str, int | None]:
    """Counts how often each computation runs, as if every branch of a condition ran."""
    callers: defaultdict[str, list[tuple[str, int | None]]] = defaultdict(list)
    for caller, lines in computations.items():
        for line in lines:
            called = {how: names[1:].split(", %") for how, names in _CALLED.findall(line)}
            for how, names in called.items():
                repeats = 1
                if how == "body":
                    known = _TRIP_COUNT.search(line)
                    condition = computations[called["condition"][0]]
                    repeats = int(known[1]) if known else _loop_length(condition)
                for name in names:
                    callers[name].append((caller, repeats))

    @functools.cache
    def count(name: str) -> int | None:
        if name in ("", "ENTRY"):
            return 1
        calls = [(count(caller), repeats) for caller, repeats in callers[name]]
        runs = [m * n for m, n in calls if m is not None and n is not None]
        return sum(runs) if calls and len(runs) == len(calls) else None

    return {name: count(name) for name in computations}


def _loop_length(condition: list[str]) -> int | None:
    """Returns the constant that a loop's counter stays below; JAX starts it from 0 and adds 1."""
    bounds = filter(None, map(_BOUND.search, condition))
    constants = {match["name"]: int(match["value"]) for match in bounds}
    below = next(filter(None, map(_BELOW.search, condition)), None)
    return None if below is None else constants.get(below["name"])


def _bytes(dtype: str, shape: str) -> int:
    bits = 8 if dtype == "pred" else int(re.sub(r"\D", "", dtype))
    return math.prod(int(size) for size in shape.split(",") if size) * bits // 8
