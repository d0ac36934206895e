"""`mode-lab convert` and `mode-lab heal` on a small model with a tokenizer of its own."""

import itertools
import json
import signal
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mode
from mode.lab import interrupts
from mode.lab.__main__ import main
from mode.lab.corpus import read_corpus
from mode.lab.data import Batch, batches
from mode.lab.evaluate import held_out_loss
from mode.lab.files import read_record
from mode.lab.healing.choose import LayerWorth, propose_layers
from mode.lab.healing.documents import start_token, tokenize
from mode.lab.healing.options import Healing
from mode.lab.healing.teacher import Targets, divergence
from mode.lab.healing.train import learning, plan_phases
from mode.lab.tables import Tables
from tests.helpers import rng
from tests.pretrained.cases import CONFIGS, make_tensors, write_folder


CONFIG = {**CONFIGS["llama"], "vocab_size": 260, "num_hidden_layers": 5}
TEXT = "the cat sat on the mat; a dog ran to the red barn. " * 12


@pytest.fixture(scope="module")
def model_and_text(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("healing")
    write_folder(folder / "model", CONFIG, make_tensors(CONFIG))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<|endoftext|>": 0} | {letter: i for i, letter in enumerate(alphabet, 1)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "model" / "tokenizer.json"))
    for number in range(8):
        (folder / f"{number}.txt").write_text(TEXT[number:])
    return folder / "model", str(folder / "*.txt")


def _heal(model_and_text: tuple[Path, str], out: Path, *more: str) -> int:
    model, text = model_and_text
    return main(
        f"heal --model {model} --data {text} --out {out} --layers 1 3 --length 24 --batch 2 "
        "--router-steps 3 --norm-steps 2 --steps 6 --save-every 2 --held-out 4 --top 8 "
        "--learning-rate 1e-3 --ramp 0.4 --ramp-stages 1 --causal 0.3".split()
        + list(more)
    )


def _result(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "result.json").read_text())["content"]


ARMS = ("learned", "random", "left-out")


