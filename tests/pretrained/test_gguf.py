"""GGUF files compute what an oracle in NumPy computes from the numbers that they hold."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mode
from mode.nn import Llama3RopeScaling
from tests.helpers import assert_close, rng, run
from tests.pretrained.cases import CONFIGS, VOCAB, make_tensors
from tests.pretrained.gguf_files import write_gguf
from tests.pretrained.oracle import logits_of


# Sizes that blocks of 32 numbers divide.
_WIDE = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gpt2"])
def test_families(name: str, tmp_path: Path) -> None:
    config = CONFIGS[name]
    tensors = write_gguf(tmp_path / "m.gguf", config, make_tensors(config))
    model = mode.pretrained.load(tmp_path / "m.gguf")
    ids = rng(1).integers(0, VOCAB, 20)
    assert_close(run(model, jnp.asarray(ids)), (logits_of(config, tensors, ids), ()), scale=5)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_number_formats(kind: str, tmp_path: Path) -> None:
    config = {**CONFIGS["llama"], **_WIDE}
    tensors = write_gguf(tmp_path / "m.gguf", config, make_tensors(config), kind)
    model = mode.pretrained.load(tmp_path / "m.gguf")
    ids = rng(1).integers(0, VOCAB, 12)
    assert_close(run(model, jnp.asarray(ids)), (logits_of(config, tensors, ids), ()), scale=5)


def test_the_scaling_of_llama_3_is_known_by_its_divisors(tmp_path: Path) -> None:
    rope = {**CONFIGS["llama3"]["rope_scaling"], "original_max_position_embeddings": 8192}
    config = {**CONFIGS["llama3"], "rope_scaling": rope}
    frequency = 5e5 ** -(np.arange(5) / 5)
    scaled = Llama3RopeScaling(8.0)(jnp.asarray(frequency, jnp.float32))
    divisors = (frequency / np.asarray(scaled)).astype(np.float32)
    extra = {"rope_freqs.weight": divisors}
    tensors = write_gguf(tmp_path / "m.gguf", config, make_tensors(config), extra=extra)
    model = mode.pretrained.load(tmp_path / "m.gguf")
    ids = rng(1).integers(0, VOCAB, 30)
    assert_close(run(model, jnp.asarray(ids)), (logits_of(config, tensors, ids), ()), scale=5)
    write_gguf(tmp_path / "n.gguf", config, tensors, extra={"rope_freqs.weight": 2 * divisors})
    with pytest.raises(ValueError, match="rope_freqs"):
        mode.pretrained.load(tmp_path / "n.gguf")


def test_a_mesh_of_a_quantised_file(tmp_path: Path) -> None:
    from tests.parallel.meshes import mesh_of

    config = {**CONFIGS["llama"], **_WIDE}
    write_gguf(tmp_path / "m.gguf", config, make_tensors(config), "Q8_0")
    whole = mode.pretrained.load(tmp_path / "m.gguf")
    parts = mode.pretrained.load(tmp_path / "m.gguf", mesh=mesh_of(data=4))
    jax.tree.map(np.testing.assert_array_equal, whole, parts)


def test_what_is_refused(tmp_path: Path) -> None:
    config, tensors = CONFIGS["llama"], make_tensors(CONFIGS["llama"])

    def refused(match: str, **options: Any) -> None:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.gguf"
        write_gguf(path, options.pop("config", config), tensors, **options)
        with pytest.raises(ValueError, match=match):
            mode.pretrained.load(path)

    refused("expert_count", keys={"llama.expert_count": 8})
    refused("split|several", keys={"split.count": 2})
    refused("Left over", extra={"blk.0.attn_sinks.weight": np.ones(4, np.float32)})
    refused("shape", config={**config, "intermediate_size": 44})
    refused("Missing", config={**config, "num_hidden_layers": 4})
    refused("block_count", config={**config, "num_hidden_layers": 0})
    refused("gemma", config={**config, "model_type": "gemma"})
    good = tmp_path / "0.gguf"
    for number, content in enumerate((good.read_bytes()[:300], b"GGUF", b"PK\3\4", b"")):
        (tmp_path / f"cut{number}").write_bytes(content)
        with pytest.raises(ValueError, match="GGUF"):
            mode.pretrained.load(tmp_path / f"cut{number}")
