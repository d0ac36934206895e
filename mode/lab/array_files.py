"""Arrays in a folder of files, by Orbax: every process writes its own parts of them.

So no host ever holds all of a state, and any number of devices reads it. Orbax is imported where it
is used: reports read records alone.
"""

import contextlib
import glob
import hashlib
import logging
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import SingleDeviceSharding

from .files import DamagedFile


def save_arrays(path: Path, arrays: Mapping[str, Any]) -> dict[str, str]:
    """Writes named arrays to a new folder, and returns the digests of its files by their names.

    **Raises:** `OSError`, `ValueError` or `RuntimeError` where they cannot be written.
    """
    import orbax.checkpoint as ocp

    args = ocp.args.StandardSave(dict(arrays))  # pyright: ignore[reportCallIssue]
    handler = ocp.StandardCheckpointHandler()
    with _without_tracebacks(), _plain(path) as plain, ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(plain, args=args)
    return _digests(path, _files(path))


def restore_arrays(path: Path, like: Mapping[str, Any]) -> dict[str, Any]:
    """Reads named arrays with the shapes, dtypes and shardings of others."""
    import orbax.checkpoint as ocp

    target = {name: _placed(leaf) for name, leaf in like.items()}
    with _plain(path) as plain, ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
        return checkpointer.restore(plain, args=ocp.args.StandardRestore(target))


def _files(path: Path) -> list[str]:
    found = (file for file in path.rglob("*") if file.is_file())
    return sorted(file.relative_to(path).as_posix() for file in found)


def _digests(path: Path, files: list[str]) -> dict[str, str]:
    """The digests of the files of a checkpoint, of which each process reads a part."""
    digests = np.zeros((len(files), hashlib.sha256().digest_size), np.uint8)
    for number in range(jax.process_index(), len(files), jax.process_count()):
        try:
            with open(path / files[number], "rb") as file:
                digest = hashlib.file_digest(file, "sha256").digest()
        except OSError:
            continue  # missing or unreadable: zeros, which no file has
        digests[number] = np.frombuffer(digest, np.uint8)
    if jax.process_count() > 1:
        digests = multihost_utils.process_allgather(digests).sum(0, np.uint8)
    return {name: digest.tobytes().hex() for name, digest in zip(files, digests, strict=True)}


def check_files(path: Path, files: Mapping[str, str]) -> None:
    """Checks files against their digests; all processes call it.

    **Raises:** `DamagedFile`, which names the first that is not as it was written.
    """
    found = _digests(path, list(files))
    for name, digest in files.items():
        if found[name] != digest:
            what = "it is missing, cut, or was changed after it was written"
            raise DamagedFile(path / name, what, "")


def _placed(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = getattr(leaf, "sharding", None)
    if sharding is None:
        sharding = SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


@contextlib.contextmanager
def _plain(path: Path) -> Iterator[Path]:
    """Yields a path to the same place without characters of patterns, for which Orbax looks."""
    if glob.escape(str(path)) == str(path):
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        link = Path(folder) / "checkpoints"
        link.symlink_to(path.parent, target_is_directory=True)
        yield link / path.name


@contextlib.contextmanager
def _without_tracebacks() -> Iterator[None]:
    """Leaves out what the threads of Orbax print where a write fails: one error is raised."""
    logger, hook = logging.getLogger("absl"), sys.unraisablehook
    level = logger.level

    def without_closed_loops(unraisable: Any) -> None:
        if "Event loop is closed" not in str(unraisable.exc_value):
            hook(unraisable)

    logger.setLevel(logging.CRITICAL)
    sys.unraisablehook = without_closed_loops
    try:
        yield
        # After a failure it stays: writes that are under way end later.
        sys.unraisablehook = hook
    finally:
        logger.setLevel(level)
