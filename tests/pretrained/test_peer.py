"""The models of `transformers` and ours: the same logits, the same text, each other's files.

Needs the extra `bench`; without it, `test_load.py` compares with an oracle in NumPy.
"""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import mode
from tests.helpers import rng, run
from tests.pretrained.cases import CONFIGS, VOCAB


torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
NAMES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3", "gpt2": "GPT2"}


@pytest.fixture(params=CONFIGS)
def peer(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, Path]:
    """A random model of the peer, and the folder that it wrote."""
    config = {**CONFIGS[request.param]}
    kind = NAMES[config.pop("model_type")]
    if kind == "GPT2":
        config["n_positions"] = 128
    torch.manual_seed(0)
    options = getattr(transformers, f"{kind}Config")(**config, bos_token_id=0, eos_token_id=None)
    head = "LMHeadModel" if kind == "GPT2" else "ForCausalLM"
    model = getattr(transformers, f"{kind}{head}")(options).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases start at 0, norms at 1
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "peer")
    return model, tmp_path / "peer"


def _logits(model: Any, ids: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    with torch.no_grad():
        options = {} if mask is None else {"attention_mask": torch.tensor(mask)}
        return model(torch.tensor(ids), **options).logits.numpy()


def test_logits_of_ragged_batches(peer: tuple[Any, Path]) -> None:
    model, folder = peer
    ids = rng(0).integers(0, VOCAB, (3, 48))
    mask = (np.arange(48) < np.array([48, 31, 2])[:, None]).astype(int)
    logits, _ = run(
        mode.pretrained.load(folder), jnp.asarray(ids), mode.TokenInfo.packed(jnp.asarray(mask))
    )
    expected = _logits(model, ids, mask)
    assert np.abs(np.asarray(logits) - expected)[mask == 1].max() < 1e-4


def test_fifty_greedy_tokens_are_those_of_generate(peer: tuple[Any, Path]) -> None:
    model, folder = peer
    prompt = rng(1).integers(0, VOCAB, (2, 9))
    with torch.no_grad():
        text = model.generate(
            torch.tensor(prompt),
            attention_mask=torch.ones((2, 9), dtype=torch.int64),
            max_new_tokens=50,
            do_sample=False,
            pad_token_id=0,
        ).numpy()
    ours = mode.unstack_layers(mode.pretrained.load(folder))
    state, _ = mode.prefill(ours, jnp.asarray(prompt), max_tokens=59)
    expected = _logits(model, text)
    for step in range(50):
        assert np.abs(np.asarray(state.logits) - expected[:, 8 + step]).max() < 1e-4
        new = jnp.argmax(state.logits, axis=-1)
        assert new.tolist() == text[:, 9 + step].tolist()
        state, _ = mode.decode_step(ours, state, new)


def test_saved_models_load_in_transformers(peer: tuple[Any, Path], tmp_path: Path) -> None:
    model, folder = peer
    mode.pretrained.save(mode.pretrained.load(folder), tmp_path / "ours", max_shard_bytes=20_000)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    ids = rng(2).integers(0, VOCAB, (2, 40))
    np.testing.assert_array_equal(_logits(again, ids), _logits(model, ids))
