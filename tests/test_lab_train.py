"""`mode-lab train` and `generate`: runs that survive, and text from what they leave behind."""

import dataclasses
import io
import json
import math
import os
import resource
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

import mode
from mode.lab import checkpoint, generate, run
from mode.lab.__main__ import main
from mode.lab.arms import Size
from mode.lab.step import Recipe, TrainState
from tests.lab import quiet, repeating_texts, said


OPTIMISED = True

SIZE = Size(dim=8, depth=2, heads=1, length=64, batch=2, experts=2, noop=1)
STEPS = 25
FLAGS = [
    *("--size.dim", "8", "--size.depth", "2", "--size.heads", "1", "--size.length", "64"),
    *("--size.batch", "2", "--size.experts", "2", "--size.noop", "1", "--steps", str(STEPS)),
    *("--held-out", "4", "--save-every", "7"),
]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> str:
    return repeating_texts(tmp_path_factory.mktemp("texts"))


def training(out: Path, texts: str, arm: str = "mod", steps: int = STEPS) -> run.Training:
    return run.Training(
        out, arm, steps, texts, held_out=4, save_every=7, size=SIZE, recipe=Recipe()
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, texts: str) -> Path:
    """A run that nobody interrupted."""
    out = tmp_path_factory.mktemp("whole") / "run"
    run.run_training(training(out, texts), quiet())
    return out


def losses(out: Path) -> list[float]:
    return json.loads((out / "result.json").read_text())["losses"]


def saved(out: Path) -> TrainState:
    """The newest state of a run, by its bits."""
    _, _, taken, model = run.load_run(out, quiet())
    assert taken == STEPS
    return model


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
            deadline = time.monotonic() + 120
            while not (out / "checkpoints" / str(after)).is_dir():
                assert process.poll() is None, "it ended before it could be killed"
                assert time.monotonic() < deadline
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


def test_bfloat16_keeps_its_weights_in_float32(tmp_path: Path, texts: str) -> None:
    """Activations alone are narrow; what is saved, and what the optimizer holds, is not."""
    size = dataclasses.replace(SIZE, dtype="bfloat16")
    narrow = dataclasses.replace(training(tmp_path / "run", texts, steps=2), size=size)
    run.run_training(narrow, quiet())
    assert all(map(math.isfinite, losses(tmp_path / "run")))
    _, _, _, model = run.load_run(tmp_path / "run", quiet())
    assert model.dtype == jnp.bfloat16
    leaves = [leaf for leaf in jax.tree.leaves(model) if hasattr(leaf, "dtype")]
    assert {leaf.dtype for leaf in leaves} <= {jnp.dtype("float32"), jnp.dtype("int32")}


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
    with pytest.raises(ValueError, match=r"same configuration.*\n.*arm: mod there, dense asked"):
        run.run_training(training(whole, texts, arm="dense"), quiet())


TREE = {"a": jnp.arange(6.0).reshape(2, 3), "key": jax.random.key(5), "b": jnp.arange(3) > 1}


def store(folder: Path, steps: tuple[int, ...] = (1, 2)) -> checkpoint.Checkpoints:
    checkpoints = checkpoint.Checkpoints(folder, keep=3)
    for step in steps:
        tree = {**TREE, "a": TREE["a"] + step}
        checkpoints.save(step, tree, {"of": step})
    return checkpoints


def test_a_checkpoint_holds_what_was_saved(tmp_path: Path) -> None:
    like = jax.eval_shape(lambda: TREE)
    found = store(tmp_path).newest(like, pytest.fail)
    assert found is not None
    step, tree, notes = found
    assert (step, notes) == (2, {"of": 2})
    assert (tree["a"] == TREE["a"] + 2).all()
    assert (tree["b"] == TREE["b"]).all()
    assert (jax.random.key_data(tree["key"]) == jax.random.key_data(TREE["key"])).all()


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)


