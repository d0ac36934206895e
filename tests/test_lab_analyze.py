"""`mode-lab analyze`: every number against a slow count of the same, for every arm; and what the
command writes, of any text."""

import collections
import dataclasses
import functools
import io
import itertools
import json
import math
import statistics
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from rich.console import Console

import mode
from mode.lab import analysis_report, measures, run
from mode.lab.__main__ import main
from mode.lab.analysis_plots import plot_analysis
from mode.lab.analyze import Analyzing, run_analysis
from mode.lab.arms import ARMS, Arm, Size, arms_named
from mode.lab.checkpoint import Checkpoints
from mode.lab.data import Batch, Documents, Sequences, read_corpus
from mode.lab.evaluate import causal_model
from mode.lab.files import claim
from mode.lab.observe import Observed, Router, observe, places_of
from mode.lab.passage import find_passage, glyphs, lines_of
from mode.lab.step import begin
from mode.lab.summary import summarise

from .helpers import assert_close


SIZE = Size(dim=8, depth=4, heads=1, length=32, batch=3, experts=2, noop=1, capacity=0.25)
ROUTED = [arm.name for arm in ARMS if arm.routed is not None]
LINE = "def f_{0}(x1):  # line {0}, of 12\n    return 'it is' + x1\n"


def documents(*texts: str | bytes) -> Documents:
    pieces = [
        np.array([256, *(text.encode() if isinstance(text, str) else text)], np.uint16)
        for text in texts
    ]
    starts = np.cumsum([0, *map(len, pieces[:-1])])
    return Documents(tuple(map(str, range(len(texts)))), np.concatenate(pieces), starts)


# Two files, whose border is inside a sequence, and padding at the end.
DOCUMENTS = documents("".join(LINE.format(n) for n in range(3)), LINE.format(10) * 2 + "x")
SOURCE = Sequences(DOCUMENTS, SIZE.length)


def built(name: str, **changes: object) -> tuple[Arm, mode.Transformer]:
    (arm,) = arms_named([name])
    return arm, arm.build(dataclasses.replace(SIZE, **changes), key=jax.random.key(1))


@functools.cache
def observed(name: str) -> dict[str, Observed]:
    arm, model = built(name)
    models = {"top-k": model, "causal": causal_model(arm, model)}
    if arm.rule is None:
        models = {"as trained": model}
    return {
        name: observe(one, SOURCE, range(len(SOURCE)), batch=SIZE.batch, key=jax.random.key(2))
        for name, one in models.items()
    }


# Measures.


def slow_class(before: int, token: int) -> str:
    """By Python's own idea of ASCII characters."""

    def wordly(token: int) -> bool:
        return token != 256 and (token > 127 or chr(token).isalpha() or chr(token) == "_")

    if token == 256:
        return "document start"
    if token < 128 and chr(token) in " \t\n\r\v\f":
        return "space"
    if token < 128 and chr(token).isdigit():
        return "digit"
    if not wordly(token):
        return "punctuation"
    inside = wordly(before) or (before < 128 and chr(before).isdigit())
    return "word inside" if inside else "word start"


def test_classes_of_bytes() -> None:
    """Of every token after every other: 66,049 pairs, and those next to them."""
    tokens = np.array([[a, b] for a in range(257) for b in range(257)], np.uint16).ravel()
    before = [256, *tokens[:-1].tolist()]
    names = list(measures.CLASSES)
    found = [names[number] for number in measures.byte_classes(tokens)]
    assert found == list(map(slow_class, before, tokens.tolist()))


def test_entropy_is_the_mean_surprise() -> None:
    logits = np.random.default_rng(0).normal(0, 3, (5, 7, 11)).astype(np.float32)
    logits[0, 0, 3] = -np.inf
    found = measures.prediction_entropy(logits)
    for place in itertools.product(range(5), range(7)):
        powers = [math.exp(logit) for logit in logits[place].astype(float)]
        shares = [power / sum(powers) for power in powers]
        assert_close(found[place], -sum(p * math.log2(p) for p in shares if p > 0))


