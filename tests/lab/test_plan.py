"""`mode-lab plan`: what is counted is what devices hold, the search is in its order, and the real
compilers agree where they are installed."""

import dataclasses
import importlib.util
import os
import shlex
import types
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import numpy as np
import pytest
import tyro
from jax.sharding import AxisType

import mode
from mode.lab import meshes, plan
from mode.lab.__main__ import main
from mode.lab.ablate import Ablation
from mode.lab.arms import ARMS, Arm, arm_named
from mode.lab.files import read_record
from mode.lab.footprint import Program
from mode.lab.meshes import MeshOf, larger_topologies
from mode.lab.options import Recipe, Size, check_options, command_line
from mode.lab.plan import MeshSize, Planning
from mode.lab.plan_report import Plan
from mode.lab.presets import PRESETS
from mode.lab.step import begin
from tests.lab.helpers import quiet, said


pytestmark = pytest.mark.optimized


os.environ.setdefault("JAX_PLATFORMS", "cpu")
TPU = pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="needs the extra aot-tpu")
GPU = pytest.mark.skipif(
    not importlib.util.find_spec("jax_plugins"), reason="needs the extra aot-gpu"
)
SIZE = Size(dim=16, depth=4, heads=2, length=64, batch=8, experts=4, noop=2)
GIB = 2**30


def program(arm: str = "mode-integrated", **changes: Any) -> Program:
    return Program(arm_named(arm), dataclasses.replace(SIZE, **changes))


