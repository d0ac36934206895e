"""`mode-lab train` over several devices and processes: the same run, its text read once."""

import dataclasses
import os
import socket
import subprocess
import sys
from pathlib import Path

import grain
import jax
import numpy as np
import pytest

from mode.lab import devices, run
from mode.lab.__main__ import main
from mode.lab.data import Sample, Sequences, batches, read_corpus
from mode.lab.devices import Devices
from mode.lab.files import read_record
from mode.lab.options import Size
from tests.lab.helpers import quiet, said


SIZE = Size(dim=16, depth=2, heads=2, length=32, batch=4, experts=4, noop=1)
STEPS = 8
ARM = "mode-integrated"
# The command itself, which also notes the sequences that it reads and of how many.
NOTING = """
import sys
from mode.lab import data
from mode.lab.__main__ import main

read = data.Sequences.__getitem__

def noted(self, index):
    with open(sys.argv[1], "a") as file:
        file.write(f"{len(self)} {index}\\n")
    return read(self, index)

data.Sequences.__getitem__ = noted
sys.exit(main(sys.argv[2:]))
"""


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("texts")
    rng = np.random.default_rng(0)
    for number in range(12):
        words = rng.choice(["one ", "three ", "seventeen ", "\n"], 150)
        (folder / f"{number}.txt").write_text("".join(words))
    return str(folder / "*.txt")


def training(out: Path, texts: str, where: Devices) -> run.Training:
    return run.Training(out, ARM, STEPS, texts, held_out=8, save_every=4, size=SIZE, devices=where)


def result(out: Path) -> run.TrainResult:
    return read_record(out / "result.json", run.TrainResult)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, texts: str) -> Path:
    """The run on one device of one process."""
    out = tmp_path_factory.mktemp("alone") / "run"
    run.run_training(training(out, texts, Devices()), quiet())
    return out


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def start(out: Path, texts: str, notes: Path, where: list[str]) -> subprocess.Popen[str]:
    flags = [
        *("--size.dim", "16", "--size.depth", "2", "--size.heads", "2", "--size.length", "32"),
        *("--size.batch", "4", "--size.experts", "4", "--size.noop", "1", "--steps", str(STEPS)),
        *("--held-out", "8", "--save-every", "4", "--arm", ARM, "--out", str(out)),
    ]
    command = [sys.executable, "-c", NOTING, str(notes), "train", "--data", texts, *flags, *where]
    # Compiled as quickly as here.
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    environment["XLA_FLAGS"] = "--xla_force_host_platform_device_count=1"
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )


