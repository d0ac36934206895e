"""`mode-lab plan`: what is counted is what devices hold, the search is in its order, and the real
compilers agree where they are installed."""

import dataclasses
import importlib.util
import io
import json
import os
import shlex
import types
from pathlib import Path

import equinox as eqx
import jax
import numpy as np
import pytest
import tyro
from jax.sharding import AxisType
from rich.console import Console

import mode
from mode.lab import meshes, plan
from mode.lab.__main__ import main
from mode.lab.ablate import Ablation, command_of
from mode.lab.arms import ARMS, Size, arms_named
from mode.lab.footprint import Program, Said
from mode.lab.meshes import larger_topologies
from mode.lab.plan import MeshSize, Planning
from mode.lab.presets import PRESETS
from mode.lab.step import Recipe, begin


OPTIMISED = True

os.environ.setdefault("JAX_PLATFORMS", "cpu")
TPU = pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="needs the extra aot-tpu")
GPU = pytest.mark.skipif(
    not importlib.util.find_spec("jax_plugins"), reason="needs the extra aot-gpu"
)
SIZE = Size(dim=16, depth=4, heads=2, length=64, batch=8, experts=4, noop=2)
GIB = 2**30


def program(arm: str = "mode-integrated", **changes: object) -> Program:
    return Program(arms_named([arm])[0], dataclasses.replace(SIZE, **changes))