def test_chance_is_the_sum_over_who_takes() -> None:
    rates = [0.1, 0.7, 0.5, 1.0]
    slow = np.zeros(5)
    for taken in itertools.product([0, 1], repeat=4):
        slow[sum(taken)] += math.prod(
            rate if took else 1 - rate for rate, took in zip(rates, taken, strict=True)
        )
    assert_close(measures.chance(np.array(rates)), slow)


def slow_ranks(values: list[float]) -> list[float]:
    """Of each value, the mean place of its equals."""
    return [
        sum(other < value for other in values) + sum(other == value for other in values) / 2
        for value in values
    ]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(-5, 5)), min_size=2, max_size=25), st.data()
)
def test_correlations_are_those_of_the_repeated_tokens(
    pairs: list[tuple[int, int]], data: st.DataObject
) -> None:
    weights = [data.draw(st.integers(0, 3)) for _ in pairs]
    repeated = [pair for pair, weight in zip(pairs, weights, strict=True) for _ in range(weight)]
    x, y = np.array(pairs, float).T
    found = measures.correlations(x, y)(np.array(weights, float))
    columns = [[float(pair[n]) for pair in repeated] for n in (0, 1)]
    if any(len(set(column)) < 2 for column in columns):
        assert np.isnan(found).all()
        return
    assert_close(found[0], statistics.correlation(*columns))
    assert_close(found[1], statistics.correlation(*map(slow_ranks, columns)))


def test_intervals_are_those_of_whole_sequences_drawn_again() -> None:
    generator = np.random.default_rng(0)
    sequence = np.repeat(np.arange(6), [3, 9, 1, 5, 4, 7])
    classes = generator.integers(1, 4, len(sequence))
    compute = generator.integers(0, 3, len(sequence)).astype(float)
    draws = measures.resamples(6, 50, seed=3)
    assert (draws.sum(1) == 6).all()
    assert len({tuple(row) for row in draws.tolist()}) > 40
    found = measures.estimates(measures.class_ratios(classes, compute), sequence, draws)
    for number in range(len(measures.CLASSES)):

        def ratio(kept: list[int], number: int = number) -> float:
            own = [token for token in kept if classes[token] == number]
            spent = sum(compute[token] for token in kept)
            if not own or not spent:
                return math.nan
            share = sum(compute[token] for token in own) / spent
            return share / (len(own) / len(kept))

        everything = list(range(len(sequence)))
        assert_close(found[number].value, ratio(everything))
        several = []
        for row in draws:
            kept = [token for token in everything for _ in range(row[sequence[token]])]
            several.append(ratio(kept))
        known = [value for value in several if not math.isnan(value)]
        if not known:
            assert math.isnan(found[number].low)
            continue
        assert_close(found[number].low, np.percentile(known, 2.5))
        assert_close(found[number].high, np.percentile(known, 97.5))


def test_one_sequence_has_no_interval() -> None:
    statistic = measures.correlations(np.arange(4.0), np.array([1.0, 3.0, 2.0, 4.0]))
    (r, rho) = measures.estimates(statistic, np.zeros(4, int), measures.resamples(1, 9, seed=0))
    assert_close(r.value, 0.8)
    assert_close(rho.value, 0.8)
    assert math.isnan(r.low)
    assert math.isnan(r.high)


def test_every_weight_is_in_a_bin() -> None:
    values = np.concatenate([np.random.default_rng(0).normal(size=5000), [-900.0, 900.0]])
    edges = measures.bin_edges(values)
    assert edges[0] > -10
    assert edges[-1] < 10
    assert measures.binned(values, edges).sum() == len(values)
    assert measures.binned(values, edges)[0] >= 1
    alike = np.full(7, 0.3)
    assert measures.binned(alike, measures.bin_edges(alike)).sum() == 7


