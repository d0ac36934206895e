"""The command line: what it imports, what it refuses, and that nothing leaves it as a traceback.

Ranges are tried of every option that takes a number, and emptiness of every option: 0, -1, nan,
inf, 1e30, "". Those that are in range are known here by a table of their own.
"""

import dataclasses
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from mode.lab import __main__ as lab, commands
from mode.lab.__main__ import main


OPTIONS = {
    "ablate": commands.Ablation,
    "report": commands.Rereport,
    "train": commands.Training,
    "generate": commands.Generating,
    "analyze": commands.Analysis,
    "isoflop": commands.Isoflop,
    "claims": commands.Claims,
    "plan": commands.Planning,
}
HEAVY = ("jax", "equinox", "numpy", "grain", "matplotlib", "pandas", "scipy", "chex", "optax")


def in_a_process(code: str, *args: str) -> subprocess.CompletedProcess[str]:
    """Runs Python code with arguments."""
    return subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True)


@pytest.mark.parametrize(
    "words",
    [
        *(["--help"], ["train", "--help"], ["isoflop", "-h"], ["plan", "-h"], ["nothing"]),
        *(["train", "--steps", "0"], ["train", "--nothing", "1"], ["train", "--out="]),
    ],
    ids=" ".join,
)
def test_help_and_refusals_import_nothing_heavy(words: list[str]) -> None:
    """So they come at once: 0.6 CPU-seconds, of which most is tyro's."""
    code = (
        "import sys\nfrom mode.lab.__main__ import main\n"
        "try:\n    code = main(sys.argv[1:])\nexcept SystemExit as error:\n    code = error.code\n"
        f"loaded = [name for name in {HEAVY} if name in sys.modules]\n"
        "print(code, loaded, file=sys.stderr)"
    )
    last = in_a_process(code, *words).stderr.splitlines()[-1]
    assert last == f"{0 if words[-1] in ('--help', '-h') else 2} []"


def test_import_mode_imports_little() -> None:
    """JAX comes with the first name; chex, optax and compilers with none of the layers."""
    heavy = (*HEAVY, "jax.experimental.topologies")
    code = (
        "import sys, mode\n"
        f"print([name for name in {heavy} if name in sys.modules])\n"
        "mode.MixtureOfDepths, mode.generate\n"
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    assert in_a_process(code).stdout.splitlines() == ["[]", "['jax', 'equinox', 'numpy']"]


def test_every_public_name_is_there() -> None:
    """The names of the stub, each from its own place."""
    import mode

    assert {"MixtureOfDepths", "testing", "aot", "generate"} <= set(dir(mode))
    for name in dir(mode):
        assert getattr(mode, name) is not None
    with pytest.raises(AttributeError, match="nothing"):
        getattr(mode, "nothing")  # noqa: B009


def flags(kind: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The flags of a command and their types."""
    for name, hint in get_type_hints(kind).items():
        flag = f"{prefix}{name.replace('_', '-')}"
        if dataclasses.is_dataclass(hint):
            yield from flags(hint, f"{flag}.")
        else:
            yield flag, hint


def is_number(hint: Any) -> bool:
    """Whether an option takes numbers."""
    return hint in (int, float) or any(map(is_number, get_args(hint)))


CASES = [
    (name, flag) for name, kind in OPTIONS.items() for flag, hint in flags(kind) if is_number(hint)
]
# What may be 0.
ZERO = {"seed", "temperature", "weight-decay", "warmup", "noop", "process", "router-cost", "ramp"}


class Started(Exception):
    """A command began to run."""


@pytest.fixture
def guarded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder in which no command gets beyond the check of its options."""

    def command(name: str) -> Any:
        def start(options: Any, console: Any) -> None:
            raise Started(name)

        return start

    monkeypatch.setattr(lab, "command", command)
    monkeypatch.setenv("MODE_LAB_DEBUG", "1")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "-inf", "1e30", "1" + "0" * 30])
@pytest.mark.parametrize(("name", "flag"), CASES, ids=" ".join)
def test_numbers_out_of_range_are_refused(
    name: str, flag: str, value: str, guarded: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With code 2 and a message that names the option, before anything is written."""
    if value == "0" and flag.rpartition(".")[2] in ZERO:
        with pytest.raises(Started):
            main([name, f"--{flag}={value}"])
        return
    try:
        code = main([name, f"--{flag}={value}"])
    except SystemExit as error:
        code = error.code
    assert code == 2
    said = capsys.readouterr()
    text = said.err + said.out
    assert flag in text or flag.replace("-", "_") in text
    assert "Traceback" not in text
    assert not list(guarded.iterdir())


@pytest.mark.parametrize(
    ("name", "flag"),
    [(name, flag) for name, kind in OPTIONS.items() for flag, _ in flags(kind)],
    ids=" ".join,
)
def test_empty_values_are_refused(
    name: str, flag: str, guarded: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An empty folder would be the current one. (An empty prompt begins a document.)"""
    for words in ([f"--{flag}", ""], [f"--{flag}="]):
        if flag == "prompt":
            with pytest.raises(Started):
                main([name, *words])
            continue
        assert main([name, *words]) == 2
        assert f"`--{flag}` must have a value" in capsys.readouterr().err
    assert not list(guarded.iterdir())


def test_the_walk_sees_every_kind_of_option() -> None:
    """Plain numbers, those that may be left out, several of them, and those of nested groups."""
    walked = {flag for _, flag in CASES}
    assert {"budget", "minutes", "top-k", "rates", "budgets", "size.dim", "recipe.clip"} <= walked
    assert {"devices.data", "mesh.expert", "memory", "base.capacity", "log-every"} <= walked
    assert not {"out", "data", "size.dtype", "arms", "size.remat"} & walked


def test_a_value_may_end_as_an_option_does(guarded: Path) -> None:
    """Only options are looked at for a value that is missing."""
    with pytest.raises(Started):
        main(["generate", "--prompt", "x = y ="])


@pytest.mark.parametrize(
    "error",
    [TypeError("a\nb"), KeyError("x"), RecursionError(), MemoryError(), AssertionError("no")],
    ids=repr,
)
def test_an_error_of_ours_is_one_line(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It says where, and how to see all; the code tells it from a mistake of the user."""

    def command(name: str) -> Any:
        def fail(options: Any, console: Any) -> None:
            raise error

        return fail

    monkeypatch.setattr(lab, "command", command)
    assert main(["report"]) == 70
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"{type(error).__name__} at test_main.py:" in said
    monkeypatch.setenv("MODE_LAB_DEBUG", "1")
    with pytest.raises(type(error)):
        main(["report"])


def test_the_table_of_numbers_is_that_of_python() -> None:
    """The values of the walk are what they say."""
    assert math.isnan(float("nan"))
    assert int("1" + "0" * 30) == 10**30


@pytest.mark.parametrize(
    "words",
    [["--seeds", "9"], ["--base.dim", "8"], ["--rates", "0.5"], ["--held-out", "3"]],
    ids=" ".join,
)
def test_a_preset_takes_no_sizes_of_others(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They would be ignored."""
    out = tmp_path / "sweep"
    assert main(["isoflop", "--out", str(out), "--preset", "tiny", *words]) == 2
    assert f"{words[0].partition('.')[0]} must be left out" in capsys.readouterr().err
    assert not out.exists()