@pytest.mark.parametrize("arm", ["dense", "mod-predictor", "mode-staged", "mode-integrated"])
def test_bytes_are_those_that_a_device_holds(arm: str) -> None:
    """Of real arrays on a real mesh: the first device's."""
    axes = {"data": 2, "expert": 2}
    mesh = jax.make_mesh(
        (2, 2), tuple(axes), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:4]
    )
    chosen, size = arm_named(arm), dataclasses.replace(SIZE, experts=4, noop=4)
    shapes = eqx.filter_eval_shape(begin, chosen, size, Recipe(), seed=0)
    state = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    placed = eqx.filter_shard(state, mode.named_shardings(state, mesh))

    def bytes_of(tree: object) -> int:
        leaves = [leaf for leaf in jax.tree.leaves(tree) if eqx.is_array(leaf)]
        return sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves)

    counted = Program(chosen, size).count(axes)
    parameters = bytes_of(eqx.filter(placed.model, mode.is_trainable(placed.model)))
    assert counted["parameter_bytes"] == counted["gradient_bytes"] == parameters
    assert counted["optimizer_bytes"] == bytes_of(placed.optimizer)
    batch = 2 * (size.batch // 4) * (size.length + 1) * 4  # tokens and segments, a row per device
    assert counted["argument_bytes"] == bytes_of(placed) + batch


def test_one_device_holds_twelve_bytes_a_parameter() -> None:
    """Itself and Adam's two moments, in float32, of bfloat16 activations too."""
    counted = program(dtype="bfloat16").count({"data": 1, "expert": 1})
    assert counted["parameter_bytes"] == 4 * counted["parameters"]
    assert counted["optimizer_bytes"] == pytest.approx(8 * counted["parameters"], abs=64)


def test_activations_grow_with_the_batch_alone() -> None:
    one = {"data": 1, "expert": 1}
    base = program().count(one)["activation_bytes"]
    assert program(batch=16).count(one)["activation_bytes"] == 2 * base
    assert program().count({"data": 2, "expert": 2})["activation_bytes"] == base // 4
    kept = program(remat=True, depth=8).count(one)["activation_bytes"]
    assert kept < program(depth=8).count(one)["activation_bytes"] / 3
    # The logits and the hidden states between layers are among what is kept.
    assert base > 4 * SIZE.batch * SIZE.length * (SIZE.vocab + SIZE.dim)


def test_flops_are_divided() -> None:
    whole, part = (program().count({"data": n, "expert": 1})["flops"] for n in (1, 4))
    assert whole == 4 * part
    assert program(depth=8).count({"data": 1, "expert": 1})["flops"] > 1.5 * whole


@pytest.mark.parametrize("arm", ARMS, ids=lambda arm: arm.name)
def test_every_arm_takes_all_sizes(arm: Arm) -> None:
    size = dataclasses.replace(SIZE, vocab=300, kv_heads=1, remat=True)
    model = eqx.filter_eval_shape(lambda: arm.build(size, key=jax.random.key(0)))
    assert model.embedding.shape == (300, 16)
    assert all(stack.remat for stack in model.stacks)
    layers = [layer for stack in model.stacks for layer in stack.layers]
    assert [layer.block.attention.num_kv_heads for layer in layers] == [1] * len(layers)


def test_the_command_of_an_ablation_says_all_sizes(tmp_path: Path) -> None:
    size = dataclasses.replace(SIZE, vocab=300, kv_heads=1, remat=True, dtype="bfloat16")
    ablation = Ablation(tmp_path, arms=("dense", "mod"), size=size)
    words = shlex.split(command_line("ablate", ablation))
    assert words[:2] == ["mode-lab", "ablate"]
    assert tyro.cli(Ablation, args=words[2:]) == ablation


def test_vocabulary_holds_the_bytes() -> None:
    with pytest.raises(ValueError, match=r"`size.vocab` must be at least 257, got 256"):
        check_options(Planning(size=dataclasses.replace(SIZE, vocab=256)))


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_what_they_say(name: str) -> None:
    preset = PRESETS[name]
    arm = arm_named(preset.arm)
    model = eqx.filter_eval_shape(lambda: arm.build(preset.size, key=jax.random.key(0)))
    parameters = eqx.filter(model, mode.is_trainable(model))
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
def pretended(monkeypatch: pytest.MonkeyPatch) -> list[MeshOf]:
    """Targets whose compiler needs what is counted and a MiB for each expert of a device."""
    compiled: list[MeshOf] = []

    def compile(self: Program, target: str, axes: dict[str, int]) -> tuple[dict[str, Any], Any]:
        compiled.append(MeshOf(target, **axes))
        arguments = self.count(axes)["argument_bytes"]
        work = 2**20 * self.size.experts // axes["expert"]
        sizes = {"argument_bytes": arguments, "temporary_bytes": work}
        return sizes | {"needed_bytes": arguments + work, "seconds": 1.0}, {}

    def mesh_for(target: str) -> types.SimpleNamespace:
        sides = target.rpartition(":")[2].split("x")
        return types.SimpleNamespace(size=int(np.prod([int(side) for side in sides])))

    monkeypatch.setattr(plan, "device_memory_bytes", lambda target: 16 * GIB)
    for module in (plan, meshes):
        monkeypatch.setattr(module, "mesh_for", mesh_for)
    monkeypatch.setattr(Program, "compile", compile)
    return compiled


def planned(tmp_path: Path, **settings: Any) -> tuple[Plan, str]:
    given = {"target": "tpu:v5e:2x2", "arm": "mode-integrated", "size": SIZE, "out": tmp_path}
    console = quiet()
    return plan.run_planning(Planning(**{**given, **settings}), console), said(console)


def test_the_search_goes_from_many_expert_devices_to_few(
    pretended: list[MeshOf], tmp_path: Path
) -> None:
    """And then to larger topologies; what gathers more than a mesh that does not fit is left."""
    state = program().count({"data": 1, "expert": 4})["argument_bytes"]
    result, text = planned(tmp_path, memory=(state + 2**20 - 1) / GIB)
    assert pretended == [MeshOf("tpu:v5e:2x2", 1, 4), MeshOf("tpu:v5e:2x4", 2, 4)]
    assert result.first is not None
    assert result.first.mesh == MeshOf("tpu:v5e:2x4", 2, 4)
    whys = [trial.why for trial in result.trials]
    assert whys[0] == whys[3] == ""
    assert all("gathers more weights" in why for why in whys[1:3])
    assert "It fits on tpu:v5e:2x4 as data 2 x expert 4, the first that does." in text


def test_what_cannot_fit_is_not_compiled(pretended: list[MeshOf], tmp_path: Path) -> None:
    state = program().count({"data": 2, "expert": 4})["argument_bytes"]
    result, text = planned(tmp_path, memory=(state - 1) / GIB)
    assert result.first is None
    assert pretended == []
    assert "the state alone is larger" in text
    assert "a batch of 8 does not divide over 16" in text
    assert "fits on none of the meshes" in text


def test_no_compilation_begins_too_late(
    pretended: list[MeshOf], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(0, 10**6, 15))
    monkeypatch.setattr(plan.time, "perf_counter", lambda: float(next(clock)))
    state = program().count({"data": 1, "expert": 4})["argument_bytes"]
    result, text = planned(tmp_path, memory=(state + 2**20 - 1) / GIB, minutes=0.5)
    assert len(pretended) == 1
    assert "no time left: see --minutes" in text
    assert result.first is None


def test_a_given_mesh_comes_first(pretended: list[MeshOf], tmp_path: Path) -> None:
    result, _ = planned(tmp_path, mesh=MeshSize(data=4))
    assert pretended == [MeshOf("tpu:v5e:2x2", 4, 1)]
    assert result.shown == [result.first]


def test_the_plan_is_saved(pretended: list[MeshOf], tmp_path: Path) -> None:
    result, text = planned(tmp_path)
    saved = read_record(tmp_path / "plan.json", Plan)
    assert saved == result
    assert saved.size == SIZE
    assert saved.versions["jax"] == jax.__version__
    assert saved.memory_bytes == 16 * GIB
    (trial,) = saved.trials
    assert trial == saved.first
    assert trial.mesh == MeshOf("tpu:v5e:2x2", 1, 4)
    assert trial.compiler["needed_bytes"] == trial.counted["argument_bytes"] + 2**20
    written = (tmp_path / "plan.md").read_text()
    for row in ("parameter bytes (counted)", "temporary bytes (compiler)", "flops (counted)"):
        assert row in text
        assert row in written
    assert "1.00 MiB" in written


def test_flags_change_a_preset(
    pretended: list[MeshOf], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["plan", "--preset", "mode-100m", "--target", "tpu:v5e:2x2", "--out", str(tmp_path)]
    assert main([*words, "--size.dim", "32", "--size.depth", "2", "--size.dtype", "float32"]) == 0
    saved = read_record(tmp_path / "plan.json", Plan)
    expected = dataclasses.replace(PRESETS["mode-100m"].size, dim=32, depth=2, dtype="float32")
    assert saved.size == expected
    assert saved.arm == "mode-integrated"
    assert shlex.split(saved.command) == [
        *("mode-lab", "plan", "--preset", "mode-100m", "--out", str(tmp_path)),
        *("--size.dim", "32", "--size.depth", "2", "--size.dtype", "float32"),
    ]
    capsys.readouterr()


REFUSED = {
    "--preset mode-7b": r"`preset` must be one of mode-100b, .* got 'mode-7b'",
    "--arm sparse": r"`arm` must be one of dense, .* got 'sparse'",
    "--memory 0": r"`memory` must be above 0, got 0.0",
    "--memory nan": r"`memory` must be finite, got nan",
    "--minutes -1": r"`minutes` must be above 0, got -1.0",
    "--mesh.data 0": r"`mesh.data` must be at least 1, got 0",
    "--mesh.data 2 --mesh.expert 4": r"must be all 4 devices of tpu:v5e:2x2, got 2 times 4",
    "--mesh.data 3": r"must be all 4 devices of tpu:v5e:2x2, got 3 times 1",
    "--mesh.expert 4 --size.experts 6": r"`mesh.expert` must divide .* 6, got 4. Try 2",
    "--size.batch 6": r"`size.batch` must divide over all 4 devices .* got 6.* is 8",
    "--size.batch 0": r"`size.batch` must be at least 1, got 0",
    "--size.vocab 100": r"`size.vocab` must be at least 257.* got 100",
    "--size.heads 3": r"`dim` must be `num_heads` times an even number.* got dim=64",
    "--size.kv-heads 3": r"`num_heads` must be divisible by `num_kv_heads`, got 4 and 3",
}


@pytest.mark.parametrize("words", REFUSED)
def test_bad_input_is_refused(
    words: str, pretended: list[MeshOf], tmp_path: Path, capsys: pytest.CaptureFixture[str]
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
    assert 'pip install ".[aot-tpu]"' in capsys.readouterr().err


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
    result, text = planned(tmp_path, size=dataclasses.replace(SIZE, dim=256, length=128))
    assert result.memory_bytes == int(15.75 * GIB)
    assert result.first is not None
    counted, compiler = result.first.counted, result.first.compiler
    assert compiler["argument_bytes"] == pytest.approx(counted["argument_bytes"], rel=0.05)
    assert compiler["needed_bytes"] > compiler["argument_bytes"]
    names = [name for name in result.first.exchanges if name.startswith("all-to-all")]
    assert names == ["all-to-all (2 a step each)"]  # two turns of a dense and a routed layer
    assert names[0] in text


@TPU
def test_what_a_tpu_compiler_refuses_does_not_fit(tmp_path: Path) -> None:
    size = Size(dim=4096, depth=2, heads=32, length=4096, batch=2, vocab=32768)
    result, text = planned(tmp_path, arm="dense", size=size, target="tpu:v5e:1x1", minutes=0.01)
    compiler = result.trials[0].compiler
    assert compiler.keys() == {"needed_bytes", "seconds"}
    assert compiler["needed_bytes"] > result.memory_bytes
    assert "does not fit, needs" in text


@GPU
def test_a_gpu_compiler_agrees(tmp_path: Path) -> None:
    result, _ = planned(tmp_path, arm="mod", target="cuda:h100")
    assert result.first is not None
    counted, compiler = result.first.counted, result.first.compiler
    assert compiler["argument_bytes"] == pytest.approx(counted["argument_bytes"], rel=0.02)
    assert "flops" not in compiler
    assert result.first.exchanges == {}