# Observations.


@eqx.filter_jit
def alone(
    model: mode.Transformer, batch: Batch
) -> tuple[jax.Array, jax.Array, tuple[mode.Routing, ...]]:
    logits, routings = model(batch.inputs, batch.info)
    return logits, jax.nn.log_softmax(logits), routings


@pytest.mark.parametrize("name", [arm.name for arm in ARMS if arm.name != "mod-random"])
def test_what_is_observed_is_what_the_model_did(name: str) -> None:
    """Sequences in batches of three, the last with padding, against one at a time."""
    arm, model = built(name)
    for selection, one in observed(name).items():
        chosen = causal_model(arm, model) if selection == "causal" else model
        for place in range(len(SOURCE)):
            # One sequence, without a batch around it.
            batch = Batch.of({name: x[None] for name, x in SOURCE[place].items()})
            logits, logs, routings = jax.device_get(alone(chosen, batch))
            counted = np.asarray(batch.weights[0]) > 0
            assert np.array_equal(one.counted[place], counted)
            entropy = measures.prediction_entropy(logits[0])
            assert_close(one.entropy[place].astype(np.float32), entropy, scale=5)
            bits = [-logs[0, n, int(t)] / math.log(2) for n, t in enumerate(batch.targets[0])]
            loss = one.loss[place].astype(np.float32)
            assert_close(loss[counted], np.array(bits)[counted], scale=5)
            nested = [router.nested for router in one.routers]
            assert nested == [place == 1 for place in range(len(routings))]
            for router, routing in zip(one.routers, routings, strict=True):
                check_router(router, routing, place, routings[0], counted)


def check_router(
    router: Router, routing: mode.Routing, place: int, outer: mode.Routing, counted: np.ndarray
) -> None:
    weight = np.full(router.weight[:, place].shape, np.nan)
    for layer, _, expert, slot in np.ndindex(routing.index.shape):
        token = routing.index[layer, 0, expert, slot]
        if token < routing.num_tokens:
            weight[layer, token, expert] = routing.weight[layer, 0, expert, slot]
    taken = router.selected[:, place]
    assert np.array_equal(taken, np.isfinite(weight))
    assert_close(router.weight[:, place][taken], weight[taken], scale=5)
    expected = np.broadcast_to(counted, (len(weight), len(counted)))
    if router.nested:
        slots = outer.index[:, 0, 0].tolist()
        expected = [[slot < len(counted) and counted[slot] for slot in row] for row in slots]
    assert np.array_equal(router.counted[:, place], expected)


def test_padding_and_last_bytes_do_not_count() -> None:
    one = observed("dense")["as trained"]
    # Every byte but the document starts is a target, and those at the border of the files not.
    assert one.counted.sum() == len(DOCUMENTS.tokens) - len(DOCUMENTS.names)
    assert not one.counted.all()


def test_random_routing_takes_its_share() -> None:
    one = observed("mod-random")["as trained"]
    whole = one.taken[:, :-1]  # all but the sequence with padding
    assert (whole.sum(-1) == SIZE.capacity * SIZE.length).all()
    assert one.most == len(one.layers) == 2


@pytest.mark.parametrize(
    ("depth", "every", "layers"),
    [(4, 2, (2, 4)), (5, 2, (2, 4)), (3, 1, (1, 2, 3)), (7, 3, (2, 5))],
)
def test_layers_are_numbered_as_in_the_model(
    depth: int, every: int, layers: tuple[int, ...]
) -> None:
    arm, _ = built("mode-staged")
    arm = dataclasses.replace(arm, every=every)
    model = arm.build(dataclasses.replace(SIZE, depth=depth), key=jax.random.key(0))
    places = places_of(model)
    for nested in (False, True):
        assert tuple(n for some, inside in places if inside == nested for n in some) == layers
    one = observe(model, SOURCE, range(2), batch=2, key=jax.random.key(0))
    assert one.layers == layers
    assert one.taken.shape == (len(layers), 2, SIZE.length)


