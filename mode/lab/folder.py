"""The folder of a run, and the settings that it belongs to, in its `config.json`."""

from collections.abc import Collection
from pathlib import Path

from .files import DamagedFile, R, Record, read_format, read_record, write_record
from .options import flatten


_NAME = "config.json"


def check_out(out: Path) -> None:
    """Checks that `out` can be the folder of a run; raises `ValueError` where it is a file."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"`out` must be a folder or not exist yet, got the file {out}.")


def claim(out: Path, settings: Record, *, besides: Collection[str] = ()) -> None:
    """Makes `out` the folder of a run with these settings, or checks that it already is.

    **Raises:** `ValueError` as `check_claim`.
    """
    check_claim(out, settings, besides=besides)
    out.mkdir(parents=True, exist_ok=True)
    if not (out / _NAME).exists():
        write_record(out / _NAME, settings)


def check_claim(out: Path, settings: Record, *, besides: Collection[str] = ()) -> None:
    """Checks that `out` belongs to a run with these settings, or to none. Writes nothing.

    **Raises:** `ValueError` where it belongs to another run, or is no folder.
    """
    check_out(out)
    if (out / _NAME).exists():
        check_same(out, read_settings(out, type(settings)), settings, besides=besides)


def check_same(out: Path, there: Record, settings: Record, *, besides: Collection[str]) -> None:
    """Checks that what `out` holds belongs to a run with these settings, but for some fields.

    **Raises:** `ValueError` with a line for each field that differs.
    """
    one, other = (flatten(record.model_dump(mode="json")) for record in (there, settings))
    lines = [
        f"  {name.removeprefix('options.')}: {one.get(name, 'absent')} there, {value} now"
        for name, value in other.items()
        if one.get(name, "absent") != value
        and name.removeprefix("options.").partition(".")[0] not in besides
    ]
    if lines:
        raise ValueError(
            f"`out` must be new or hold a run of the same configuration, got {out}, where\n"
            + "\n".join(sorted(lines))
            + "\nChoose another `--out`, or delete it."
        )


def read_settings(out: Path, kind: type[R]) -> R:
    """Reads the settings of the run in `out`; raises `ValueError` where none is of this kind."""
    there = settings_format(out)
    if there != kind.format:
        what = f"the folder belongs to {there!r}, not to {kind.format!r}"
        raise DamagedFile(out / _NAME, what, "Choose another folder.")
    return read_record(out / _NAME, kind)


def settings_format(out: Path) -> str:
    """The kind of the run in `out`, as `Record.format`; raises `ValueError` where there is none."""
    if not (out / _NAME).exists():
        raise ValueError(
            f"the folder of a run was expected, got {out}, which has no {_NAME}. "
            "`mode-lab ablate`, `train` and `isoflop` make one."
        )
    return read_format(out / _NAME)
