"""Ctrl-C and SIGTERM at any moment end a command, with 130 and 143, and nothing is lost.

In other processes, at moments that are counted in events and not in seconds: at the n-th module
that is imported, at the n-th file that is written, in the middle of training.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mode.lab import interrupts
from mode.lab.files import read_record
from mode.lab.run import TrainResult
from tests.lab.helpers import repeating_texts


pytestmark = pytest.mark.optimized


# Sends the signal to its own process at the n-th audit event of one kind.
AT_EVENT = """
import os, sys
kind, number, count = sys.argv[1], int(sys.argv[2]), [int(sys.argv[3])]

def hook(event, args):
    if event == kind:
        count[0] -= 1
        if count[0] == 0:
            os.kill(os.getpid(), number)

from mode.lab.__main__ import main
sys.addaudithook(hook)
sys.exit(main(sys.argv[4:]))
"""
FLAGS = [
    *("--size.dim", "8", "--size.depth", "2", "--size.heads", "1", "--size.length", "32"),
    *("--size.batch", "2", "--steps", "12", "--held-out", "2", "--save-every", "5"),
    *("--arm", "dense"),  # of the fewest programs; files and signals are those of every arm
]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> str:
    return repeating_texts(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which nothing is compiled twice."""
    folder = str(tmp_path_factory.mktemp("compiled"))
    own = {"JAX_COMPILATION_CACHE_DIR": folder, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    return {**os.environ, **own}


def command(out: Path, texts: str) -> list[str]:
    return ["train", "--out", str(out), "--data", texts, *FLAGS]


def interrupted(
    event: str, number: int, count: int, words: list[str], env: dict[str, str]
) -> subprocess.CompletedProcess[str]:
    """Runs a command that is interrupted at the `count`-th event."""
    args = [sys.executable, "-c", AT_EVENT, event, str(number), str(count), *words]
    return subprocess.run(args, capture_output=True, text=True, env=env)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("count", [1, 30, 300, 600])
def test_while_modules_are_imported(
    number: int, count: int, tmp_path: Path, texts: str, cache: dict[str, str]
) -> None:
    """Where JAX's callback on garbage collection loses exceptions; nothing is written yet."""
    ended = interrupted("import", number, count, command(tmp_path / "run", texts), cache)
    assert ended.returncode == 128 + number
    assert ended.stderr.splitlines()[-1] == (
        "mode-lab: interrupted. The same command goes on from the last checkpoint."
    )
    assert "Traceback" not in ended.stderr
    assert not (tmp_path / "run").exists()


def test_at_any_file_and_the_run_is_the_unbroken_one(
    tmp_path: Path, texts: str, cache: dict[str, str]
) -> None:
    """Interrupted over and over, each time some files later; the last attempt finishes.

    Its losses are, bit for bit, those of a run that nobody interrupted.
    """
    whole, out = tmp_path / "whole", tmp_path / "run"
    args = [sys.executable, "-m", "mode.lab", *command(whole, texts)]
    assert subprocess.run(args, capture_output=True, env=cache).returncode == 0
    codes = []
    for count in (1, 4, 8, 10_000):
        number = signal.SIGTERM if len(codes) % 2 else signal.SIGINT
        ended = interrupted("os.rename", number, count, command(out, texts), cache)
        codes.append(ended.returncode)
        assert "Traceback" not in ended.stderr
    assert codes[-1] == 0
    assert set(codes[:-1]) <= {0, 130, 143}
    assert 130 in codes
    results = [read_record(folder / "result.json", TrainResult) for folder in (whole, out)]
    assert results[0].losses == results[1].losses
    assert results[0].evaluation == results[1].evaluation


def test_the_first_signal_is_deferred_and_the_second_is_not() -> None:
    """Inside `deferred`; outside, the first one ends the process."""
    code = (
        "import os, signal, sys\nfrom mode.lab import interrupts\n"
        "interrupts.install('the line')\n"
        "def send(): os.kill(os.getpid(), signal.SIGTERM)\n"
        "try:\n"
        "    with interrupts.deferred():\n"
        "        send()\n"
        "        print('still here', interrupts.received())\n"
        "        if sys.argv[1] == 'twice': send()\n"
        "except KeyboardInterrupt:\n"
        "    print('raised')\n"
        "    send()\n"
    )
    for word, printed in (("once", "still here 15\nraised\n"), ("twice", "still here 15\n")):
        ended = subprocess.run([sys.executable, "-c", code, word], capture_output=True, text=True)
        assert (ended.returncode, ended.stdout) == (143, printed)
        assert ended.stderr == "the line\n"


def test_nothing_was_received_here() -> None:
    """The tests above signal other processes."""
    assert interrupts.received() in (0, signal.SIGINT, signal.SIGTERM)