@pytest.fixture(scope="module")
def whole(model_and_text: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a healing that nobody interrupted."""
    out = tmp_path_factory.mktemp("whole") / "heal"
    assert _heal(model_and_text, out, "--arms", *ARMS) == 0
    return out


def test_healing_brings_arms_nearer_to_the_dense_model(whole: Path) -> None:
    for arm in ARMS:
        result = _result(whole / arm)
        assert len(result["losses"]) == 11
        assert result["losses"][-1] < result["losses"][0]
        assert result["flops"] < result["flops_dense"]
        assert (result["causal"] is not None) == (arm == "learned")
        assert (result["routers"] is not None) == (arm == "learned")
    report = (whole / "report.md").read_text()
    assert all(f"| {arm}" in report for arm in ("dense", *ARMS))
    table = read_record(whole / "report.json", Tables).tables["arms"]
    assert table["arm"] == ("dense", *ARMS)
    assert table["causal"][2:] == (None, None)


def test_healing_goes_on(
    whole: Path, model_and_text: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit, from where it was stopped."""
    # Stopped among the steps of norms and those of the causal rule, and begun again each time.
    for stop in (4, 10):
        received = iter([0] * (stop - _done(tmp_path / "parts" / "learned")) + [signal.SIGTERM] * 9)
        monkeypatch.setattr(interrupts, "received", lambda r=received: next(r))
        assert _heal(model_and_text, tmp_path / "parts", "--arms", "learned") > 128
    monkeypatch.setattr(interrupts, "received", lambda: 0)
    assert _heal(model_and_text, tmp_path / "parts", "--arms", "learned") == 0
    folders = [whole / "learned", tmp_path / "parts" / "learned"]
    one, other = map(_result, folders)
    for name in ("losses", "converted", "routers", "healed", "causal"):
        assert one[name] == other[name], name
    models = [(folder / "model.eqx").read_bytes() for folder in folders]
    assert models[0] == models[1]


def _done(folder: Path) -> int:
    steps = [int(path.stem) for path in (folder / "checkpoints").glob("*.json")]
    return max(steps, default=0)


def test_a_saved_model_is_loaded_by_converting_again(
    whole: Path, model_and_text: tuple[Path, str]
) -> None:
    dense = mode.pretrained.load(model_and_text[0])
    like = mode.pretrained.convert(
        dense, [1, 3], capacity=0.5, form="mod-queries", key=jax.random.key(0)
    )
    healed = eqx.tree_deserialise_leaves(whole / "learned" / "model.eqx", like)
    assert not np.array_equal(healed.embedding, dense.embedding)
    mode.testing.assert_decodes(
        mode.make_causal(healed), jnp.asarray(rng(0).integers(0, 260, (2, 12)))
    )


def test_convert_measures_chooses_and_draws(
    model_and_text: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, text = model_and_text
    command = f"convert --model {model} --data {text} --out {tmp_path} --length 24 --sequences 2"
    assert main(f"{command} --choose --save 0.1".split()) == 0
    record = json.loads((tmp_path / "layers.json").read_text())["content"]
    chosen = record["layers"]
    assert chosen
    assert all(b - a > 1 for a, b in itertools.pairwise(chosen))
    losses = record["losses_without"]
    assert (tmp_path / "layers.png").stat().st_size > 1000
    printed = capsys.readouterr().out
    assert "At capacity 1, " in printed
    assert "mode-lab heal" in printed
    # The loss without a layer is that of a model without it.
    dense = mode.pretrained.load(model)
    layers = mode.list_layers(dense)

    tokenizer = mode.pretrained.load_tokenizer(model)
    corpus = tokenize(read_corpus(text, length=24), tokenizer, start_token(tokenizer))
    samples = [next(batches(corpus.train, length=24, batch=2, seed=0))]
    for number in (0, 4):
        shallow = mode.with_layers(dense, layers[:number] + layers[number + 1 :])
        loss, *_ = held_out_loss(shallow, samples, jax.random.key(0))
        assert loss == pytest.approx(losses[number], abs=1e-4)
    assert tokenizer.decode(corpus.train.tokens[1:30].tolist()) == TEXT[:29]


@pytest.mark.parametrize("depth", [1, 2, 5, 8])
def test_chosen_layers_cost_least_of_all_that_are_no_neighbours(depth: int) -> None:
    dense = mode.Transformer(
        16,
        8,
        [lambda key: mode.Residual(mode.TransformerBlock(8, num_heads=2, key=key))],
        repeats=depth,
        key=jax.random.key(0),
    )
    losses = rng(depth).uniform(0, 9, depth)
    worths = [LayerWorth(layer, 0.9, loss) for layer, loss in enumerate(losses)]
    most = (depth + 1) // 2
    counts = set()
    for save in (0.0, 0.1, 0.2, 0.99):
        chosen = propose_layers(dense, worths, capacity=0.5, form="mod", save=save)
        apart = [
            layers
            for layers in itertools.combinations(range(depth), len(chosen))
            if all(b - a > 1 for a, b in itertools.pairwise(layers))
        ]
        assert tuple(chosen) == min(apart, key=lambda layers: losses[list(layers)].sum())
        counts.add(len(chosen))
    assert {1, most} <= counts


@pytest.mark.parametrize(
    ("words", "match"),
    [
        ("heal --layers 1 --model missing", "path"),
        ("heal --layers 1 --model {model} --data {text} --arms oracle", "arms"),
        ("heal --layers 9 --model {model} --data {text}", "layers"),
        ("heal --layers 1 1 --model {model} --data {text}", "layers"),
        ("heal --layers 1 --model {model} --data {text} --length 100000", "length"),
        ("heal --layers 1 --model {model} --data {text} --capacity 1.5", "capacity"),
        ("convert --model {model} --data {text}", "--choose"),
        ("convert --model {model} --data {text} --layers 7", "layers"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    words: str,
    match: str,
    model_and_text: tuple[Path, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model, text = model_and_text
    command = words.format(model=model, text=text).split()
    assert main([*command, "--out", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err.strip()
    assert match in message
    assert "\n" not in message
    assert not (tmp_path / "out").exists()


def test_another_configuration_is_refused(
    model_and_text: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, text = model_and_text
    common = f"heal --model {model} --data {text} --out {tmp_path} --length 24 --layers 1"
    rest = "--steps 0 --router-steps 0 --held-out 1"
    assert main(f"{common} {rest}".split()) == 0
    assert main(f"{common} {rest} --form mod".split()) == 2
    assert "form" in capsys.readouterr().err


def test_the_divergence_is_that_of_the_kept_tokens_and_the_rest() -> None:
    logits, other = rng(0).normal(size=(2, 1, 4, 9)).astype(np.float32)
    p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (logits, other))
    top = np.argsort(-p, axis=-1)[..., :3]
    kept_p, kept_q = (np.take_along_axis(x, top, -1) for x in (p, q))
    parts = [(kept_p * np.log(kept_p / kept_q)).sum(-1)]
    rest_p, rest_q = 1 - kept_p.sum(-1), 1 - kept_q.sum(-1)
    expected = (parts[0] + rest_p * np.log(rest_p / rest_q))[0, :3].mean()
    sample = {"tokens": np.zeros((1, 5), np.int32), "segment_ids": np.array([[1, 1, 1, 0, 0]])}
    targets = Targets(jnp.asarray(top), jnp.log(jnp.asarray(kept_p)))
    actual = divergence(jnp.asarray(other), targets, Batch.of(sample))
    assert float(actual) == pytest.approx(expected, rel=1e-4)


def test_phases_and_what_learns_in_them(model_and_text: tuple[Path, str]) -> None:
    dense = mode.pretrained.load(model_and_text[0])
    model = mode.pretrained.convert(dense, [1, 3], capacity=0.25, key=jax.random.key(0))
    options = Healing(
        Path(),
        (1, 3),
        router_steps=10,
        norm_steps=5,
        steps=100,
        ramp=0.5,
        ramp_stages=2,
        causal=0.1,
    )
    total, phases = plan_phases(options, model, "learned")
    assert total == 115
    assert [(phase.part, phase.first, phase.is_causal) for phase in phases] == [
        ("routers", 0, False),
        ("norms", 10, False),
        ("all", 15, False),
        ("all", 40, False),
        ("all", 65, False),
        ("all", 105, True),
    ]
    assert [float(phase.capacities[0]) for phase in phases] == [0.25, 0.25, 1, 0.5, 0.25, 0.25]
    total, phases = plan_phases(options, model, "random")
    assert total == 115
    assert {phase.part for phase in phases} == {"norms", "all"}
    count = {
        part: sum(leaf.size for leaf in jax.tree.leaves(eqx.filter(model, learning(model, part))))
        for part in ("routers", "norms", "all")
    }
    # A scorer has a norm and a row of weights; each of five layers two norms, and the model one.
    assert count["routers"] == 2 * 2 * 24
    assert count["norms"] == count["routers"] + (5 * 2 + 1) * 24
    trainable = eqx.filter(model, mode.is_trainable(model))
    assert count["all"] == sum(leaf.size for leaf in jax.tree.leaves(trainable))
