"""The devices that a run is sharded over, and the processes that own them.

Every process runs the same program on the same numbers, over the devices of all. Two things differ:
the rows of a batch that a process reads, and that one of them, the lead, writes files and prints.
"""

import contextlib
import dataclasses
import os
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import equinox as eqx
import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, Sharding, SingleDeviceSharding
from jaxtyping import PyTree

import mode

from .options import Devices as Devices


_EIGHT = "XLA_FLAGS=--xla_force_host_platform_device_count=8"


@contextlib.contextmanager
def on(devices: Devices, *, batch: int) -> Iterator[Mesh | None]:
    """Joins the other processes, and sets a mesh over all devices while the context lasts.

    **Returns:** the mesh, with the axes `data` and `expert`; `None` for a single device.

    **Raises:** `ValueError` for devices that do not exist, or over which the `batch` of sequences
    does not divide; `ConnectionError` where one of several processes is gone.
    """
    if batch % devices.count:
        raise ValueError(
            f"`batch` must divide over the {devices.count} devices, `data` times `expert`, got "
            f"{batch}. The next that does is {batch + -batch % devices.count}."
        )
    if devices.coordinator is None and devices.processes == 1 and not devices.process:
        devices = dataclasses.replace(devices, coordinator="auto" if in_cluster() else None)
    several = devices.processes > 1 or devices.coordinator is not None
    if several or devices.process:
        _join(devices)
    present = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    if devices.count > len(present) or (several and devices.count != len(present)):
        eight = f" {_EIGHT} in the environment makes eight of a CPU."
        raise ValueError(
            f"`data` times `expert` must be {'' if several else 'at most '}the number of devices, "
            f"{len(present)} in {jax.process_count()} process(es), got {devices.data} times "
            f"{devices.expert}.{eight if jax.default_backend() == 'cpu' else ''}"
        )
    try:
        if devices.count == 1:
            yield None
        else:
            # In the order of the processes: the rows of a batch that one reads are neighbours.
            grid = np.array(present[: devices.count]).reshape(devices.data, devices.expert)
            mesh = Mesh(grid, ("data", "expert"), axis_types=(AxisType.Auto,) * 2)
            with jax.set_mesh(mesh):
                yield mesh
    except jax.errors.JaxRuntimeError as error:
        if not several:
            raise
        raise ConnectionError(
            f"process {devices.process} failed or lost another: {error}\nStart the same command "
            "again in all of them: the run goes on from its last checkpoint."
        ) from error
    if several:  # not after an error: the others may never come
        jax.distributed.shutdown()


def in_cluster() -> bool:
    """Whether a launcher started several of these processes, by the environment that it left."""
    numbers = {
        "SLURM_NTASKS": "SLURM_STEP_NODELIST",
        "OMPI_COMM_WORLD_SIZE": "OMPI_COMM_WORLD_RANK",
    }
    for name, of_step in numbers.items():
        # An allocation of Slurm, before `srun`, has a count and no step.
        count = os.environ.get(name, "")
        if count.isdigit() and int(count) > 1 and of_step in os.environ:
            return True
    return "," in os.environ.get("TPU_WORKER_HOSTNAMES", "")


def _join(devices: Devices) -> None:
    if devices.process >= devices.processes:
        raise ValueError(
            f"`process` must be from 0 to {devices.processes - 1}, as `processes` is "
            f"{devices.processes}, got {devices.process}."
        )
    if devices.coordinator is None:
        raise ValueError(
            f"`coordinator` must be given for {devices.processes} processes, as HOST:PORT of the "
            'first, such as "localhost:1234", or "auto".'
        )
    automatic = devices.coordinator == "auto"
    given: Any = () if automatic else (devices.coordinator, devices.processes, devices.process)
    try:
        jax.distributed.initialize(*given)
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"`coordinator` must be where process 0 can be reached, got {devices.coordinator!r}: "
            f"{error}"
        ) from error


def is_lead() -> bool:
    """Whether this process is the one that writes files and prints."""
    return jax.process_index() == 0


def device_names() -> str:
    """The devices of all processes, for people."""
    kinds = Counter(device.device_kind for device in jax.devices())
    return " and ".join(f"{count} x {kind}" for kind, count in kinds.items())


def by_lead(act: Callable[[], object]) -> None:
    """Lets the lead act while the others wait. All fail if it fails.

    **Raises:** what `act` raises; `ValueError` in the other processes.
    """
    failure = None
    if is_lead():
        try:
            act()
        except Exception as error:
            failure = error
    if on_any(failure is not None):
        raise failure or ValueError("process 0 could not go on; its own message says why.")


def on_any(flag: bool) -> bool:
    """Whether the flag is set in any process."""
    several = jax.process_count() > 1
    return bool(np.any(multihost_utils.process_allgather(np.array(flag)))) if several else flag


def own_rows(batch: int) -> slice:
    """The rows of a batch that this process reads."""
    rows, process = batch // jax.process_count(), jax.process_index()
    return slice(process * rows, (process + 1) * rows)


def feed(rows: PyTree, mesh: Mesh | None) -> PyTree:
    """Makes a batch, sharded over all devices, of the rows that each process has read."""
    if mesh is None:
        return rows

    def whole(x: np.ndarray) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((len(x) * jax.process_count(), *x.shape[1:]), x.dtype)

    shardings = mode.named_shardings(jax.tree.map(whole, rows), mesh, mode.BATCH_RULES)
    return jax.tree.map(jax.make_array_from_process_local_data, shardings, rows)


def with_shardings(tree: PyTree, mesh: Mesh | None) -> PyTree:
    """The shapes of a tree's arrays with their shardings: one device where there is no mesh."""
    shapes, rest = eqx.partition(tree, lambda leaf: hasattr(leaf, "dtype"))
    single = SingleDeviceSharding(jax.local_devices()[0])
    shardings = jax.tree.map(lambda _: single, shapes)
    if mesh is not None:
        shardings = mode.named_shardings(shapes, mesh)

    def placed(leaf: Any, sharding: Sharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return eqx.combine(jax.tree.map(placed, shapes, shardings), rest)


def in_place(tree: PyTree) -> PyTree:
    """Inside a program: shards its results as parameters are, where a mesh is set."""
    mesh = jax.sharding.get_abstract_mesh()
    return tree if mesh.empty else eqx.filter_shard(tree, mode.named_shardings(tree, mesh))


def to_host(tree: PyTree) -> PyTree:
    """Whole arrays for every process, wherever their parts are."""

    def fetch(x: Any) -> Any:
        if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
            return jax.device_get(x)
        return multihost_utils.process_allgather(x, tiled=True)

    return jax.tree.map(fetch, tree)