@pytest.mark.parametrize("harm", ["cut", "turned"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    tmp_path: Path, harm: str
) -> None:
    """Any file of it, cut off or with one bit turned."""
    store(tmp_path / "sound")
    names = [path.relative_to(tmp_path / "sound/2") for path in files_of(tmp_path / "sound/2")]
    held = [name for name in names if name.parts[0] in ("arrays", "about", "digests.json")]
    assert len(held) >= 5
    for place, name in enumerate(held):
        folder = tmp_path / str(place)
        checkpoints = store(folder)
        path = folder / "2" / name
        # Names of data files differ from save to save: the one of the same place.
        path = path if path.exists() else files_of(folder / "2")[names.index(name)]
        content = bytearray(path.read_bytes())
        if harm == "cut":
            content = content[: len(content) // 2]
        else:
            content[len(content) // 2] ^= 1
        path.write_bytes(content)
        warnings: list[str] = []
        found = checkpoints.newest(TREE, warnings.append, set_aside=True)
        assert found is not None
        step, tree, _ = found
        assert step == 1
        assert (tree["a"] == TREE["a"] + 1).all()
        assert "the checkpoint of step 2 is not used" in warnings[0]
        assert str(folder / "2.damaged") in warnings[0]
        checkpoints.save(2, TREE, {})
        assert checkpoints.steps == [1, 2]


def test_without_a_sound_checkpoint_nothing_begins_anew(tmp_path: Path) -> None:
    checkpoints = store(tmp_path, steps=(1,))
    for path in files_of(tmp_path / "1" / "arrays"):
        path.write_bytes(b"")
    for _ in range(2):
        with pytest.raises(ValueError, match=r"no checkpoint in .* is sound:\n  step 1: arrays/"):
            checkpoints.newest(TREE, lambda text: None, set_aside=True)


def test_a_save_that_was_killed_is_no_checkpoint(tmp_path: Path) -> None:
    """At its very end, when all but the digests is written."""
    checkpoints = store(tmp_path, steps=(1,))
    (tmp_path / "1" / "digests.json").unlink()
    warnings: list[str] = []
    assert checkpoints.newest(TREE, warnings.append, set_aside=True) is None
    assert "not finished" in warnings[0]
    checkpoints.save(1, TREE, {})
    assert checkpoints.newest(TREE, pytest.fail) is not None


# Writers that met the full disk first leave the others with a closed event loop.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_full_disk_loses_nothing_that_was_saved(tmp_path: Path) -> None:
    """No file may grow beyond some kilobytes while the second checkpoint is saved."""
    checkpoints = store(tmp_path, steps=(1,))
    large = {**TREE, "c": jax.random.normal(jax.random.key(0), (1 << 16,))}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 14, hard))
    try:
        with pytest.raises(
            OSError, match=r"step 2 could not be saved .*The one of step 1 is whole"
        ):
            checkpoints.save(2, large, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    found = checkpoint.Checkpoints(tmp_path, keep=3).newest(TREE, pytest.fail)
    assert found is not None
    assert found[0] == 1


def test_a_checkpoint_goes_onto_another_mesh(tmp_path: Path) -> None:
    def on(axes: dict[str, int]) -> NamedSharding:
        devices = jax.devices()[: math.prod(axes.values())]
        types = (AxisType.Auto,) * len(axes)
        mesh = jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=types, devices=devices)
        return NamedSharding(mesh, PartitionSpec(tuple(axes)))

    whole = jnp.arange(64.0).reshape(16, 4)
    checkpoints = checkpoint.Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, {"a": jax.device_put(whole, on({"data": 8}))}, {})
    for axes in ({"data": 2, "expert": 4}, {"data": 4}, {"data": 1}):
        like = jax.ShapeDtypeStruct((16, 4), jnp.float32, sharding=on(axes))
        found = checkpoints.newest({"a": like}, pytest.fail)
        assert found is not None
        assert found[1]["a"].sharding == on(axes)
        assert (found[1]["a"] == whole).all()


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    checkpoints = store(tmp_path)
    with pytest.raises(
        ValueError, match=r"another model:\n.*'a'.*float32\[2, 3\] there, float32\[4"
    ):
        checkpoints.newest({**TREE, "a": jnp.zeros(4)}, pytest.fail)
    assert checkpoints.steps == [1, 2]


def generated(out: Path, **options: object) -> tuple[bytes, str]:
    stream, console = io.BytesIO(), quiet()
    generate.run_generation(generate.Generating(out, **options), stream.write, console)
    return stream.getvalue(), said(console)


def test_text_comes_from_the_newest_checkpoint(whole: Path) -> None:
    """The text of `mode.generate` on the causal model, a report of compute, and its picture."""
    text, report = generated(whole, prompt="line ", steps=40, temperature=0.0)
    _, _, _, model = run.load_run(whole, quiet())
    prompt = jnp.array([[256, *b"line "]])
    made = mode.generate(mode.causal(model, limit=1.0), prompt, steps=40, stop=256)
    expected = bytes(token for token in made.tokens[0].tolist() if token != 256)
    assert text == b"line " + expected
    (found,) = mode.entered(mode.causal(model, limit=1.0), made.decoding)
    assert f"{int(made.lengths[0])} bytes" in report
    assert "a second" in report
    assert "0.125" in report
    assert found.trained == 0.125
    assert (whole / "generated.png").read_bytes().startswith(b"\x89PNG")


def test_sampling_is_keyed(whole: Path) -> None:
    one, other, again = (
        generated(whole, steps=30, temperature=1.0, seed=seed)[0] for seed in (0, 1, 0)
    )
    assert one == again != other


def test_an_arm_of_whole_sequences_has_no_text(tmp_path: Path, texts: str) -> None:
    console = quiet()
    run.run_training(training(tmp_path / "run", texts, arm="mod-random", steps=2), console)
    assert "generate" not in said(console)
    with pytest.raises(ValueError, match=r"`checkpoint` must be of an arm .*'mod-random'"):
        generated(tmp_path / "run")


@pytest.mark.parametrize("arm", ["dense", "mode-staged"])
def test_every_arm_generates(arm: str, tmp_path: Path, texts: str) -> None:
    run.run_training(training(tmp_path / "run", texts, arm=arm, steps=2), quiet())
    text, report = generated(tmp_path / "run", steps=3)
    assert text
    assert ("nothing is routed" in report) == (arm == "dense")


def test_what_the_commands_refuse(
    whole: Path, tmp_path: Path, texts: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def refusal(*words: str) -> str:
        assert main(list(words)) == 2
        return capsys.readouterr().err

    at = ("--checkpoint", str(whole))
    assert "has no config.json" in refusal("generate", "--checkpoint", str(tmp_path / "nowhere"))
    assert "`steps` must be at least 1, got 0" in refusal("generate", *at, "--steps", "0")
    assert "`temperature` must be" in refusal("generate", *at, "--temperature", "-1")
    assert "`top_p` must be" in refusal("generate", *at, "--top-p", "0")
    out = ("--out", str(tmp_path / "new"), "--data", texts)
    assert "`arm` must be one of" in refusal("train", *out, "--arm", "best")
    assert "`plot` must be a file" in refusal("generate", *at, "--plot", "/nowhere/at/all.png")
    sizes = ("--size.dim", "15", "--size.heads", "2")
    assert "`dim` must be" in refusal("train", *out, *sizes)
    assert not (tmp_path / "new").exists()  # what cannot be trained claims no folder
    assert "`steps` must be at least 2, got 1" in refusal("train", *out, "--steps", "1")
    assert "`save_every` must be at least 1" in refusal("train", *out, "--save-every", "0")
