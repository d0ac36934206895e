"""Loaded models compute what an oracle in NumPy computes from the tensors, and decode it."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import mode
from mode.pretrained import _files
from mode.pretrained._sources import Source, read_array
from tests.helpers import assert_close, rng, run
from tests.parallel.meshes import mesh_of
from tests.pretrained.cases import CONFIGS, VOCAB, make_tensors, write_folder
from tests.pretrained.oracle import logits_of


@pytest.fixture(params=CONFIGS)
def name(request: pytest.FixtureRequest) -> str:
    """Each family and option."""
    return request.param


def _ids(batch: int, tokens: int) -> np.ndarray:
    return rng(7).integers(0, VOCAB, (batch, tokens))


def test_logits_are_those_of_the_oracle(name: str, tmp_path: Path) -> None:
    config, tensors = CONFIGS[name], make_tensors(CONFIGS[name])
    model = mode.pretrained.load(write_folder(tmp_path / "m", config, tensors, files=3))
    ids, lengths = _ids(3, 33), (33, 20, 1)
    valid = np.arange(33) < np.array(lengths)[:, None]
    info = mode.TokenInfo.packed(jnp.asarray(valid, jnp.int32))
    logits, routings = run(model, jnp.asarray(ids), info)
    assert routings == ()
    for row, length in enumerate(lengths):
        expected = logits_of(config, tensors, ids[row, :length])
        assert_close(logits[row, :length], expected, scale=5)


def test_decoding_is_the_forward_pass_of_the_oracle(name: str, tmp_path: Path) -> None:
    config, tensors = CONFIGS[name], make_tensors(CONFIGS[name])
    model = mode.unstack_layers(mode.pretrained.load(write_folder(tmp_path / "m", config, tensors)))
    ids, lengths = _ids(2, 36), (11, 4)
    state, _ = mode.prefill(model, jnp.asarray(ids[:, :11]), jnp.array(lengths), max_tokens=40)
    decoded = [state.logits]
    for step in range(25):
        new = jnp.asarray([ids[row, length + step] for row, length in enumerate(lengths)])
        state, _ = mode.decode_step(model, state, new)
        decoded.append(state.logits)
    for row, length in enumerate(lengths):
        expected = logits_of(config, tensors, ids[row, : length + 25])[length - 1 :]
        assert_close(jnp.stack(decoded)[:, row], expected, scale=5)


def test_a_mesh_holds_the_same_arrays_in_parts(name: str, tmp_path: Path) -> None:
    config, tensors = CONFIGS[name], make_tensors(CONFIGS[name])
    folder = write_folder(tmp_path / "m", config, tensors)
    whole = mode.pretrained.load(folder)
    mesh = mesh_of(data=2)
    parts = mode.pretrained.load(folder, mesh=mesh)
    shardings = jax.tree.leaves(mode.named_shardings(whole, mesh))
    for one, other, sharding in zip(
        jax.tree.leaves(whole), jax.tree.leaves(parts), shardings, strict=True
    ):
        assert other.sharding == sharding
        np.testing.assert_array_equal(one, other)
    assert any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(parts))


def test_no_array_is_ever_whole_on_the_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mesh of eight devices: each array is read in parts, from three files, row by row."""
    config = {**CONFIGS["llama"], "hidden_size": 64, "intermediate_size": 128, "vocab_size": 128}
    config |= {"num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 8}
    tensors = make_tensors(config)
    folder = write_folder(tmp_path / "m", config, tensors, files=3)
    largest: dict[tuple[int, ...], int] = {}

    def record(source: Source, *rest: Any) -> np.ndarray:
        part = read_array(source, *rest)
        largest[source.shape] = max(part.size, largest.get(source.shape, 0))
        return part

    monkeypatch.setattr(_files, "read_array", record)
    model = mode.pretrained.load(folder, mesh=mesh_of(data=8))
    for leaf in jax.tree.leaves(model):
        if leaf.ndim > 2 or leaf.shape[0] == 128:  # vectors are whole on every device
            assert largest[leaf.shape] == leaf.size // 8
    ids = rng(7).integers(0, 128, 9)
    assert_close(run(model, jnp.asarray(ids))[0], logits_of(config, tensors, ids), scale=5)


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
def test_every_floating_dtype_of_a_file(dtype: str, tmp_path: Path) -> None:
    config = CONFIGS["qwen3"]
    narrow = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    stored = {name: tensor.astype(narrow) for name, tensor in make_tensors(config).items()}
    model = mode.pretrained.load(write_folder(tmp_path / "m", config, stored))
    assert model.embedding.dtype == jnp.float32
    ids = _ids(1, 9)
    tensors = {name: tensor.astype(np.float64) for name, tensor in stored.items()}
    assert_close(run(model, jnp.asarray(ids))[0][0], logits_of(config, tensors, ids[0]), scale=5)


def test_dtypes_of_parameters_and_of_activations(tmp_path: Path) -> None:
    config = CONFIGS["llama"]
    folder = write_folder(tmp_path / "m", config, make_tensors(config))
    model = mode.pretrained.load(folder, dtype=jnp.bfloat16, parameter_dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(model)} == {jnp.dtype(jnp.bfloat16)}
    assert model.dtype == jnp.bfloat16
    assert run(model, jnp.asarray(_ids(1, 9)))[0].dtype == jnp.float32


def test_names_without_their_prefix_and_buffers_are_read(tmp_path: Path) -> None:
    config, tensors = CONFIGS["gpt2"], make_tensors(CONFIGS["gpt2"])
    stored = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    stored["h.0.attn.bias"] = np.tri(40, dtype=np.float32)
    model = mode.pretrained.load(write_folder(tmp_path / "m", config, stored))
    ids = _ids(1, 9)
    assert_close(run(model, jnp.asarray(ids))[0][0], logits_of(config, tensors, ids[0]), scale=5)


def test_a_tied_head_that_is_repeated_is_not_left_over(tmp_path: Path) -> None:
    config, tensors = CONFIGS["qwen2"], make_tensors(CONFIGS["qwen2"])
    repeated = {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].copy()}
    model = mode.pretrained.load(write_folder(tmp_path / "m", config, repeated))
    assert model.head is None


