"""GGUF: one file with the shape of a model, its tokens and its tensors, often quantised."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from .._checks import check_count, check_installed
from ..nn import AbstractRopeScaling, LinearRopeScaling, Llama3RopeScaling
from ._config import Config
from ._names import GGUF, GGUF_GPT2, Names


_FAMILIES = ("llama", "qwen2", "qwen3", "gpt2")
# Keys of an architecture that say nothing about the function of the model.
_IGNORED = {"context_length", "vocab_size", "rope.dimension_count", "attention.causal"}
_IGNORED |= {"rope.scaling.original_context_length", "rope.scaling.finetuned"}
_IGNORED |= {"attention.key_length", "attention.value_length"}  # checked with the tensors
# Rows that are made float32 at once: the package takes several times their memory.
_ROWS = 2048


class GGUFTensor:
    """A tensor of a file, read row by row and made float32.

    **Attributes:**

    - `shape`: `[out, in]` of a matrix.
    - `kind`: the name of its number format.
    """

    def __init__(self, tensor: Any, order: np.ndarray | None):
        self.shape = tuple(int(size) for size in reversed(tensor.shape))
        self.kind = tensor.tensor_type.name
        self._tensor = tensor
        self._order = order

    def read(self, rows: slice) -> Float[np.ndarray, "..."]:
        """Returns some rows."""
        from gguf.quants import dequantize

        data = self._tensor.data
        some = data[rows] if self._order is None else data[self._order[rows]]
        result = np.empty((len(some), *self.shape[1:]), np.float32)
        for start in range(0, len(some), _ROWS):
            part = slice(start, start + _ROWS)
            result[part] = dequantize(some[part], self._tensor.tensor_type)
        return result


def read_gguf(path: Path) -> tuple[Config, dict[str, GGUFTensor], Names, dict[str, Any]]:
    """Returns the shape of the model in a file, its tensors by name, their names, and all values.

    **Raises:** `ValueError` for a file that cannot be read, a model or a number format that this
    library does not have.
    """
    values, tensors = _read_parts(path)
    if values.get("split.count", 0) > 1:
        raise ValueError(f"`path` must be one whole GGUF file, got a part of several, {path}.")
    config = _config(values, tensors)
    # llama.cpp turns neighbours (2 i, 2 i + 1), not halves (i, i + half): its rows stand so.
    heads = {"attn_q": config.num_heads, "attn_k": config.num_kv_heads}
    found = {}
    for name, tensor in tensors.items():
        module = name.split(".")[-2]
        order = None
        if values["general.architecture"] == "llama" and module in heads:
            pairs = (heads[module], config.head_dim // 2, 2)
            rows = np.arange(pairs[0] * config.head_dim)
            order = rows.reshape(pairs).swapaxes(1, 2).reshape(-1)
        found[name] = GGUFTensor(tensor, order)
    _check_formats(found)
    return config, found, GGUF_GPT2 if config.family == "gpt2" else GGUF, values


def _read_parts(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the values and the tensors of a file, which is mapped into memory."""
    check_installed("gguf", "pretrained")
    from gguf import GGUFReader

    class Reader(GGUFReader):
        """Cuts a million pieces of the file, of which a `np.memmap` takes three times as long."""

        @property
        def data(self) -> np.ndarray:
            return self._data

        @data.setter
        def data(self, mapped: np.memmap) -> None:
            self._data = mapped.view(np.ndarray)

    try:
        reader = Reader(path)
        values = {name: field.contents() for name, field in reader.fields.items()}
    except (ValueError, IndexError, KeyError, OSError, OverflowError, UnicodeDecodeError) as error:
        raise ValueError(f"`path` must be a whole GGUF file, got {path}: {error}.") from error
    return values, {tensor.name: tensor for tensor in reader.tensors}