def test_compute_is_added_up_over_layers_and_experts() -> None:
    one = observed("mode-integrated")["causal"]
    (router,) = one.routers
    slow = np.zeros(one.taken.shape, int)
    for layer, row, token, expert in zip(*np.nonzero(router.selected), strict=True):
        assert expert < SIZE.experts
        slow[layer, row, token] += 1
    assert np.array_equal(one.taken, slow)
    assert one.most == 2 * SIZE.experts
    assert router.noop is not None
    assert ((router.noop > 0) & (router.noop < 1)).all()


# Summaries.


@pytest.mark.parametrize("name", ["mod", "mode-staged", "mode-integrated"])
def test_a_summary_is_a_count(name: str) -> None:
    found = observed(name)
    tokens = np.stack([SOURCE[place]["tokens"][:-1] for place in range(len(SOURCE))])
    classes = np.stack([measures.byte_classes(row.astype(np.int64)) for row in tokens])
    for summary, one in zip(
        summarise(found, classes, seed=0, draws=20), found.values(), strict=True
    ):
        compute, where = one.taken.sum(0), list(zip(*np.nonzero(one.counted), strict=True))
        total = sum(int(compute[at]) for at in where)
        assert summary.tokens == len(where)
        assert_close(summary.compute, total / len(where))
        assert_close(summary.bits, sum(one.loss[at] for at in where) / len(where))
        for number, row in enumerate(summary.classes):
            own = [at for at in where if classes[at] == number]
            assert row.tokens == len(own)
            assert_close(row.token_share, len(own) / len(where))
            if own and total:
                share = sum(int(compute[at]) for at in own) / total
                assert_close(row.compute_share, share)
                assert_close(row.ratio.value, share / (len(own) / len(where)))
                assert_close(row.entropy, sum(one.entropy[at] for at in own) / len(own))
        for row in summary.depths:
            own = [at for at in where if compute[at] == row.compute]
            assert row.tokens == len(own)
            if own:
                assert_close(row.entropy.mean, sum(one.entropy[at] for at in own) / len(own))
        assert_close(sum(row.chance for row in summary.depths), 1.0)
        assert_close(sum(row.chance * row.compute for row in summary.depths), summary.compute)
        for router, record in zip(summary.routers, one.routers, strict=True):
            for place, layer in enumerate(router.layers):
                weight = record.weight[place][record.counted[place]].astype(np.float64)
                taken = record.selected[place][record.counted[place]]
                assert layer.taken.count + layer.passed.count == weight.size
                assert sum(layer.taken_bins) == layer.taken.count == taken.sum()
                if taken.any():
                    assert_close(layer.taken.mean, weight[taken].mean())
                    assert_close(layer.taken.quantiles[2], np.median(weight[taken]))
                    assert_close(np.array(layer.shares), taken.mean(0))


def with_threshold(name: str, threshold: float) -> dict[str, Observed]:
    """The causal rule takes every token or none."""
    arm, model = built(name)

    def moved(router: mode.Router) -> mode.Router:
        there = router.state.threshold
        return eqx.tree_at(lambda r: r.state.threshold, router, jnp.full_like(there, threshold))

    causal = causal_model(arm, mode.map_routers(moved, model))
    return {
        name: observe(one, SOURCE, range(len(SOURCE)), batch=3, key=jax.random.key(0))
        for name, one in (("top-k", model), ("causal", causal))
    }


