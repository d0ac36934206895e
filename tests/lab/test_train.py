"""`mode-lab train` and `generate`: runs that survive, and text from what they leave behind."""

import dataclasses
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from mode.lab import checkpoint, run
from mode.lab.__main__ import main
from mode.lab.files import DamagedFile, read_record
from mode.lab.folder import read_settings
from tests.lab.helpers import quiet, said
from tests.lab.runs import FLAGS, STEPS, losses, saved, training


pytestmark = pytest.mark.optimized


def test_a_killed_run_goes_on_bit_for_bit(whole: Path, tmp_path: Path, texts: str) -> None:
    """Killed under top-k and in the last fifth, which trains under the rule."""
    out = tmp_path / "run"
    command = [sys.executable, "-m", "mode.lab", "train", "--out", str(out), "--data", texts]
    cache = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled")}
    cache |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    for after in (7, 21):
        process = subprocess.Popen(
            [*command, *FLAGS],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, **cache},
        )
        try:
            while not (out / "checkpoints" / f"{after}.json").exists():
                assert process.poll() is None, "it ended before it could be killed"
                time.sleep(0.01)
            os.kill(process.pid, signal.SIGKILL)
        finally:
            process.kill()
            process.wait()
    console = quiet()
    run.run_training(training(out, texts), console)
    assert "goes on from step" in said(console)
    assert losses(out) == losses(whole)
    for one, other in zip(jax.tree.leaves(saved(out)), jax.tree.leaves(saved(whole)), strict=True):
        assert np.array_equal(one, other)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_after_a_save(
    number: int,
    tmp_path: Path,
    texts: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    looks = []

    def on_any(flag: bool) -> bool:
        looks.append(flag)
        if len(looks) == 2:
            os.kill(os.getpid(), number)
        return flag

    monkeypatch.setattr("mode.lab.train.on_any", on_any)
    flags = [*FLAGS[: -len(("--save-every", "7"))], "--save-every", "100"]
    command = ["train", "--out", str(tmp_path / "run"), "--data", texts, *flags]
    assert main(command) == 128 + number
    assert "The same command goes on from the last checkpoint" in capsys.readouterr().err
    assert run.load_run(tmp_path / "run", quiet()).steps < STEPS
    assert main(command) == 0
    assert "goes on from step" in capsys.readouterr().out


def test_a_finished_run_is_not_trained_again(whole: Path, texts: str) -> None:
    before = losses(whole)
    console = quiet()
    run.run_training(training(whole, texts), console)
    assert f"goes on from step {STEPS}" in said(console)
    assert losses(whole) == before


def test_only_the_newest_checkpoints_are_kept(whole: Path) -> None:
    steps = checkpoint.Checkpoints(whole / "checkpoints", 3).steps
    assert steps == [14, 21, 25]


def test_a_run_of_another_configuration_is_refused(whole: Path, texts: str) -> None:
    with pytest.raises(ValueError, match=r"same configuration.*\n.*arm: mod there, dense now"):
        run.run_training(training(whole, texts, arm="dense"), quiet())


@pytest.fixture(scope="module")
def settings(whole: Path) -> checkpoint.TrainSettings:
    return read_settings(whole, checkpoint.TrainSettings)


TREE = {
    "a": jnp.arange(6.0).reshape(2, 3),
    "b": jnp.arange(3) > 1,
    "c": jnp.arange(5, dtype=jnp.bfloat16) / 7,
    "name": "not an array",
}


def fill_store(
    folder: Path, settings: checkpoint.TrainSettings, steps: tuple[int, ...] = (1, 2)
) -> checkpoint.Checkpoints:
    checkpoints = checkpoint.Checkpoints(folder, keep=3)
    for step in steps:
        tree = {**TREE, "a": jnp.arange(6.0).reshape(2, 3) + step}
        notes = checkpoint.Notes(settings=settings, stream={"at": step}, losses=(1.0, math.nan))
        checkpoints.save(step, tree, notes)
    return checkpoints


def array_files(folder: Path) -> list[Path]:
    """The files of a checkpoint's arrays."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_a_checkpoint_holds_what_was_saved(
    tmp_path: Path, settings: checkpoint.TrainSettings
) -> None:
    like = {**TREE, "a": jax.ShapeDtypeStruct((2, 3), jnp.float32)}
    restored = fill_store(tmp_path, settings).newest(like, pytest.fail)
    assert restored is not None
    step, tree, notes = restored
    assert (step, notes.stream, notes.settings) == (2, {"at": 2}, settings)
    assert notes.losses[0] == 1
    assert math.isnan(notes.losses[1])
    assert (tree["a"] == jnp.arange(6.0).reshape(2, 3) + 2).all()
    for name in ("b", "c"):
        assert tree[name].dtype == TREE[name].dtype
        assert (tree[name] == TREE[name]).all()
    assert tree["name"] == TREE["name"]


@pytest.mark.parametrize("harm", ["cut", "emptied", "turned"])
@pytest.mark.parametrize("which", ["the record", "the first file", "the largest file"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    tmp_path: Path, settings: checkpoint.TrainSettings, harm: str, which: str
) -> None:
    """The record or a file of arrays, cut off or with one bit turned."""
    checkpoints = fill_store(tmp_path, settings)
    files = array_files(tmp_path / "2")
    largest = max(files, key=lambda path: path.stat().st_size)
    path = {"the record": tmp_path / "2.json", "the first file": files[0]}.get(which, largest)
    content = bytearray(path.read_bytes())
    if harm == "turned":
        content[len(content) // 2] ^= 1
    path.write_bytes(content if harm == "turned" else content[: len(content) // 2])
    if harm == "emptied":
        path.write_bytes(b"")
    warnings: list[str] = []
    restored = checkpoints.newest(TREE, warnings.append)
    assert restored is not None
    assert restored[0] == 1
    assert (restored[1]["a"] == jnp.arange(6.0).reshape(2, 3) + 1).all()
    assert len(warnings) == 1
    assert f"a checkpoint is not used: {path}: " in warnings[0]
    # A run that goes on from there leaves nothing of the damaged one.
    fill_store(tmp_path, settings, steps=(2,))
    assert checkpoints.steps == [1, 2]
    assert checkpoints.newest(TREE, pytest.fail) is not None


def test_a_damaged_checkpoint_goes_with_the_next_save(
    tmp_path: Path, settings: checkpoint.TrainSettings
) -> None:
    checkpoints = fill_store(tmp_path, settings, steps=(1, 9))
    array_files(tmp_path / "9")[0].write_bytes(b"")
    fill_store(tmp_path, settings, steps=(5,))
    assert {path.name for path in tmp_path.iterdir()} == {"1", "1.json", "5", "5.json"}
    assert checkpoints.steps == [1, 5]


def test_without_a_sound_checkpoint_nothing_begins_anew(
    tmp_path: Path, settings: checkpoint.TrainSettings
) -> None:
    checkpoints = fill_store(tmp_path, settings, steps=(1,))
    array_files(tmp_path / "1")[-1].unlink()
    for _ in range(2):
        with pytest.raises(DamagedFile, match=r"no checkpoint is sound \(1/.*: it is missing"):
            checkpoints.newest(TREE, lambda text: None)


def test_a_save_that_was_killed_is_no_checkpoint(
    tmp_path: Path, settings: checkpoint.TrainSettings
) -> None:
    """At its very end, when all but the record is written."""
    checkpoints = fill_store(tmp_path, settings, steps=(1,))
    (tmp_path / "1.json").unlink()
    assert checkpoints.newest(TREE, pytest.fail) is None
    fill_store(tmp_path, settings, steps=(1,))
    assert checkpoints.newest(TREE, pytest.fail) is not None


def test_a_full_disk_loses_nothing_that_was_saved(
    tmp_path: Path, settings: checkpoint.TrainSettings
) -> None:
    """No file may grow beyond some kilobytes while the second checkpoint is saved."""
    checkpoints = fill_store(tmp_path, settings, steps=(1,))
    large = {**TREE, "d": jax.random.normal(jax.random.key(0), (1 << 16,))}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 14, hard))
    try:
        with pytest.raises(
            OSError, match=r"step 2 could not be saved in .*: .*The one of step 1 is whole"
        ):
            checkpoints.save(2, large, checkpoint.Notes(settings=settings, stream={}, losses=()))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    restored = checkpoint.Checkpoints(tmp_path, keep=3).newest(TREE, pytest.fail)
    assert restored is not None
    assert restored[0] == 1
    assert len(list(tmp_path.iterdir())) == 2


def test_a_checkpoint_goes_onto_another_mesh(
    tmp_path: Path, settings: checkpoint.TrainSettings
) -> None:
    def on(axes: dict[str, int]) -> NamedSharding:
        devices = jax.devices()[: math.prod(axes.values())]
        types = (AxisType.Auto,) * len(axes)
        mesh = jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=types, devices=devices)
        return NamedSharding(mesh, PartitionSpec(tuple(axes)))

    whole = jnp.arange(64.0).reshape(16, 4)
    checkpoints = checkpoint.Checkpoints(tmp_path, keep=1)
    notes = checkpoint.Notes(settings=settings, stream={}, losses=())
    checkpoints.save(1, {"a": jax.device_put(whole, on({"data": 8}))}, notes)
    for axes in ({"data": 2, "expert": 4}, {"data": 4}, {"data": 1}):
        like = jax.ShapeDtypeStruct((16, 4), jnp.float32, sharding=on(axes))
        restored = checkpoints.newest({"a": like}, pytest.fail)
        assert restored is not None
        assert restored[1]["a"].sharding == on(axes)
        assert (restored[1]["a"] == whole).all()


def test_a_checkpoint_of_another_model_is_refused(
    tmp_path: Path, settings: checkpoint.TrainSettings
) -> None:
    checkpoints = fill_store(tmp_path, settings)
    with pytest.raises(
        ValueError, match=r"another model: \['a'\] is float32\[2, 3\], not float32\[4\]"
    ):
        checkpoints.newest({**TREE, "a": jnp.zeros(4)}, pytest.fail)
    assert checkpoints.steps == [1, 2]


def test_a_checkpoint_of_another_run_is_refused(whole: Path, tmp_path: Path, texts: str) -> None:
    """Where the settings of the folder are gone, those of the checkpoint count."""
    shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "run" / "config.json").unlink()
    other = dataclasses.replace(training(tmp_path / "run", texts), seed=1)
    with pytest.raises(ValueError, match=r"same configuration.*\n  seed: 0 there, 1 now"):
        run.run_training(other, quiet())


def test_what_the_commands_refuse(
    whole: Path, tmp_path: Path, texts: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def refusal(*words: str) -> str:
        assert main(list(words)) == 2
        return capsys.readouterr().err

    at = ("--checkpoint", str(whole))
    assert "has no config.json" in refusal("generate", "--checkpoint", str(tmp_path / "nowhere"))
    assert "`steps` must be at least 1, got 0" in refusal("generate", *at, "--steps", "0")
    assert "`temperature` must be at least 0, got -1.0" in refusal(
        "generate", *at, "--temperature", "-1"
    )
    assert "`top_p` must be above 0, got 0.0" in refusal("generate", *at, "--top-p", "0")
    out = ("--out", str(tmp_path / "new"), "--data", texts)
    assert "`arm` must be one of" in refusal("train", *out, "--arm", "best")
    assert "`plot` must be a file" in refusal("generate", *at, "--plot", "/nowhere/at/all.png")
    sizes = ("--size.dim", "15", "--size.heads", "2")
    assert "`dim` must be" in refusal("train", *out, *sizes)
    assert not (tmp_path / "new").exists()  # what cannot be trained claims no folder
    assert "`steps` must be at least 2, got 1" in refusal("train", *out, "--steps", "1")
    assert "`save_every` must be at least 1" in refusal("train", *out, "--save-every", "0")
    assert "`size.length` must be at least 1" in refusal("train", *out, "--size.length", "-4")
    assert "`recipe.clip` must be finite, got nan" in refusal("train", *out, "--recipe.clip", "nan")
    assert "`seed` must be below 4294967296" in refusal("train", *out, "--seed", f"{2**64}")
    assert not (tmp_path / "new").exists()


def test_a_log_has_device_parameters_data_speed_and_time_left(
    tmp_path: Path, texts: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the first step on, and every so many steps, where the output is no terminal."""
    words = ["train", "--out", str(tmp_path / "run"), "--data", texts, *FLAGS, "--log-every", "9"]
    assert main(words) == 0
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    assert re.fullmatch(
        r"\d+ x .*; [\d,]+ parameters; 11 files to train on \([\d,]+ bytes\), 1 held out\.",
        lines[0],
    )
    steps = [int(match[1]) for match in re.finditer(r"step (\d+) of 25, \d", printed)]
    assert steps[0] == 1
    assert {9, 18, 25} <= set(steps)
    assert re.search(r"step 18 .* [\d,]+ tokens per second, \d:\d\d:\d\d left", printed)


def test_causally_a_trained_model_computes_its_capacity(whole: Path, texts: str) -> None:
    """Thresholds are calibrated at the end, and what differs by more than a tenth is said."""
    result = read_record(whole / "result.json", run.TrainResult)
    (router,) = result.evaluation.routers
    assert "causally its routers" not in result.held_out or not (
        0.9 <= router.compute_causal / router.compute_top_k <= 1.1
    )
    for ratio, says in ((1.09, False), (1.11, True), (0.91, False), (0.89, True)):
        far = dataclasses.replace(router, compute_top_k=0.125, compute_causal=0.125 * ratio)
        evaluation = dataclasses.replace(result.evaluation, routers=(far,))
        text = result.model_copy(update={"evaluation": evaluation}).held_out
        assert (f"{0.125 * ratio:.3f} slots per token, under top-k 0.125" in text) == says


def test_settings_that_are_missing_do_not_become_others(
    whole: Path, tmp_path: Path, texts: str
) -> None:
    """Without config.json the checkpoints say what the run is; no other run is written there."""
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    (out / "config.json").unlink()
    other = dataclasses.replace(training(out, texts), seed=1)
    with pytest.raises(ValueError, match="seed: 0 there, 1 now"):
        run.run_training(other, quiet())
    assert not (out / "config.json").exists()
    run.run_training(training(out, texts), quiet())
    assert losses(out) == losses(whole)


def test_a_folder_of_any_name_from_any_place(
    whole: Path, tmp_path: Path, texts: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Brackets are no glob and no markup, letters need no encoding, and paths may be relative.

    The same text under another path is the same run.
    """
    out = tmp_path / "runs" / "[v1] [b] läufe"
    shutil.copytree(whole, out)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    data = os.path.relpath(texts, os.getcwd())
    words = ["train", "--out", f"../runs/{out.name}", "--data", data, *FLAGS]
    ended = subprocess.run(
        [sys.executable, "-m", "mode.lab", *words],
        capture_output=True,
        text=True,
        # It only evaluates, which is soon done in any program.
        env={**os.environ, "PYTHONIOENCODING": "ascii", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
    )
    assert ended.returncode == 0, ended.stderr
    assert f"goes on from step {STEPS}" in ended.stdout
    assert r"--checkpoint '../runs/[v1] [b] l\xe4ufe'" in ended.stdout
    assert run.load_run(out, quiet()).steps == STEPS
    assert losses(out) == losses(whole)
