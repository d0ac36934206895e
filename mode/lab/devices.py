"""The devices a run is spread over, and the processes that hold them.

Every process runs the same program on the same numbers; JAX makes one device set of all theirs.
What differs is said here: which rows of a batch a process reads, and that one of them, the lead,
writes and speaks for all.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import equinox as eqx
import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, SingleDeviceSharding
from jaxtyping import PyTree

import mode


_MORE = (
    " XLA_FLAGS=--xla_force_host_platform_device_count=8 in the environment makes eight of a CPU."
)


@dataclasses.dataclass(frozen=True)
class Devices:
    """What to train on. None of it changes what is trained, but for rounding: a run goes on over
    other devices than it began with."""

    data: int = 1
    """Devices that batch and parameters are divided over. A CPU counts as one; with
    XLA_FLAGS=--xla_force_host_platform_device_count=8 in the environment, as eight."""
    expert: int = 1
    """Devices that the experts are divided over, each `data` times; so is the batch."""
    processes: int = 1
    """How many processes there are, each started with this command and its own number. They read
    the same files and write to the same folder."""
    process: int = 0
    """The number of this one, from 0."""
    coordinator: str | None = None
    """HOST:PORT at which process 0 can be reached by the others. "auto" asks the cluster for it and
    for the two numbers above: Slurm, Open MPI, a TPU pod, Kubernetes."""

    @property
    def count(self) -> int:
        """Of devices."""
        return self.data * self.expert


@contextlib.contextmanager
def on(devices: Devices, *, batch: int) -> Iterator[Mesh | None]:
    """Join the other processes, and set a mesh over all devices while the context lasts.

    **Arguments:**

    - `batch`: sequences in one step, which are divided over all devices.

    **Returns:** the mesh, of axes `data` and `expert`; `None` for a single device, on which nothing
    is divided.

    **Raises:** `ValueError` for devices that there are not, or that the batch does not divide over;
    `ConnectionError` where one of several processes is gone.
    """
    _check(devices, batch)
    several = devices.processes > 1 or devices.coordinator is not None
    if several:
        _join(devices)
    found = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    if devices.count > len(found) or (several and devices.count != len(found)):
        raise ValueError(
            f"`data` times `expert` must be {'' if several else 'at most '}the number of devices, "
            f"{len(found)} in {jax.process_count()} process(es), got {devices.data} times "
            f"{devices.expert}.{_MORE if jax.default_backend() == 'cpu' else ''}"
        )
    try:
        if devices.count == 1:
            yield None
        else:
            # In the order of the processes: the rows of a batch that one has are neighbours.
            grid = np.array(found[: devices.count]).reshape(devices.data, devices.expert)
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


def _check(devices: Devices, batch: int) -> None:
    for name in ("data", "expert", "processes"):
        if getattr(devices, name) < 1:
            raise ValueError(f"`{name}` must be at least 1, got {getattr(devices, name)}.")
    if batch % devices.count:
        raise ValueError(
            f"`batch` must divide over the {devices.count} devices, `data` times `expert`, got "
            f"{batch}. The next that does is {batch + -batch % devices.count}."
        )
    if not 0 <= devices.process < devices.processes:
        raise ValueError(
            f"`process` must be from 0 to {devices.processes - 1}, as `processes` is "
            f"{devices.processes}, got {devices.process}."
        )
    if devices.processes > 1 and devices.coordinator is None:
        raise ValueError(
            f"`coordinator` must be given for {devices.processes} processes, as HOST:PORT of the "
            'first, such as "localhost:1234", or "auto".'
        )


def _join(devices: Devices) -> None:
    given = {}
    if devices.coordinator != "auto":
        given = {
            "coordinator_address": devices.coordinator,
            "num_processes": devices.processes,
            "process_id": devices.process,
        }
    try:
        jax.distributed.initialize(**given)
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"`coordinator` must be where process 0 can be reached, got {devices.coordinator!r}: "
            f"{error}"
        ) from error


def leads() -> bool:
    """Whether this process is the one that writes and speaks."""
    return jax.process_index() == 0


def by_lead(act: Callable[[], int | None]) -> int | None:
    """Let the lead act while the others wait: all get the number it found, and fail where it does.

    **Raises:** what `act` raises; `ValueError` in the processes that do not lead.
    """
    if jax.process_count() == 1:
        return act()
    found, failed = None, None
    if leads():
        try:
            found = act()
        except Exception as error:
            failed = error
    told = np.array([failed is not None, found is not None, found or 0])
    failing, there, number = multihost_utils.broadcast_one_to_all(told).tolist()
    if failed is not None:
        raise failed
    if failing:
        raise ValueError("process 0 could not go on; what it met is said there.")
    return number if there else None


def own_rows(batch: int) -> slice:
    """The rows of a batch that this process reads."""
    share = batch // jax.process_count()
    return slice(jax.process_index() * share, (jax.process_index() + 1) * share)


def feed(rows: PyTree, mesh: Mesh | None) -> PyTree:
    """A batch, divided over all devices, of which this process has read its own rows."""
    if mesh is None:
        return rows

    def whole(x: np.ndarray) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((len(x) * jax.process_count(), *x.shape[1:]), x.dtype)

    where = mode.placement(jax.tree.map(whole, rows), mesh, mode.BATCH)
    return jax.tree.map(
        lambda x, sharding: jax.make_array_from_process_local_data(sharding, x), rows, where
    )


def laid_out(tree: PyTree, mesh: Mesh | None) -> PyTree:
    """The shapes of a tree's arrays, and where on the mesh they lie: on the one device without."""
    shapes, rest = eqx.partition(tree, lambda leaf: hasattr(leaf, "dtype"))
    here = SingleDeviceSharding(jax.local_devices()[0])
    where = jax.tree.map(lambda _: here, shapes) if mesh is None else mode.placement(shapes, mesh)
    shapes = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        where,
    )
    return eqx.combine(shapes, rest)


def in_place(tree: PyTree) -> PyTree:
    """Inside a program: its results lie on the devices where `mode.placement` has them."""
    mesh = jax.sharding.get_abstract_mesh()
    return tree if mesh.empty else eqx.filter_shard(tree, mode.placement(tree, mesh))


def to_host(tree: PyTree) -> PyTree:
    """Whole arrays for every process, wherever their parts are."""

    def fetch(x: Any) -> Any:
        if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
            return jax.device_get(x)
        return multihost_utils.process_allgather(x, tiled=True)

    return jax.tree.map(fetch, tree)