@pytest.mark.parametrize(("name", "threshold"), [("mode-staged", math.inf), ("mod", -math.inf)])
def test_a_rule_that_takes_all_or_none_has_no_correlation(
    name: str, threshold: float, tmp_path: Path
) -> None:
    found = with_threshold(name, threshold)
    classes = np.ones(found["causal"].counted.shape, int)
    summaries = summarise(found, classes, seed=0, draws=20)
    causal = summaries[1]
    assert causal.compute == (0 if threshold > 0 else 2)
    assert math.isnan(causal.pearson.value)
    assert math.isnan(causal.spearman.low)
    assert math.isnan(causal.classes[1].ratio.value) == (threshold > 0)
    passage = find_passage(SOURCE)
    shown = {key: passage.of(one.taken[:, list(passage.places)]) for key, one in found.items()}
    for picture in plot_analysis(tmp_path, summaries, passage, shown):
        assert (tmp_path / f"{picture}.png").read_bytes().startswith(b"\x89PNG")
        assert (tmp_path / f"{picture}.pdf").read_bytes().startswith(b"%PDF")


# The passage.


@pytest.mark.parametrize("length", [8, 100, 4096])
def test_the_passage_is_a_piece_of_the_text_in_lines(length: int) -> None:
    binary = bytes(range(256)) * 40
    text = "".join(LINE.format(n) for n in range(200))
    source = Sequences(documents(binary, text), length)
    passage = find_passage(source)
    joined = np.concatenate([source[place]["tokens"][:-1] for place in passage.places])
    assert np.array_equal(joined[passage.part], passage.tokens)
    assert bytes(passage.tokens.tolist()).decode() in text
    assert passage.document == "1"
    assert len(passage.tokens) > 300
    rows = np.stack([source[place]["tokens"][:-1] for place in passage.places])
    assert np.array_equal(passage.of(rows[None])[0], passage.tokens)
    for place in passage.begins():
        assert (passage.part.start + place) % length == 0
    lines = [passage.tokens[line].tolist() for line in lines_of(passage.tokens, 30)]
    assert list(itertools.chain(*lines)) == passage.tokens.tolist()
    assert all(len(line) <= 30 and 10 not in line[:-1] for line in lines)


def test_short_and_odd_texts_have_a_passage() -> None:
    for text in ("a", "ab\n", "\n" * 300, b"\xff\xfe" * 100, "née d'où " * 9):
        source = Sequences(documents(text), 32)
        passage = find_passage(source)
        assert 1 <= len(passage.tokens) <= len(source.documents.tokens) - 1
        assert len(glyphs(passage.tokens)) == len(passage.tokens)
    found = glyphs(np.array([256, *"é€😀".encode(), 0xC3]))
    assert found == ["\ufffd", "é", "", "€", "", "", "😀", "", "", "", "\ufffd"]


# The command.


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("texts")
    for number in range(12):
        (folder / f"{number}.txt").write_text(LINE.format(number) * 12)
    return str(folder / "*.txt")


def saved(out: Path, texts: str, arm: str) -> Path:
    """The folder that a run leaves, of a model as it is before its first step."""
    training = run.Training(out, arm, 2, texts, size=SIZE)
    corpus = read_corpus(texts, length=SIZE.length)
    claim(out, {**training.settings(), "corpus": corpus.fingerprint})
    state = begin(arms_named([arm])[0], SIZE, training.recipe, steps=2, seed=0)
    checkpoints = Checkpoints(out / "checkpoints", 1)
    checkpoints.save(2, state, {"stream": {}, "losses": [8.0, 8.0]})
    return out