@pytest.mark.parametrize("arm", ["dense", "mod-predictor", "mode-staged", "mode-integrated"])
def test_bytes_are_those_that_a_device_holds(arm: str) -> None:
    """Of real arrays on a real mesh: the first device's."""
    axes = {"data": 2, "expert": 2}
    mesh = jax.make_mesh(
        (2, 2), tuple(axes), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:4]
    )
    chosen, size = arms_named([arm])[0], dataclasses.replace(SIZE, experts=4, noop=4)
    state = begin(chosen, size, Recipe(), steps=1000, seed=0)
    placed = eqx.filter_shard(state, mode.placement(state, mesh))

    def held(tree: object) -> int:
        leaves = [leaf for leaf in jax.tree.leaves(tree) if eqx.is_array(leaf)]
        return sum(
            leaf.addressable_shards[0].data.nbytes
            for leaf in leaves
            if not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        )

    found = Program(chosen, size).counted(axes)
    parameters = held(eqx.filter(placed.model, mode.trainable(placed.model)))
    assert found.parameter_bytes == parameters
    assert found.optimizer_bytes == held(placed.optimizer)
    batch = 2 * (size.batch // 4) * (size.length + 1) * 4  # tokens and segments, a row per device
    key = 8
    assert found.argument_bytes == held(placed) + key + batch
    assert found.gradient_bytes == parameters


def test_one_device_holds_twelve_bytes_a_parameter() -> None:
    """Itself and Adam's two moments, in float32, of bfloat16 activations too."""
    found = program(dtype="bfloat16").counted({"data": 1, "expert": 1})
    assert found.parameter_bytes == 4 * found.parameters
    assert found.optimizer_bytes == pytest.approx(8 * found.parameters, abs=64)


def test_activations_grow_with_the_batch_alone() -> None:
    one = {"data": 1, "expert": 1}
    base = program().counted(one).activation_bytes
    assert program(batch=16).counted(one).activation_bytes == 2 * base
    assert program().counted({"data": 2, "expert": 2}).activation_bytes == base // 4
    kept = program(remat=True, depth=8).counted(one).activation_bytes
    assert kept < program(depth=8).counted(one).activation_bytes / 3
    # The logits and the hidden states between layers are among what is kept.
    assert base > 4 * SIZE.batch * SIZE.length * (SIZE.vocab + SIZE.dim)


def test_flops_are_divided() -> None:
    whole, part = (program().counted({"data": n, "expert": 1}).flops for n in (1, 4))
    assert whole == 4 * part
    assert program(depth=8).counted({"data": 1, "expert": 1}).flops > 1.5 * whole


@pytest.mark.parametrize("arm", ARMS, ids=lambda arm: arm.name)
def test_every_arm_takes_all_sizes(arm: mode.lab.arms.Arm) -> None:
    size = dataclasses.replace(SIZE, vocab=300, kv_heads=1, remat=True)
    model = eqx.filter_eval_shape(lambda: arm.build(size, key=jax.random.key(0)))
    assert model.embedding.shape == (300, 16)
    assert all(stack.remat for stack in model.stacks)
    layers = [layer for stack in model.stacks for layer in stack.layers]
    assert [layer.block.attention.num_kv_heads for layer in layers] == [1] * len(layers)


def test_the_command_of_an_ablation_says_all_sizes(tmp_path: Path) -> None:
    size = dataclasses.replace(SIZE, vocab=300, kv_heads=1, remat=True, dtype="bfloat16")
    words = shlex.split(command_of(Ablation(size=size).settings(), tmp_path))
    assert words[:2] == ["mode-lab", "ablate"]
    assert tyro.cli(Ablation, args=words[2:]).size == size


def test_vocabulary_holds_the_bytes() -> None:
    with pytest.raises(ValueError, match=r"`vocab` must be at least 257.* got 256"):
        ARMS[0].build(dataclasses.replace(SIZE, vocab=256), key=jax.random.key(0))


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_what_they_say(name: str) -> None:
    preset = PRESETS[name]
    (arm,) = arms_named([preset.arm])
    model = eqx.filter_eval_shape(lambda: arm.build(preset.size, key=jax.random.key(0)))
    parameters = eqx.filter(model, mode.trainable(model))
    count = sum(leaf.size for leaf in jax.tree.leaves(parameters))
    said = {"100m": 0.1e9, "1b": 1e9, "100b": 100e9, "fits": 3e9}[name.partition("-")[2]]
    assert (
        said * (0.6 if "fits" in name else 0.9) < count < said * (1.4 if "fits" in name else 1.15)
    )


def test_topologies_grow_by_the_shorter_side() -> None:
    assert list(larger_topologies("tpu:v5e:2x4")) == [
        f"tpu:v5e:{shape}" for shape in ("4x4", "4x8", "8x8", "8x16", "16x16")
    ]
    assert list(larger_topologies("tpu:v5p:4x4x4"))[:2] == ["tpu:v5p:4x4x8", "tpu:v5p:4x8x8"]
    assert list(larger_topologies("tpu:v5e:16x16")) == []
    assert list(larger_topologies("cuda:h100")) == []
    assert next(larger_topologies("tpu:v5e:1x1")) == "tpu:v5e:2x2"
    assert next(larger_topologies("tpu:v5p:1x1x1")) == "tpu:v5p:2x2x1"


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, int]]]:
    """Targets whose compiler needs what is counted and a MiB for each expert of a device."""
    asked: list[tuple[str, dict[str, int]]] = []

    def compiled(self: Program, target: str, axes: dict[str, int]) -> Said:
        asked.append((target, dict(axes)))
        counted, work = self.counted(axes), 2**20 * self.size.experts // axes["expert"]
        needed = counted.argument_bytes + work
        return Said(needed, counted.argument_bytes, work, 0, 0, 5.0, (), 1.0)

    def mesh_for(target: str) -> types.SimpleNamespace:
        sides = target.rpartition(":")[2].split("x")
        return types.SimpleNamespace(size=int(np.prod([int(side) for side in sides])))

    monkeypatch.setattr(plan, "memory_of", lambda target: 16 * GIB)
    for module in (plan, meshes):
        monkeypatch.setattr(module, "mesh_for", mesh_for)
    monkeypatch.setattr(Program, "compiled", compiled)
    return asked


def planned(tmp_path: Path, **settings: object) -> tuple[plan.Plan, str]:
    given = {"target": "tpu:v5e:2x2", "arm": "mode-integrated", "size": SIZE, "out": tmp_path}
    console = Console(file=io.StringIO(), width=140)
    found = plan.run_planning(Planning(**{**given, **settings}), console, command="mode-lab plan")
    assert isinstance(console.file, io.StringIO)
    return found, console.file.getvalue()


