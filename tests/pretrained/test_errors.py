"""What cannot be loaded or saved is refused in one line, and nothing is half written."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

import mode
from tests.pretrained.cases import CONFIGS, Tensors, make_tensors, write_folder


CONFIG = CONFIGS["llama"]


def _load(folder: Path, config: dict[str, Any], tensors: Tensors | None = None) -> Any:
    return mode.pretrained.load(write_folder(folder, config, tensors or make_tensors(CONFIG)))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"model_type": "mamba"}, "model_type.*mamba"),
        ({"hidden_act": "gelu"}, "hidden_act.*gelu"),
        ({"attn_logit_softcapping": 30.0}, "attn_logit_softcapping"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "dynamic"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "beta": 1}}, "beta"),
        ({"rope_scaling": {"rope_type": "linear", "factor": -1.0}}, "factor"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"num_hidden_layers": "3"}, "num_hidden_layers"),
        ({"num_attention_heads": 5}, "5"),
        ({"num_key_value_heads": 3}, "num_kv_heads"),
        ({"head_dim": 7}, "head_dim"),
        ({"rms_norm_eps": "tiny"}, "rms_norm_eps"),
        ({"hidden_size": 48}, "shapes"),
        ({"intermediate_size": 41}, "gate_proj"),
        ({"num_key_value_heads": 4}, "k_proj"),
        ({"tie_word_embeddings": False, "num_hidden_layers": 4}, "Missing: model.layers.3"),
        ({"num_hidden_layers": 2}, "Left over: model.layers.2"),
        ({"attention_bias": True}, "bias"),
        ({"vocab_size": 60}, "embed_tokens"),
    ],
)
def test_a_config_that_is_not_of_the_tensors_or_not_ours(
    changes: dict[str, Any], match: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=match) as raised:
        _load(tmp_path / "m", {**CONFIG, **changes})
    assert "\n" not in str(raised.value)


def test_a_key_that_is_missing_is_named(tmp_path: Path) -> None:
    for name in ("hidden_size", "vocab_size", "model_type"):
        config = {key: value for key, value in CONFIG.items() if key != name}
        with pytest.raises(ValueError, match=name):
            _load(tmp_path / name, config)


def test_keys_may_be_ignored_by_name(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m", {**CONFIG, "note": "mine"}, make_tensors(CONFIG))
    with pytest.raises(ValueError, match=r"ignored=\('note',\)"):
        mode.pretrained.load(folder)
    assert mode.pretrained.load(folder, ignored=("note",)).depth == 3


def test_gpt2_options_that_change_the_function(tmp_path: Path) -> None:
    config = CONFIGS["gpt2"]
    for number, changes in enumerate(
        ({"scale_attn_by_inverse_layer_idx": True}, {"activation_function": "gelu"})
    ):
        with pytest.raises(ValueError, match=next(iter(changes))):
            _load(tmp_path / str(number), {**config, **changes}, make_tensors(config))


def _unlink(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


def _cut(name: str, size: int) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (_unlink("config.json"), "config.json"),
        (_cut("config.json", 10), "config.json"),
        (lambda folder: (folder / "config.json").write_text("[]"), "object"),
        (_unlink("model-00002-of-00003.safetensors"), "model-00002-of-00003"),
        (_cut("model-00002-of-00003.safetensors", 100), "model-00002-of-00003"),
        (_cut("model-00002-of-00003.safetensors", 4), "model-00002-of-00003"),
        (_cut("model.safetensors.index.json", 50), "index.json"),
        (_unlink("model.safetensors.index.json"), "model.safetensors"),
    ],
)
def test_damaged_folders(spoil: Callable[[Path], object], match: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m", CONFIG, make_tensors(CONFIG), files=3)
    spoil(folder)
    with pytest.raises(ValueError, match=match) as raised:
        mode.pretrained.load(folder)
    assert "\n" not in str(raised.value)


def test_a_file_that_lacks_what_the_index_says(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m", CONFIG, make_tensors(CONFIG), files=2)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    file = "model-00001-of-00002.safetensors"
    names = [name for name, where in index["weight_map"].items() if where == file]
    save_file({name: make_tensors(CONFIG)[name] for name in names[1:]}, folder / file)
    with pytest.raises(ValueError, match=names[0]):
        mode.pretrained.load(folder)


def test_pickles_are_refused_and_say_why(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m", CONFIG, make_tensors(CONFIG))
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pickle"):
        mode.pretrained.load(folder)


@pytest.mark.parametrize("path", ["nothing", "file", "empty"])
def test_paths_without_a_model(path: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="path"):
        mode.pretrained.load(tmp_path / path)


def test_integers_are_no_parameters(tmp_path: Path) -> None:
    tensors = make_tensors(CONFIG)
    tensors["model.norm.weight"] = np.ones(24, np.int8)
    with pytest.raises(ValueError, match=r"I8 for model\.norm\.weight"):
        _load(tmp_path / "m", CONFIG, tensors)


def test_folders_with_files_are_not_written_to(tmp_path: Path) -> None:
    model = _load(tmp_path / "m", CONFIG)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="full"):
        mode.pretrained.save(model, tmp_path / "full")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["notes.txt"]


def test_a_save_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = _load(tmp_path / "m", CONFIG)

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("safetensors.numpy.save_file", fail)
    with pytest.raises(OSError, match="no space"):
        mode.pretrained.save(model, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m"]


def test_models_that_other_libraries_do_not_know(tmp_path: Path) -> None:
    model = _load(tmp_path / "m", CONFIG)
    key = jax.random.key(0)
    attention = mode.Attention(24, 4, attend=mode.CausalAttention(soft_cap=3.0), key=key)
    others = {
        "MixtureOfDepths": mode.pretrained.convert(model, [1], capacity=0.5, key=key),
        "embedding_scale": mode.Transformer(
            9, 24, [lambda k: mode.Residual(mode.TransformerBlock(24, 4, key=k))], key=key
        ),
        "soft_cap": mode.Transformer(
            9,
            24,
            [lambda k: mode.Residual(mode.TransformerBlock(24, attention=attention, key=k))],
            embedding_scale=1.0,
            key=key,
        ),
    }
    for match, other in others.items():
        with pytest.raises(ValueError, match=match):
            mode.pretrained.save(other, tmp_path / "out")
    norms = eqx.tree_at(lambda m: m.norm, model, mode.LayerNorm(24))
    with pytest.raises(ValueError, match="layers of different options"):
        mode.pretrained.save(norms, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_package_that_is_not_installed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_folder(tmp_path / "m", CONFIG, make_tensors(CONFIG))
    model = mode.pretrained.load(folder)
    monkeypatch.setattr("mode._checks.find_spec", lambda name: None)
    for use in (
        lambda: mode.pretrained.load(folder),
        lambda: mode.pretrained.save(model, tmp_path / "out"),
        lambda: mode.pretrained.load_tokenizer(folder),
    ):
        with pytest.raises(ModuleNotFoundError, match=r"mode-jax\[pretrained\]"):
            use()
