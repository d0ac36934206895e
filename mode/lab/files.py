"""Files that are whole or absent, and the settings that a folder of results belongs to.

Every file is written beside its place and then moved there, which the system does at once or not at
all.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """`write` to a file beside `path`, then move it there. A partial file never has the name."""
    # Of this process alone: two commands that share a folder may end together.
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    write(beside)
    with open(beside, "rb") as file:
        os.fsync(file.fileno())
    os.replace(beside, path)


def write_text(path: Path, text: str) -> None:
    """A text file, whole or not at all."""
    write_atomically(path, lambda beside: beside.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    """A JSON file, whole or not at all."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def claim(out: Path, settings: dict[str, Any]) -> None:
    """Make `out` the folder of a run with these settings, or find that it already is.

    **Raises:** `ValueError` where it belongs to a run with others, or is no folder.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"`out` must be a folder or not exist yet, got the file {out}.")
    out.mkdir(parents=True, exist_ok=True)
    path = out / "config.json"
    if not path.exists():
        write_json(path, settings)
        return
    there, asked = _flat(read_settings(out)), _flat(settings)
    found = differences(there, asked, "asked for")
    if found:
        raise ValueError(
            f"`out` must be new or hold a run of the same configuration, got {out}, where\n"
            + "\n".join(found)
            + "\nChoose another `--out`, or delete it."
        )


def differences(there: dict[str, Any], wanted: dict[str, Any], how: str) -> list[str]:
    """A line for each name whose value is not the one that is wanted."""
    return [
        f"  {name}: {there.get(name, 'absent')} there, {wanted.get(name, 'absent')} {how}"
        for name in sorted(there.keys() | wanted.keys())
        if there.get(name, "absent") != wanted.get(name, "absent")
    ]


def read_settings(out: Path) -> dict[str, Any]:
    """The settings of the run in `out`.

    **Raises:** `ValueError` where there is no run.
    """
    try:
        return json.loads((out / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(
            f"the folder of a run was expected, got {out}, which has no config.json. "
            "`mode-lab ablate`, `train` and `isoflop` make one."
        ) from None
    except json.JSONDecodeError as error:
        raise ValueError(
            f"the folder of a run was expected, got {out}, whose config.json is not JSON "
            f"({error}). Choose another folder, or delete it."
        ) from None


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