def test_positions_beyond_the_learned_ones_are_refused(tmp_path: Path) -> None:
    config = CONFIGS["gpt2"]
    model = mode.pretrained.load(write_folder(tmp_path / "m", config, make_tensors(config)))
    with pytest.raises(ValueError, match="40"):
        model(jnp.zeros((1, 41), int))
    with pytest.raises(ValueError, match="40"):
        mode.prefill(model, jnp.zeros((1, 4), int), max_tokens=41)
    # A compiled program cannot raise.
    logits, _ = jax.jit(lambda ids: model(ids))(jnp.zeros((1, 41), int))
    assert jnp.isnan(logits[0, 40]).all()


def test_shapes_alone(name: str, tmp_path: Path) -> None:
    config = CONFIGS[name]
    folder = write_folder(tmp_path / "m", config, make_tensors(config))
    shapes, model = mode.pretrained.load_shapes(folder), mode.pretrained.load(folder)
    assert jax.tree.structure(shapes) == jax.tree.structure(model)
    assert [leaf.shape for leaf in jax.tree.leaves(shapes)] == [
        leaf.shape for leaf in jax.tree.leaves(model)
    ]


def test_saved_models_load_as_they_were(name: str, tmp_path: Path) -> None:
    config, tensors = CONFIGS[name], make_tensors(CONFIGS[name])
    model = mode.pretrained.load(write_folder(tmp_path / "m", config, tensors))
    mode.pretrained.save(model, tmp_path / "saved", max_shard_bytes=8_000)
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) > 3
    again = mode.pretrained.load(tmp_path / "saved")
    assert jax.tree.structure(again) == jax.tree.structure(model)
    jax.tree.map(np.testing.assert_array_equal, again, model)
    mode.pretrained.save(again, tmp_path / "whole")
    index = json.loads((tmp_path / "saved" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(tensors)
