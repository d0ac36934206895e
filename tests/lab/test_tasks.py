"""The tasks with known answers: the sequences by a slow reading of each, arms, and the command."""

import itertools
from functools import partial
from pathlib import Path

import equinox as eqx
import jax
import numpy as np
import pytest
from rich.console import Console

import mode
from mode.lab.ablate import run_rereport
from mode.lab.commands import TASK_RECIPE, Rereport, Tasks
from mode.lab.options import OWN_TASK_ARMS, RECURSIONS, TASK_ARMS, TASK_TEXTS, Recipe
from mode.lab.tasks.arms import TaskSize, build, mixture_of_depths, train_and_score
from mode.lab.tasks.command import run_tasks, train_tasks
from mode.lab.tasks.records import Score, read_results
from mode.lab.tasks.sequences import arithmetic, copy, recall, task_named, with_oracle, words
from tests.lab.helpers import quiet, said


each_task = pytest.mark.parametrize("name", TASK_TEXTS)
SMALL = TaskSize(dim=8, heads=2, batch=4)


def rows(task, count=32, seed=0):
    """Sequences as lists of (token, target, scored, class)."""
    batch = jax.device_get(task.batch(jax.random.key(seed), count))
    columns = (batch.tokens, batch.targets, batch.scored, batch.classes)
    return [
        list(zip(*(column[i].tolist() for column in columns), strict=True)) for i in range(count)
    ]


@each_task
def test_needed_tokens_fill_the_slots(name: str) -> None:
    """In every sequence; ids and targets are below the vocabulary, and scored tokens are needed."""
    task = task_named(name)
    assert task.capacity * task.length == task.slots
    for row in rows(task):
        needed = [task.classes[kind] in task.needed for *_, kind in row]
        assert len(row) == task.length
        assert sum(needed) == task.slots
        assert all(need for need, (*_, scored, _) in zip(needed, row, strict=True) if scored)
        assert all(
            0 <= token < task.vocab and 0 <= target < task.vocab for token, target, *_ in row
        )


@each_task
def test_the_key_alone_decides(name: str) -> None:
    """The same key gives the same sequences, another one others."""
    task = task_named(name)
    assert rows(task) == rows(task)
    assert rows(task) != rows(task, seed=1)


def test_recall_by_reading_it() -> None:
    """A dictionary answers every question."""
    task, keys = recall(), 8
    for row in rows(task):
        values, questions = {}, 0
        for (token, _, _, kind), (following, *_) in itertools.pairwise(row):
            if task.classes[kind] == "key":
                values[token] = following
        for token, target, scored, kind in row:
            assert scored == (task.classes[kind] == "question")
            if scored:
                assert values[token - 2 * keys] == target
                questions += 1
        assert questions == len(values) == 4


