"""Names of targets, sizes of meshes, missing compilers, and errors of too little memory."""

import importlib.util
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

import mode
from mode.aot import OutOfMemory, compile_for, device_memory_bytes, mesh_for

from .compilers import GPU, TPU


pytestmark = pytest.mark.optimized


X = jax.ShapeDtypeStruct((4, 8), jnp.float32)


def test_importing_it_is_cheap() -> None:
    """`import mode` brings neither compilers' descriptions nor the libraries of the assertions."""
    program = (
        "import sys, mode; "
        "names = ('mode.aot', 'mode.testing', 'jax.experimental.topologies', 'chex', 'optax'); "
        "print([name for name in names if name in sys.modules]); "
        "mode.aot.compile_for; print('jax.experimental.topologies' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.stdout.split("\n")[:2] == ["[]", "False"], result.stderr


@pytest.mark.parametrize(
    ("text", "needed"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 18.50G of 15.75G hbm",
            18.5,
        ),
        (
            "RESOURCE_EXHAUSTED: total memory required (18.50G) exceeds available HBM (15.75G).",
            18.5,
        ),
        ("INVALID_ARGUMENT: Used 18.50G of 15.75G hbm", None),
        ("RESOURCE_EXHAUSTED: something else", None),
    ],
)
def test_too_little_memory_is_read_off_the_error(text: str, needed: float | None) -> None:
    error = OutOfMemory.read(RuntimeError(text))
    if needed is None:
        assert error is None
        return
    assert error is not None
    assert (error.needed, error.available) == (int(needed * 2**30), int(15.75 * 2**30))
    assert str(error) == text
    assert OutOfMemory.read(error) is error


@TPU
@pytest.mark.parametrize(
    ("target", "gib"), [("tpu:v5e:1x1", 15.75), ("tpu:v5e:4x4", 15.75), ("tpu:v6e:2x2", 31.25)]
)
def test_the_compiler_says_how_much_memory_there_is(target: str, gib: float) -> None:
    # Compilers of different versions keep some megabytes more or less for themselves.
    assert device_memory_bytes(target) == pytest.approx(gib * 2**30, abs=2**26)


def test_an_h100_has_80_gb() -> None:
    assert device_memory_bytes("cuda:h100") == pytest.approx(80e9, rel=0.1)


@TPU
def test_a_program_that_needs_too_much_memory_says_so() -> None:
    x = jax.ShapeDtypeStruct((4 * 2**10, 2**23), jnp.float32)
    with pytest.raises(OutOfMemory) as error:
        compile_for("tpu:v5e:2x2", lambda x: x + 1, x)
    assert error.value.needed >= 2**36 > error.value.available


@GPU
def test_an_h100_is_one_device() -> None:
    mesh = mesh_for("cuda:h100")
    assert mesh.shape == {"data": 1}
    assert compile_for("cuda:h100", lambda x: x @ x.T, X).argument_bytes == 128


@TPU
@pytest.mark.parametrize("target", ["tpu:v5e:3x3", "tpu:v9:2x2", "tpu:v5e:32x32"])
def test_a_topology_that_does_not_exist_is_refused(target: str) -> None:
    with pytest.raises(ValueError, match=rf"`target` must .* got '{target}'"):
        mesh_for(target)


@pytest.fixture
def _nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)


@pytest.mark.usefixtures("_nothing_installed")
@pytest.mark.parametrize(
    ("target", "extra"), [("tpu:v5e:2x2", "aot-tpu"), ("cuda:h100", "aot-gpu")]
)
def test_a_missing_compiler_names_its_extra(target: str, extra: str) -> None:
    with pytest.raises(ImportError, match=rf"needs .*, which the extra `{extra}` installs"):
        compile_for(target, jnp.sin, X)


@pytest.mark.parametrize("target", ["tpu", "tpu:v5e", "cuda:a100", "metal:m4"])
def test_an_unknown_target_is_refused(target: str) -> None:
    with pytest.raises(ValueError, match=rf"`target` must be .* got '{target}'"):
        compile_for(target, jnp.sin, X)


def test_rules_are_one_entry_per_argument() -> None:
    with pytest.raises(ValueError, match=r"`rules` must have an entry for each of the 2 arg.* 1"):
        compile_for("tpu:v5e:2x2", jnp.add, X, X, rules=[mode.BATCH_RULES])


@TPU
def test_axes_take_all_devices() -> None:
    with pytest.raises(ValueError, match=r"`axes` must take all 4 devices .* takes 2"):
        mesh_for("tpu:v5e:2x2", {"data": 2})
