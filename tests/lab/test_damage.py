"""Damaged files of every kind under every command: one line that names the file, and no traceback.

Damages are drawn with a seed; `MODE_DAMAGES=1000 pytest tests/lab/test_damage.py` draws more.
"""

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from mode.lab.__main__ import main
from mode.lab.evidence.records import Store
from mode.lab.folder import claim
from tests.lab.helpers import repeating_texts
from tests.lab.records import SETTINGS, made_up


COUNT = int(os.environ.get("MODE_DAMAGES", "200"))
SIZES = [
    *("--size.dim", "8", "--size.depth", "2", "--size.heads", "1", "--size.length", "32"),
    *("--size.batch", "2", "--held-out", "2"),
]


def arguments(world: Path) -> dict[str, list[str]]:
    """The commands that read files back, each for the folder it reads."""
    data = ["--data", str(world / "texts" / "*.txt"), *SIZES]
    run = str(world / "run")
    budget = ["--arms", "dense", "mod", "--budget", "7e-3", "--no-recall"]
    return {
        "train": ["train", "--out", run, "--steps", "4", "--save-every", "2", *data],
        "generate": ["generate", "--checkpoint", run, "--steps", "2"],
        "analyze": ["analyze", "--checkpoint", run, "--sequences", "2"],
        "ablate": ["ablate", "--out", str(world / "ablation"), *budget, *data],
        "report": ["report", "--out", str(world / "ablation")],
        "report of a sweep": ["report", "--out", str(world / "sweep")],
        "claims": ["claims", "--out", str(world / "sweep")],
    }


FOLDERS = {
    "train": "run",
    "generate": "run",
    "analyze": "run",
    "ablate": "ablation",
    "report": "ablation",
    "report of a sweep": "sweep",
    "claims": "sweep",
}
# Commands that compile are drawn less often.
WEIGHTS = [3, 1, 0.5, 0.5, 6, 6, 6]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Finished folders of every kind."""
    folder = tmp_path_factory.mktemp("world")
    (folder / "texts").mkdir()
    repeating_texts(folder / "texts")
    claim(folder / "sweep", SETTINGS)
    for seed in range(2):
        for arm in ("dense", "mod", "mod-random"):
            Store(folder / "sweep").add(made_up(arm, 2.0 + seed, seed=seed))
    Store(folder / "sweep").fail(made_up("moe", 1.0).run, "the loss is not finite")
    for words in arguments(folder).values():
        assert main(words) == 0
    return folder


Damage = Callable[[Path, random.Random, list[Path]], None]


def cut(path: Path, draw: random.Random, others: list[Path]) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: draw.randrange(max(1, len(content)))])


def empty(path: Path, draw: random.Random, others: list[Path]) -> None:
    path.write_bytes(b"")


def flip(path: Path, draw: random.Random, others: list[Path]) -> None:
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def noise(path: Path, draw: random.Random, others: list[Path]) -> None:
    path.write_bytes(draw.randbytes(draw.randrange(1, 3000)))


def other_json(path: Path, draw: random.Random, others: list[Path]) -> None:
    texts = ["[]", "null", "3", '"x"', "{}", "true", "NaN", "[" * 5000, '{"a": 1}', "1e999"]
    path.write_text(draw.choice(texts))


def other_field(path: Path, draw: random.Random, others: list[Path]) -> None:
    """Changes a field anywhere in the tree: removed, added, null, of another type or value."""
    try:
        tree = json.loads(path.read_bytes())
    except ValueError:
        return noise(path, draw, others)
    node = tree
    while True:
        keys = list(node) if isinstance(node, dict) else range(len(node))
        if not keys:
            break
        key = draw.choice(list(keys))
        if isinstance(node[key], dict | list) and node[key] and draw.random() < 0.8:
            node = node[key]
            continue
        match draw.randrange(4):
            case 0 if isinstance(node, dict):
                del node[key]
            case 1 if isinstance(node, dict):
                node["extra"] = 1
            case 2:
                node[key] = None
            case _:
                node[key] = draw.choice([1.5, -1, "x", [], {}, True, 10**40, float("nan")])
        break
    path.write_text(json.dumps(tree))


def folder(path: Path, draw: random.Random, others: list[Path]) -> None:
    path.unlink()
    path.mkdir()


def missing(path: Path, draw: random.Random, others: list[Path]) -> None:
    path.unlink()


def of_others(path: Path, draw: random.Random, others: list[Path]) -> None:
    content = draw.choice(others).read_bytes()
    path.write_bytes(content)


def link_to_itself(path: Path, draw: random.Random, others: list[Path]) -> None:
    path.unlink()
    path.symlink_to(path)


DAMAGES: list[Damage] = [
    *(cut, empty, flip, noise, other_json, other_field, other_field, folder, missing, of_others),
    link_to_itself,
]


def read_back(command: str, path: Path) -> bool:
    """Whether a command reads a file of its folder."""
    if "checkpoints" in path.parts:
        return command in ("train", "generate", "analyze")
    if path.suffix != ".json" or "analysis" in path.parts or path.stem == "report":
        return False
    if path.name == "result.json":
        return command in ("ablate", "report")
    if path.name == "config.json":
        return "arms" not in path.parts
    return "records" in path.parts or ("failures" in path.parts and "report" in command)


@pytest.mark.parametrize("part", range(10))
def test_no_damage_leaves_a_traceback(
    part: int,
    world: Path,
    tmp_path: Path,
    capsysbinary: pytest.CaptureFixture[bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Code 2 and one line with the name of what is wrong, or the run goes on without that file."""
    monkeypatch.setenv("MODE_LAB_DEBUG", "1")  # an error of ours would be raised
    for number in range(part, COUNT, 10):
        draw = random.Random(number)
        place = tmp_path / str(number)
        shutil.copytree(world, place)
        (command,) = draw.choices(list(FOLDERS), WEIGHTS)
        inside = place / FOLDERS[command]
        files = sorted(path for path in inside.rglob("*") if path.is_file())
        path = draw.choice([path for path in files if read_back(command, path)] or files)
        before = path.read_bytes()
        damage = draw.choice(DAMAGES)
        damage(path, draw, [other for other in files if other != path])
        is_same = path.is_file() and path.read_bytes() == before
        case = f"{number}: {damage.__name__} of {path.relative_to(place)} under {command}"
        capsysbinary.readouterr()
        code = main(arguments(place)[command])
        out, err = (part.decode(errors="replace") for part in capsysbinary.readouterr())
        assert code in (0, 2), case
        assert "Traceback" not in err, case
        if code == 2:
            assert err.startswith("mode-lab: "), case
            assert path.stem in err or path.parent.name in err, f"{case}: {err}"
        elif read_back(command, path) and not is_same and damage not in (missing, link_to_itself):
            # What is lost is said. (Settings that are missing are written again: records and
            # checkpoints hold them too.)
            assert path.stem in out + err or "checkpoints" in path.parts, case
        shutil.rmtree(place)
