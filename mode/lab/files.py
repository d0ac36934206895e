"""Files that are whole or absent, and records that are checked when they are read back.

A file is written beside its place and moved there, which the system does at once or not at all. A
record holds its format, its version and a digest of its content: what is read back is what was
written, or a `DamagedFile` error says which file is wrong, how, and what to do.
"""

import contextlib
import hashlib
import json
import math
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, BinaryIO, ClassVar, TypeVar

import filelock
import pydantic


class DamagedFile(ValueError):
    """A file that is missing or not as it was written: what is wrong, and what to do."""

    def __init__(self, path: Path, what: str, remedy: str):
        super().__init__(" ".join(f"{path}: {what}. {remedy}".splitlines()))
        self.path = path
        self.what = what


# A number that may be undefined or infinite: `null` in the file, NaN when it is read back.
FloatOrNaN = Annotated[
    float,
    pydantic.AllowInfNan(True),
    pydantic.BeforeValidator(lambda value: math.nan if value is None else value),
    pydantic.PlainSerializer(
        lambda value: value if math.isfinite(value) else None, return_type=float | None
    ),
]


class Strict(pydantic.BaseModel):
    """A part of a record. Types are strict; every field must be in the file, and no other.

    A float must be finite unless its type is `FloatOrNaN`.
    """

    model_config = pydantic.ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=()
    )


class Record(Strict):
    """The content of a file. `format` names its kind; raise `version` where a field changes;
    `remedy` says what to do where the file is damaged."""

    format: ClassVar[str]
    version: ClassVar[int]
    remedy: ClassVar[str] = "Delete it, and run the command that made it again."


R = TypeVar("R", bound=Record)


class _Envelope(Strict):
    format: str
    version: int
    digest: str
    content: dict[str, Any]


def write_record(path: Path, record: Record) -> None:
    """Writes a record as JSON, whole or not at all, as `write_stream` does."""
    content = record.model_dump(mode="json")
    head = {"format": record.format, "version": record.version, "digest": content_digest(content)}
    envelope = head | {"content": content}
    text = json.dumps(envelope, indent=1, ensure_ascii=False, allow_nan=False)
    write_text(path, text + "\n")


def read_record(path: Path, kind: type[R]) -> R:
    """Reads a record and checks that it is as it was written.

    **Raises:** `DamagedFile` where it is not, or not of this kind and version.
    """
    envelope = _read_envelope(path, kind.remedy)

    def damaged(what: str, remedy: str = kind.remedy) -> DamagedFile:
        return DamagedFile(path, what, remedy)

    if envelope.format != kind.format:
        raise damaged(f"its format is {envelope.format!r}, not {kind.format!r}")
    if envelope.version != kind.version:
        age = "A newer" if envelope.version > kind.version else "An older"
        remedy = f"{age} mode-lab wrote it: use that one, or another folder."
        raise damaged(f"its version is {envelope.version}, not {kind.version}", remedy)
    try:
        record = kind.model_validate_json(json.dumps(envelope.content))
    except pydantic.ValidationError as error:
        raise damaged(_first_error(error)) from None
    except (ValueError, RecursionError) as error:
        raise damaged(str(error)) from None
    if record.model_dump(mode="json") != envelope.content:
        raise damaged("a field is missing")  # one that has a default
    if envelope.digest != content_digest(envelope.content):
        raise damaged("its content was changed after it was written (the digest differs)")
    return record


def read_format(path: Path) -> str:
    """Reads the format of the record in a file; raises `DamagedFile` where it is no record."""
    return _read_envelope(path, Record.remedy).format


def _read_envelope(path: Path, remedy: str) -> _Envelope:
    content = read_bytes(path, remedy)
    try:
        return _Envelope.model_validate(json.loads(content.decode("utf-8")))
    except UnicodeDecodeError:
        what = "it is not text in UTF-8"
    except pydantic.ValidationError:
        what = "it is JSON, but not a record of mode-lab"
    except (ValueError, RecursionError) as error:
        what = f"it is not JSON ({error})" if content.strip() else "it is empty"
    raise DamagedFile(path, what, remedy)


def content_digest(content: Any) -> str:
    """The SHA-256 digest of JSON content, whatever the order of its keys."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def read_bytes(path: Path, remedy: str) -> bytes:
    """Reads a file.

    **Raises:** `DamagedFile`, with the `remedy`, where it is missing, unreadable or no file.
    """
    try:
        if path.exists() and not path.is_file():
            raise DamagedFile(path, "it is a folder or a device, not a file", remedy)
        return path.read_bytes()
    except FileNotFoundError:
        raise DamagedFile(path, "there is no such file", remedy) from None
    except OSError as error:
        raise DamagedFile(path, f"it cannot be read ({error.strerror})", remedy) from None


def write_text(path: Path, text: str) -> None:
    """Writes a text file in UTF-8, whole or not at all."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file, whole or not at all."""
    write_stream(path, lambda file: file.write(content))


def write_stream(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Writes a file by a function of the open file, whole or not at all.

    **Raises:** `OSError`, which names the file, where it cannot be written.
    """
    beside = path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}.part")
    try:
        _remove_stale(path)
        with open(beside, "w+b") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        raise OSError(f"{path}: it cannot be written ({error.strerror or error}).") from error
    finally:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)


def _remove_stale(path: Path) -> None:
    """Removes temporary files of `path` that a killed process of this machine left behind."""
    ours = f".{path.name}.{socket.gethostname()}-"
    for beside in path.parent.iterdir() if os.name == "posix" else ():
        process = beside.name.removeprefix(ours).removesuffix(".part")
        if beside.name.startswith(ours) and process.isdecimal():
            try:
                os.kill(int(process), 0)
            except ProcessLookupError:
                beside.unlink(missing_ok=True)
            except (PermissionError, OverflowError):
                continue  # alive, or no process


@contextlib.contextmanager
def lock(path: Path) -> Iterator[bool]:
    """Holds a lock file while the context lasts; a process that dies lets go of it.

    **Returns:** whether this process holds the lock: not where another one does. The file
    stays behind, empty.
    """
    try:
        with filelock.FileLock(path).acquire(timeout=0):
            yield True
    except filelock.Timeout:
        yield False


def _first_error(error: pydantic.ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    field = ".".join(map(str, first["loc"])) or "content"
    if first["type"] == "missing":
        return f"field `{field}` is missing"
    message = first["msg"][:1].lower() + first["msg"][1:]
    return f"field `{field}`: {message}, got {str(first['input'])[:40]!r}"