def test_the_search_goes_from_many_expert_devices_to_few(pretended: list, tmp_path: Path) -> None:
    """And then to larger topologies; what gathers more than a mesh that does not fit is left."""
    state = program().counted({"data": 1, "expert": 4}).argument_bytes
    found, text = planned(tmp_path, memory=(state + 2**20 - 1) / GIB)
    assert pretended == [
        ("tpu:v5e:2x2", {"data": 1, "expert": 4}),
        ("tpu:v5e:2x4", {"data": 2, "expert": 4}),
    ]
    assert found.first is not None
    assert found.first.target == "tpu:v5e:2x4"
    whys = [one.why for one in found.tried]
    assert whys[0] == whys[3] == ""
    assert all("gathers more weights" in why for why in whys[1:3])
    assert "It fits on tpu:v5e:2x4 as data 2 x expert 4, the first mesh of the search." in text


def test_what_cannot_fit_is_not_compiled(pretended: list, tmp_path: Path) -> None:
    state = program().counted({"data": 2, "expert": 4}).argument_bytes
    found, text = planned(tmp_path, memory=(state - 1) / GIB)
    assert found.first is None
    assert pretended == []
    assert "the state alone is larger" in text
    assert "a batch of 8 does not divide over 16" in text
    assert "fits on none of the meshes" in text


def test_no_compilation_begins_too_late(
    pretended: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(0, 10**6, 50))
    monkeypatch.setattr(plan.time, "perf_counter", lambda: float(next(clock)))
    state = program().counted({"data": 1, "expert": 4}).argument_bytes
    found, text = planned(tmp_path, memory=(state + 2**20 - 1) / GIB, minutes=0.5)
    assert len(pretended) == 1
    assert "no time left: 0.5 minutes" in text
    assert found.first is None


def test_a_given_mesh_comes_first(pretended: list, tmp_path: Path) -> None:
    found, _ = planned(tmp_path, mesh=MeshSize(data=4))
    assert pretended == [("tpu:v5e:2x2", {"data": 4, "expert": 1})]
    assert found.shown == [found.first]


def test_all_that_was_found_is_saved(pretended: list, tmp_path: Path) -> None:
    found, text = planned(tmp_path)
    saved = json.loads((tmp_path / "plan.json").read_text())
    assert saved["arm"] == "mode-integrated"
    assert saved["size"] == dataclasses.asdict(SIZE)
    assert saved["versions"]["jax"] == jax.__version__
    assert saved["memory_bytes"] == 16 * GIB
    (tried,) = saved["tried"]
    assert saved["first_that_fits"] == 0
    assert tried["fits"]
    assert tried["axes"] == {"data": 1, "expert": 4}
    assert found.first is not None
    assert found.first.counted is not None
    assert tried["counted"]["parameter_bytes"] == found.first.counted.parameter_bytes
    assert tried["said"]["needed_bytes"] == tried["counted"]["argument_bytes"] + 2**20
    written = (tmp_path / "plan.md").read_text()
    for row in ("parameters (counted)", "optimizer (counted)", "temporary (compiler)", "FLOPs"):
        assert row in text
        assert row in written
    assert "| temporary (compiler) | 1.00 MiB |" in written