def _check_formats(tensors: dict[str, GGUFTensor]) -> None:
    for name, tensor in {tensor.kind: (name, tensor) for name, tensor in tensors.items()}.values():
        try:
            tensor.read(slice(1))
        except (NotImplementedError, ValueError) as error:
            raise ValueError(
                "tensors must have a number format that the package `gguf` reads, such as F16, "
                f"Q8_0 or Q4_1, got {tensor.kind} for {name}."
            ) from error


def _config(values: dict[str, Any], tensors: dict[str, Any]) -> Config:
    family = values.get("general.architecture")
    if family not in _FAMILIES:
        raise ValueError(
            "`general.architecture` of a GGUF file must be one of "
            f"{', '.join(_FAMILIES)}, got {family!r}."
        )
    own = {
        name.removeprefix(f"{family}."): value
        for name, value in values.items()
        if name.startswith(f"{family}.")
    }

    def take(name: str, default: Any = None) -> Any:
        value = own.pop(name, default)
        if value is None:
            raise ValueError(f"a GGUF file must have the key `{family}.{name}`, it lacks it.")
        return value

    dim, heads, depth = (
        check_count(name, take(name), 1)
        for name in ("embedding_length", "attention.head_count", "block_count")
    )
    norm = "layer_norm_epsilon" if family == "gpt2" else "layer_norm_rms_epsilon"
    window = own.pop("attention.sliding_window", 0) or None
    head_dim = int(own.get("attention.key_length", dim // heads))
    is_gpt2 = family == "gpt2"
    theta = None if is_gpt2 else float(take("rope.freq_base", 10_000.0))
    config = Config(
        family="mistral" if window and family == "llama" else family,
        vocab=_rows(tensors, "token_embd.weight"),
        dim=dim,
        depth=depth,
        num_heads=heads,
        num_kv_heads=int(take("attention.head_count_kv", heads)),
        head_dim=head_dim,
        hidden=int(take("feed_forward_length")),
        eps=float(take(f"attention.{norm}")),
        tied="output.weight" not in tensors,
        windows=(window,) * depth,
        rope_theta=theta,
        rope_scaling=_scaling(own, tensors, theta, head_dim),
        max_positions=_rows(tensors, "position_embd.weight") if is_gpt2 else None,
        qkv_bias=is_gpt2 or "blk.0.attn_q.bias" in tensors,
        out_bias="blk.0.attn_output.bias" in tensors,
        feedforward_bias="blk.0.ffn_up.bias" in tensors,
        head_norm="blk.0.attn_q_norm.weight" in tensors,
    )
    left = sorted(name for name in own if name not in _IGNORED)
    if left:
        raise ValueError(
            "a GGUF file must have known keys alone, got "
            f"{', '.join(left)} of {family}, which this library lacks."
        )
    return config


def _rows(tensors: dict[str, Any], name: str) -> int:
    if name not in tensors:
        raise ValueError(f"a GGUF file must have the tensor `{name}`, which it lacks.")
    return int(tensors[name].shape[-1])


def _scaling(
    own: dict[str, Any], tensors: dict[str, Any], theta: float | None, head_dim: int
) -> AbstractRopeScaling | None:
    kind, factor = own.pop("rope.scaling.type", "none"), own.pop("rope.scaling.factor", 1.0)
    if kind == "linear":
        return LinearRopeScaling(float(factor))
    if kind != "none":
        raise ValueError(f"`rope.scaling.type` must be `none` or `linear`, got {kind!r}.")
    if theta is None or "rope_freqs.weight" not in tensors:
        return None
    divisors = np.asarray(tensors["rope_freqs.weight"].data, np.float32)
    frequency = theta ** -(np.arange(head_dim // 2) / (head_dim // 2))
    # The scaling of Llama 3.1 and later, stored as divisors alone; the defaults made them.
    scaling = Llama3RopeScaling(float(divisors.max()))
    expected = frequency / np.asarray(scaling(jnp.asarray(frequency, jnp.float32)))
    if divisors.shape == expected.shape and np.allclose(divisors, expected, rtol=1e-4):
        return scaling
    raise ValueError(
        "`rope_freqs.weight` must be the divisors of Llama 3, got others, which this library lacks."
    )
