"""A folder with `config.json` and safetensors files, as `transformers` writes it."""

import contextlib
import json
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .._checks import check_installed
from ._config import Config
from ._json_config import from_json
from ._names import GPT2, LLAMA, Names


INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_FORMATS = ("F64", "F32", "F16", "BF16")


class FolderTensor:
    """A tensor of a safetensors file, which is mapped into memory. See `Tensor`."""

    def __init__(self, file: Any, name: str):
        self._slice = file.get_slice(name)
        self.shape = tuple(self._slice.get_shape())
        self.kind = self._slice.get_dtype()

    def read(self, rows: slice) -> np.ndarray:
        """Returns some rows."""
        return self._slice[rows]


def read_folder(
    path: Path, ignored: Collection[str]
) -> tuple[Config, dict[str, FolderTensor], Names]:
    """Returns the shape of the model in a folder, its tensors by name, and their names.

    **Raises:** `ValueError` for a folder that holds no model, or one that cannot be read.
    """
    config = from_json(read_json(path / "config.json"), ignored)
    names = folder_names(config)
    tensors: dict[str, FolderTensor] = {}
    for file, expected in _files(path).items():
        opened = _open(path / file)
        found = list(opened.keys())
        missing = sorted(set(expected) - set(found))
        if missing:
            raise ValueError(f"{file} must hold what {INDEX} says, but lacks {', '.join(missing)}.")
        for name in found:
            tensor = FolderTensor(opened, name)
            if tensor.kind not in _FORMATS:
                raise ValueError(
                    f"tensors must be one of {', '.join(_FORMATS)}, got {tensor.kind} for {name}: "
                    "quantised models are read from GGUF files."
                )
            tensors[_with_prefix(name, names)] = tensor
    if config.tied:  # some files repeat the embedding under the name of the head
        tensors.pop(f"{LLAMA.model['head']}.weight", None)
    return config, tensors, names


def folder_names(config: Config) -> Names:
    """Returns the names of the tensors in a folder."""
    return GPT2 if config.family == "gpt2" else LLAMA


def read_json(path: Path) -> dict[str, Any]:
    """Returns the object in a JSON file, or says what is wrong with it."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(
            f"`path` must be a folder with `{path.name}`, got {path.parent}."
        ) from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path.name} must be a JSON file, got {path}: {error}.") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path.name} must hold an object, got a {type(values).__name__}.")
    return values


def _files(path: Path) -> dict[str, list[str]]:
    """Returns the files of tensors, and what each must hold."""
    if (path / INDEX).is_file():
        weight_map = read_json(path / INDEX).get("weight_map", {})
        files: dict[str, list[str]] = {}
        for name, file in weight_map.items():
            files.setdefault(file, []).append(name)
        missing = sorted(file for file in files if not (path / file).is_file())
        if missing or not files:
            raise ValueError(
                f"`path` must have every file that {INDEX} names, got {path} without "
                f"{', '.join(missing) or 'any'}."
            )
        return files
    if (path / SINGLE).is_file():
        return {SINGLE: []}
    if any(path.glob("*.bin")) or any(path.glob("*.pt*")):
        raise ValueError(
            f"`path` must hold `{SINGLE}`, got {path} with pickle files, which may run any code. "
            "Write the model again by `save_pretrained(folder, safe_serialization=True)`."
        )
    raise ValueError(f"`path` must be a folder with `{SINGLE}` or `{INDEX}`, got {path}.")


def _open(path: Path) -> Any:
    check_installed("safetensors", "pretrained")
    from safetensors import SafetensorError, safe_open

    # It makes bfloat16 arrays by the dtype that JAX has registered with NumPy.
    try:
        return safe_open(path, framework="numpy").__enter__()
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path.name} must be a whole safetensors file: {error}.") from error


def _with_prefix(name: str, names: Names) -> str:
    """Gives a name the prefix that models without a head are saved without."""
    heads = (names.prefix, *(f"{module}." for module in names.model.values()))
    return name if name.startswith(heads) else names.prefix + name


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Makes a folder that appears at `path` once all in it is written.

    **Raises:** `ValueError` if there is something at `path` already.
    """
    if path.exists() and (path.is_file() or any(path.iterdir())):
        raise ValueError(f"`folder` must be new or empty, got {path}, which holds files.")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as written:
        folder = Path(written) / "folder"
        folder.mkdir()
        yield folder
        if path.is_dir():
            path.rmdir()
        folder.rename(path)