def test_flags_change_a_preset(
    pretended: list, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["plan", "--preset", "mode-100m", "--target", "tpu:v5e:2x2", "--out", str(tmp_path)]
    assert main([*words, "--size.dim", "32", "--size.depth", "2", "--size.dtype", "float32"]) == 0
    saved = json.loads((tmp_path / "plan.json").read_text())
    expected = dataclasses.replace(PRESETS["mode-100m"].size, dim=32, depth=2, dtype="float32")
    assert saved["size"] == dataclasses.asdict(expected)
    assert saved["arm"] == "mode-integrated"
    assert saved["command"].startswith("mode-lab plan --preset mode-100m --target")
    capsys.readouterr()


REFUSED = {
    "--preset mode-7b": r"`preset` must be one of mode-100b, .* got 'mode-7b'",
    "--arm sparse": r"`arm` must be one of dense, .* got 'sparse'",
    "--memory 0": r"`memory` must be a finite number above 0, got 0.0",
    "--memory nan": r"`memory` must be a finite number above 0, got nan",
    "--minutes -1": r"`minutes` must be a finite number above 0, got -1.0",
    "--mesh.data 0": r"`mesh.data` must be at least 1 device, got 0",
    "--mesh.data 2 --mesh.expert 4": r"must be all 4 devices of tpu:v5e:2x2, got 2 times 4",
    "--mesh.data 3": r"must be all 4 devices of tpu:v5e:2x2, got 3 times 1",
    "--mesh.expert 4 --size.experts 6": r"`mesh.expert` must divide .* 6, got 4. Try 2",
    "--size.batch 6": r"`size.batch` must divide over all 4 devices .* got 6.* is 8",
    "--size.batch 0": r"`batch` must be at least 1, got 0",
    "--size.vocab 100": r"`vocab` must be at least 257.* got 100",
    "--size.heads 3": r"`dim` must be `num_heads` times an even number.* got dim=64",
    "--size.kv-heads 3": r"`num_heads` must be divisible by `num_kv_heads`, got 4 and 3",
}


@pytest.mark.parametrize("words", REFUSED)
def test_bad_input_is_refused(
    words: str, pretended: list, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fixed = ["plan", "--arm", "mode-integrated", "--out", str(tmp_path / "out")]
    assert main([*fixed, *words.split()]) == 2
    said = capsys.readouterr().err
    assert pytest.RaisesExc(ValueError, match=REFUSED[words]).matches(ValueError(said)), said
    assert not (tmp_path / "out").exists()
    assert pretended == []


@pytest.mark.parametrize("target", ["tpu", "cuda:a100", "tpu:v5e", "v5e:2x2"])
def test_unknown_targets_are_refused(target: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--target", target]) == 2
    assert f"got '{target}'" in capsys.readouterr().err


def test_a_missing_compiler_names_its_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "libtpu" else find(name)
    )
    assert main(["plan", "--target", "tpu:v5e:2x2"]) == 2
    assert 'pip install ".[lab,aot-tpu]"' in capsys.readouterr().err


@pytest.mark.parametrize(("share", "gib"), [(None, 59.36), ("0.9", 71.23)])
def test_a_gpu_gives_the_share_that_jax_takes(
    share: str | None, gib: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    if share is not None:
        monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", share)
    memory, rule = plan._memory(Planning(target="cuda:h100"))
    assert memory / GIB == pytest.approx(gib, abs=0.01)
    assert "XLA_PYTHON_CLIENT_MEM_FRACTION" in rule
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "most")
    with pytest.raises(ValueError, match=r"`XLA_PYTHON_CLIENT_MEM_FRACTION` must .* got 'most'"):
        plan._memory(Planning(target="cuda:h100"))


@TPU
def test_a_tpu_compiler_agrees(tmp_path: Path) -> None:
    """Its arguments are what was counted, but for padding to tiles; experts are two exchanges."""
    found, text = planned(tmp_path, size=dataclasses.replace(SIZE, dim=256, length=128))
    assert found.memory_bytes == int(15.75 * GIB)
    first = found.first
    assert first is not None
    assert first.counted is not None
    assert first.said is not None
    assert first.said.argument_bytes is not None
    assert first.said.argument_bytes == pytest.approx(first.counted.argument_bytes, rel=0.05)
    assert first.said.needed_bytes > first.said.argument_bytes
    exchanges = [one for one in first.said.collectives if one.kind == "all-to-all"]
    assert {one.times for one in exchanges} == {2}  # two turns of a dense and a routed layer
    assert "all-to-all (2 a step each)" in text


@TPU
def test_what_a_tpu_compiler_refuses_does_not_fit(tmp_path: Path) -> None:
    size = Size(dim=4096, depth=2, heads=32, length=4096, batch=2, vocab=32768)
    found, text = planned(tmp_path, arm="dense", size=size, target="tpu:v5e:1x1", minutes=0.01)
    asked = found.tried[0]
    assert asked.said is not None
    assert asked.said.argument_bytes is None
    assert asked.said.needed_bytes > found.memory_bytes
    assert "does not fit, needs" in text


@GPU
def test_a_gpu_compiler_agrees(tmp_path: Path) -> None:
    found, text = planned(tmp_path, arm="mod", target="cuda:h100")
    assert found.first is not None
    assert found.first.counted is not None
    assert found.first.said is not None
    assert found.first.said.argument_bytes == pytest.approx(
        found.first.counted.argument_bytes, rel=0.02
    )
    assert found.first.said.flops is None
    assert found.first.said.collectives == ()
    assert "collectives" in text