def test_two_processes_train_what_one_does(alone: Path, tmp_path: Path, texts: str) -> None:
    """Experts on either process; then two devices of one go on from what was saved half way."""
    out, port = tmp_path / "run", free_port()
    notes = [tmp_path / f"{process}.notes" for process in range(2)]
    processes = [
        start(
            out,
            texts,
            notes[process],
            [
                *("--devices.data", "1", "--devices.expert", "2", "--devices.processes", "2"),
                *("--devices.process", str(process)),
                *("--devices.coordinator", f"localhost:{port}"),
            ],
        )
        for process in range(2)
    ]
    try:
        printed = [process.communicate()[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], printed
    assert "held out" in printed[0]
    assert "held out" not in printed[1]
    expected, both = result(alone), result(out)
    np.testing.assert_allclose(both.losses, expected.losses, rtol=1e-5)
    for name in ("bits_top_k", "bits_causal"):
        one, other = getattr(both.evaluation, name), getattr(expected.evaluation, name)
        assert one == pytest.approx(other, rel=1e-4)
    assert both.evaluation.bytes == expected.evaluation.bytes
    for one, other in zip(both.evaluation.routers, expected.evaluation.routers, strict=True):
        assert dataclasses.astuple(one) == pytest.approx(dataclasses.astuple(other), abs=1e-3)
    # Of the training text, each read half, and no sequence was read by both.
    corpus = read_corpus(texts, length=SIZE.length)
    whole = len(Sequences(corpus.train, SIZE.length))
    read = [
        [
            int(index)
            for of, index in map(str.split, note.read_text().splitlines())
            if int(of) == whole
        ]
        for note in notes
    ]
    assert whole > STEPS * SIZE.batch, "a test of one epoch"
    # (Behind them stand those of the calibration, of other batches.)
    read = [some[: STEPS * SIZE.batch // 2] for some in read]
    assert [len(some) for some in read] == [STEPS * SIZE.batch // 2] * 2
    assert len({*read[0], *read[1]}) == STEPS * SIZE.batch
    # Each process wrote its own parts of the arrays.
    checkpoint = out / "checkpoints" / str(STEPS)
    for process in range(2):
        parts = checkpoint / f"ocdbt.process_{process}" / "d"
        assert sum(path.stat().st_size for path in parts.iterdir()) > 1000
    # As if interrupted before the last save was finished.
    (out / "checkpoints" / f"{STEPS}.json").unlink()
    console = quiet()
    run.run_training(training(out, texts, Devices(data=2)), console)
    assert "goes on from step 4" in said(console)
    np.testing.assert_allclose(result(out).losses, expected.losses, rtol=1e-5)


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_the_parts_of_a_batch_are_the_batch(texts: str, parts: int) -> None:
    documents = read_corpus(texts, length=32).train

    def stream(**options: int) -> grain.DatasetIterator[Sample]:
        return batches(documents, length=32, batch=4, seed=5, **options)

    whole = stream()
    some = [stream(part=part, parts=parts) for part in range(parts)]
    for _ in range(70):  # beyond an epoch
        expected = next(whole)
        found = [next(part) for part in some]
        for name, rows in expected.items():
            assert np.array_equal(rows, np.concatenate([part[name] for part in found]))
    assert all(part.get_state() == whole.get_state() for part in some)


def test_every_device_holds_its_part_of_the_state(tmp_path: Path, texts: str) -> None:
    with devices.on(Devices(data=2, expert=2), batch=4) as mesh:
        like = run._like(training(tmp_path, texts, Devices()), mesh)
        leaves = [leaf for leaf in jax.tree.leaves(like) if hasattr(leaf, "sharding")]
        parts = [np.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in leaves]
        wholes = [leaf.size for leaf in leaves]
        # Matrices are divided over all four; vectors, routers and their state are whole.
        assert sum(parts) < 0.3 * sum(wholes)
    assert jax.sharding.get_abstract_mesh().empty


JOIN = """
import jax
from mode.lab import devices
from mode.lab.devices import Devices

with devices.on(Devices(data=2), batch=4) as mesh:
    print(jax.process_index(), jax.process_count(), mesh.size, devices.own_rows(4).start)
"""


def test_processes_of_slurm_find_each_other() -> None:
    """By the variables that `srun` sets, and no flag."""
    job = {"SLURM_JOB_ID": str(free_port() - (65535 - 2**12 + 1) + 2**14), "SLURM_NTASKS": "2"}
    step = {"SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_NUM_NODES": "1"}
    same = {**os.environ, **job, **step, "JAX_PLATFORMS": "cpu"}
    same["XLA_FLAGS"] = "--xla_force_host_platform_device_count=1"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", JOIN],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**same, "SLURM_PROCID": number, "SLURM_LOCALID": number},
        )
        for number in ("0", "1")
    ]
    try:
        printed = [process.communicate() for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [out.split() for out, _ in printed] == [["0", "2", "2", "0"], ["1", "2", "2", "2"]], (
        printed
    )


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, False),
        ({"SLURM_NTASKS": "8"}, False),  # an allocation, before `srun`
        ({"SLURM_NTASKS": "1", "SLURM_STEP_NODELIST": "a"}, False),
        ({"SLURM_NTASKS": "8", "SLURM_STEP_NODELIST": "a[1-8]"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
    ],
)
def test_a_launcher_is_known_by_what_it_leaves(
    variables: dict[str, str], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (
        "SLURM_NTASKS",
        "SLURM_STEP_NODELIST",
        "OMPI_COMM_WORLD_SIZE",
        "TPU_WORKER_HOSTNAMES",
    ):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert devices.in_cluster() is expected


def test_a_process_that_is_gone_is_told_plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "_join", lambda options: None)
    eight = Devices(data=8, processes=2, process=1, coordinator="localhost:1")
    lost = jax.errors.JaxRuntimeError("UNKNOWN: Gloo AllGather failed")
    with (
        pytest.raises(ConnectionError, match="process 1 failed or lost another: UNKNOWN: Gloo"),
        devices.on(eight, batch=8),
    ):
        raise lost
    with pytest.raises(jax.errors.JaxRuntimeError), devices.on(Devices(data=8), batch=8):
        raise lost


def test_what_devices_are_refused(
    tmp_path: Path, texts: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def refusal(*words: str) -> str:
        out = tmp_path / "new"
        sizes = ("--size.batch", "16", "--size.length", "32")
        assert main(["train", "--out", str(out), "--data", texts, *sizes, *words]) == 2
        assert not out.exists()
        return capsys.readouterr().err

    assert "`devices.data` must be at least 1, got 0" in refusal("--devices.data", "0")
    three = refusal("--devices.data", "3")
    assert "`batch` must divide over the 3 devices" in three
    assert "The next that does is 18" in three
    assert "at most the number of devices, 8 in 1 process" in refusal("--devices.data", "16")
    assert "--xla_force_host_platform_device_count" in refusal("--devices.data", "16")
    assert "`process` must be from 0 to 0" in refusal("--devices.process", "1")
    assert "`coordinator` must be given for 2 processes" in refusal("--devices.processes", "2")
    odd = ("--arm", ARM, "--size.experts", "3", "--size.noop", "2", "--devices.expert", "2")
    assert "must be divisible by the 2 devices along expert" in refusal(*odd)