@pytest.mark.parametrize(("points", "density"), [(3, 0.02), (3, 0.5), (5, 0.125)])
def test_words_by_moving_points(points: int, density: float) -> None:
    """Each permutation moves the points on; the target is the number of the product."""
    task = words(points, density)
    group = list(itertools.permutations(range(points)))
    some = group[:: max(1, len(group) // 8)]
    assert task.slots == max(1, round(density * task.length))
    products = set()
    for row in rows(task):
        where = tuple(range(points))
        for token, target, scored, kind in row:
            assert scored == (task.classes[kind] == "permutation") == (token < len(some))
            if scored:
                where = tuple(some[token][place] for place in where)
                assert group[target] == where
                products.add(where)
    assert len(products) > 2


def test_copy_by_searching_the_mark() -> None:
    """Behind the second mark comes what stood behind the first."""
    task = copy()
    for row in rows(task):
        tokens = [token for token, *_ in row]
        first, second = tokens.index(8), tokens.index(9)
        assert first < second
        assert tokens[first + 1 : first + 7] == tokens[second + 1 : second + 7]
        for place, (_, target, scored, _) in enumerate(row):
            assert scored == (second <= place < second + 6)
            if scored:
                assert target == tokens[place + 1]


def test_arithmetic_by_adding() -> None:
    """A variable's digit is behind it; sums are of the two variables that are named."""
    task, variables, base = arithmetic(), 4, 3
    left, right = variables + base, 2 * variables + base
    for row in rows(task):
        tokens = [token for token, *_ in row]
        digits = {tokens[i]: tokens[i + 1] - variables for i in range(0, 2 * variables, 2)}
        sums = 0
        for place, (token, target, scored, _) in enumerate(row):
            if scored:
                total = digits[tokens[place - 1] - left] + digits[token - right]
                assert target == variables + total % base
                sums += 1
        assert sums == variables


@each_task
def test_the_oracle_selects_what_is_needed_and_nothing_else(name: str) -> None:
    """With more slots than that, too."""
    task = task_named(name)
    batch = task.batch(jax.random.key(3), 4)
    model = build(
        "oracle",
        SMALL,
        mixture_of_depths,
        vocab=task.vocab,
        capacity=task.capacity,
        key=jax.random.key(0),
    )
    for wide in (model, mode.with_capacity(model, 1.0)):
        _, (routing,) = with_oracle(wide, task, batch)(batch.tokens)
        selected = np.asarray(routing.selected[0, ..., 0])
        np.testing.assert_array_equal(selected, np.asarray(task.is_needed(batch.classes)))


@pytest.mark.parametrize("name", ["recall", "copy", "arithmetic"])
def test_the_ablation_s_arms_of_depth_have_the_slots_of_the_task(name: str) -> None:
    """So has their first router, but that of a recursion: twice them."""
    task = task_named(name)
    for arm in TASK_ARMS:
        if arm in OWN_TASK_ARMS or not (arm.startswith("mod-") or arm in RECURSIONS):
            continue
        model = eqx.filter_eval_shape(
            lambda arm=arm: build(
                arm,
                SMALL,
                mixture_of_depths,
                vocab=task.vocab,
                capacity=task.capacity,
                key=jax.random.key(0),
            )
        )
        slots = mode.token_capacity(task.length, mode.routers(model)[0].capacity)
        assert slots == (2 if arm in RECURSIONS else 1) * task.slots


@pytest.mark.parametrize("arm", OWN_TASK_ARMS)
def test_every_arm_trains(arm: str) -> None:
    """Arms with a routed layer say which classes got a slot; only learned selection looks ahead."""
    task = recall()
    top_k, causal = train_and_score(task, arm, Recipe(), steps=6, seed=0, size=SMALL)
    assert 0 <= top_k.accuracy <= 1
    is_routed = arm not in ("dense", "left-out")
    assert set(top_k.hits) == (set(task.classes) if is_routed else set())
    assert (causal is not None) == (arm == "learned")
    if arm == "oracle":
        assert top_k.hits == {"key": 0, "value": 1, "question": 1, "filler": 0}
    if is_routed:
        selected = np.array(top_k.selected)
        assert selected.sum() == task.slots * len(selected)


@pytest.mark.parametrize("arm", ["mod-predictor", "mod-both", "recursion-depth", "mode-free"])
def test_arms_of_the_ablation_train(arm: str) -> None:
    """With a loss and a causal rule of their own, where they have one."""
    task = recall(length=32, pairs=2, keys=4)
    top_k, causal = train_and_score(task, arm, Recipe(), steps=4, seed=0, size=SMALL)
    assert set(top_k.hits) == set(task.classes)
    assert (causal is not None) == (arm in ("mod-predictor", "mod-both"))


def test_recall_is_learned() -> None:
    """A short training finds the questions; random selection gives all classes the same."""
    task = recall(length=32, pairs=2, keys=4)
    learned, causal = train_and_score(task, "learned", TASK_RECIPE, steps=300, seed=0)
    random, _ = train_and_score(task, "random", TASK_RECIPE, steps=100, seed=0)
    assert learned.hits["question"] > 0.8
    assert causal is not None
    assert causal.hits["question"] > 0.8
    assert learned.accuracy > random.accuracy
    assert max(random.hits.values()) - min(random.hits.values()) < 0.1


def test_each_run_drops_its_programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After some thirty runs a process had as many as it can hold, and the compiler crashed."""
    dropped: list[str] = []
    score = Score(accuracy=0.5, hits={}, classes=(), selected=())
    monkeypatch.setattr("mode.lab.tasks.command.train_and_score", lambda *_, **__: (score, None))
    monkeypatch.setattr(jax, "clear_caches", lambda: dropped.append("programs"))
    train_tasks(Tasks(tmp_path / "t", arms=("dense", "left-out"), seeds=3), quiet())
    assert len(dropped) == 6


def test_the_command_goes_on_and_reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Finished runs are kept, another density is refused, and `report` writes it all again."""
    small = partial(train_and_score, size=SMALL)
    monkeypatch.setattr("mode.lab.tasks.command.train_and_score", small)
    options = {"steps": 4, "recipe": Recipe(learning_rate=3e-3)}
    first = Tasks(tmp_path / "t", tasks=("copy",), arms=("dense", "learned"), seeds=1, **options)
    run_tasks(first, quiet())
    times = [path.stat().st_mtime_ns for path in sorted((tmp_path / "t/results").iterdir())]
    console = quiet()
    more = Tasks(tmp_path / "t", tasks=("copy",), arms=("learned", "random"), seeds=2, **options)
    run_tasks(more, console)
    results = sorted((tmp_path / "t/results").iterdir())
    kept = [
        p.stat().st_mtime_ns
        for p in results
        if p.name in ("copy_dense_0.json", "copy_learned_0.json")
    ]
    assert kept == times
    assert [(r.arm, r.seed) for r in read_results(tmp_path / "t")].count(("random", 1)) == 1
    assert len(results) == 5
    text = (tmp_path / "t/report.md").read_text()
    assert "slots: span \\*" in text
    assert (tmp_path / "t/copy.png").stat().st_size > 1000
    assert "# needed, with a slot" in said(console)
    console = quiet()
    run_rereport(Rereport(tmp_path / "t"), console)
    assert "copied later" in said(console)
    with pytest.raises(ValueError, match=r"density: 0\.0625 there, 0\.5 now"):
        run_tasks(Tasks(tmp_path / "t", density=0.5, **options), quiet())


@pytest.mark.parametrize(
    ("options", "words_of_it"),
    [
        ({"arms": ("mod",)}, "`arms` of dense, left-out"),
        ({"arms": ()}, "must each name at least one"),
        ({"tasks": ()}, "must each name at least one"),
        ({"tasks": ("s4",)}, "`tasks` must be of recall, s3"),
    ],
)
def test_unknown_tasks_and_arms(options: dict, words_of_it: str, tmp_path: Path) -> None:
    """Refused before anything is written."""
    with pytest.raises(ValueError, match=words_of_it):
        run_tasks(Tasks(tmp_path / "t", **options), Console(quiet=True))
    assert not (tmp_path / "t").exists()