@pytest.fixture(scope="module")
def staged(tmp_path_factory: pytest.TempPathFactory, texts: str) -> Path:
    return saved(tmp_path_factory.mktemp("staged") / "run", texts, "mode-staged")


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes most of the time, and is not what every test is about."""
    monkeypatch.setattr(analysis_report, "plot_analysis", lambda *_: [])


def said(analyzing: Analyzing) -> str:
    stream = io.StringIO()
    run_analysis(analyzing, Console(file=stream, width=400))
    return stream.getvalue()


def strict(path: Path) -> dict:
    """JSON that has no word for what is not a number."""

    def refuse(word: str) -> None:
        raise AssertionError(word)

    return json.loads(path.read_text(), parse_constant=refuse)


def test_a_run_is_analysed_on_its_own_held_out_text(
    staged: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["analyze", "--checkpoint", str(staged), "--sequences", "7"]) == 0
    printed = capsys.readouterr().out
    assert "the run's held-out text" in printed
    assert "in 7 sequences of 32" in printed
    out = staged / "analysis"
    record = strict(out / "analysis.json")
    assert list(record["selections"]) == ["top-k", "causal"]
    for selection in record["selections"].values():
        assert [router["nested"] for router in selection["routers"]] == [False, True]
        assert math.isclose(sum(row["token_share"] for row in selection["classes"]), 1)
        if selection["compute"]:
            assert math.isclose(sum(row["compute_share"] for row in selection["classes"]), 1)
    shown = record["passage"]
    text = bytes(shown["tokens"]).decode()
    assert "return" in text
    assert {len(row) for rows in shown["taken"].values() for row in rows} == {len(text)}
    page = (out / "analysis.md").read_text()
    pictures = [line.split("](")[1][:-1] for line in page.splitlines() if line.startswith("![")]
    assert len(pictures) == 6
    for picture in pictures:
        assert (out / picture).read_bytes().startswith(b"\x89PNG")
    assert not [path for path in out.iterdir() if path.name.startswith(".")]


@pytest.mark.usefixtures("no_pictures")
def test_the_same_seed_gives_the_same_numbers(staged: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        said(Analyzing(staged, sequences=3, out=tmp_path / name))
    assert strict(tmp_path / "a/analysis.json") == strict(tmp_path / "b/analysis.json")


@pytest.mark.parametrize(
    "text", ["x", "Überall 日本語,\tnaïve café; 42 \x00 Ωμέγα.\r\n" * 20 + 99 * "7"]
)
def test_texts_of_the_users_own(staged: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "own.txt").write_bytes(text.encode())
    out = tmp_path / "out"
    printed = said(Analyzing(staged, str(tmp_path / "*.txt"), out=out))
    assert "(1 file)" in printed
    assert "was trained on" not in printed
    record = strict(out / "analysis.json")
    # Each byte is predicted once, from the token before it.
    assert record["selections"]["causal"]["tokens"] == len(text.encode())
    tokens = [256, *text.encode()[:-1]]
    expected = collections.Counter(map(slow_class, [256, *tokens], tokens))
    for row in record["selections"]["causal"]["classes"]:
        assert row["tokens"] == expected[row["name"]]


@pytest.mark.usefixtures("no_pictures")
def test_it_says_what_the_model_was_trained_on(staged: Path, tmp_path: Path, texts: str) -> None:
    printed = said(Analyzing(staged, texts, sequences=2, out=tmp_path / "out"))
    held_out = len(read_corpus(texts, length=SIZE.length).held_out.names)
    assert f"was trained on {12 - held_out} of these files" in printed


def test_a_dense_model_is_told_plainly(tmp_path: Path, texts: str) -> None:
    out = saved(tmp_path / "run", texts, "dense")
    assert "Nothing is routed" in said(Analyzing(out, sequences=4))
    record = strict(out / "analysis/analysis.json")
    assert record["routed"] is False
    assert "**Nothing is routed.**" in (out / "analysis/analysis.md").read_text()
    assert not list((out / "analysis").glob("*.png"))


def test_what_the_command_refuses(
    staged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refusal(*args: str) -> str:
        assert main(["analyze", *args]) == 2
        return capsys.readouterr().err

    at = ("--checkpoint", str(staged))
    (tmp_path / "file").write_text("")
    assert "has no config.json" in refusal("--checkpoint", str(tmp_path / "nowhere"))
    assert "`sequences` must be at least 1, got 0" in refusal(*at, "--sequences", "0")
    assert "`out` must be a folder" in refusal(*at, "--out", str(tmp_path / "file"))
    assert "`data` must match" in refusal(*at, "--data", str(tmp_path / "*.none"))
