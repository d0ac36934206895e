"""What is read off an optimized program: exchanges between devices, and how often each happens."""

import dataclasses
import math
import re
from collections.abc import Iterator


@dataclasses.dataclass(frozen=True)
class Collective:
    """One exchange between devices.

    **Attributes:**

    - `kind`: `all-to-all`, `all-gather`, `all-reduce`, `reduce-scatter` or `collective-permute`.
    - `bytes`: of its result on one device, each time; of a `reduce-scatter` that TPU compilers
        write as an all-reduce of which a part is kept, of the whole.
    - `name`: the scope it comes from, as `jax.named_scope` and the layers' names say it.
    - `times`: how often it happens, where all loops around it count up to a constant of the
        program, as those of `jax.lax.scan` do; `None` where that cannot be told.
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
_SHAPE = re.compile(r"\b(pred|[a-z]+\d+)\w*\[([\d,]*)\]")
_BOUND = re.compile(r"%?(?P<name>[\w.\-]+) = s32\[\]\S* constant\((?P<value>\d+)\)")
_BELOW = re.compile(r"ROOT .* compare\(.*?%?[\w.\-]+, .*?%(?P<name>[\w.\-]+)\), direction=LT")


def collectives(text: str) -> list[Collective]:
    """All of them, in the order of the program.

    A compiler that overlaps an exchange with work writes its pieces down in several places, under
    one channel: they are one.
    """
    parts = dict(_computations(text))
    times = _times(parts)
    found, channels = [], set()
    for part, lines in parts.items():
        for line in lines:
            match = _COLLECTIVE.search(line)
            if match is None:
                continue
            channel = re.search(r"channel_id=(\d+)", match["rest"])
            if channel is not None and (match["kind"], channel[1]) in channels:
                continue
            if channel is not None:
                channels.add((match["kind"], channel[1]))
            sizes = [_bytes(kind, dims) for kind, dims in _SHAPE.findall(match["result"])]
            # What starts an exchange returns its operand with the result, the larger of the two.
            size = max(sizes, default=0) if match["start"] else sum(sizes)
            name = re.search(r'op_name="([^"]*)"', match["rest"])
            scattered = part.startswith("all-reduce-scatter")
            kind = "reduce-scatter" if scattered else match["kind"]
            found.append(Collective(kind, size, name[1] if name else "", times.get(part)))
    return found


def _computations(text: str) -> Iterator[tuple[str, list[str]]]:
    """Names and lines; what stands before any has none, and happens once."""
    name, lines = "", []
    for line in text.splitlines():
        head = _COMPUTATION.match(line)
        if head is None:
            lines.append(line)
            continue
        yield name, lines
        name, lines = "ENTRY" if head["entry"] else head["name"], []
    yield name, lines


def _times(parts: dict[str, list[str]]) -> dict[str, int | None]:
    """How often each computation runs, each branch of a condition as if it were always taken."""
    callers: dict[str, list[tuple[str, int | None]]] = {name: [] for name in parts}
    for caller, lines in parts.items():
        for line in lines:
            called = {
                found["how"]: re.findall(r"%([\w.\-]+)", found["names"])
                for found in _CALLED.finditer(line)
            }
            for how, names in called.items():
                turns = _turns(parts.get(called["condition"][0], [])) if how == "body" else 1
                for name in names:
                    if name in callers:
                        callers[name].append((caller, turns))
    known: dict[str, int | None] = {"": 1, "ENTRY": 1}

    def count(name: str) -> int | None:
        if name not in known:
            each = [(count(caller), turns) for caller, turns in callers[name]]
            whole = [runs * turns for runs, turns in each if runs is not None and turns is not None]
            known[name] = sum(whole) if each and len(whole) == len(each) else None
        return known[name]

    for name in parts:
        count(name)
    return known


def _turns(condition: list[str]) -> int | None:
    """The constant that a loop's counter stays below; JAX starts it from 0 and adds 1."""
    constants = {
        found["name"]: int(found["value"]) for line in condition if (found := _BOUND.search(line))
    }
    below = next((found for line in condition if (found := _BELOW.search(line))), None)
    return None if below is None else constants.get(below["name"])


def _bytes(kind: str, dims: str) -> int:
    bits = 8 if kind == "pred" else int(re.sub(r"\D", "", kind))
    return math.prod(int(dim) for dim in dims.split(",") if dim) * bits // 8
