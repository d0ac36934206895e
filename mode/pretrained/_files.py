"""Load a pretrained model, and save one for other libraries."""

import dataclasses
import itertools
import json
import math
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding
from jax.typing import DTypeLike

from .._checks import check_installed
from .._dtypes import is_shaped
from ..models import Transformer
from ..parallel import PARAMETER_RULES, Rules, named_shardings
from ._config import Config, build, config_of
from ._folder import INDEX, SINGLE, folder_names, new_folder, read_folder
from ._gguf import read_gguf
from ._json_config import from_json, to_json
from ._sources import Source, Tensor, check_sources, find_sources, read_array, write_tensors


def load(
    path: str | Path,
    *,
    dtype: DTypeLike = jnp.float32,
    parameter_dtype: DTypeLike = jnp.float32,
    remat: bool = False,
    mesh: Mesh | None = None,
    rules: Rules = PARAMETER_RULES,
    ignored: Collection[str] = (),
) -> Transformer:
    """Loads a pretrained model: Llama 2 and 3, SmolLM2, Mistral, Qwen2, Qwen2.5, Qwen3 or GPT-2.

    Every tensor of the file is used and every array of the model filled. Layers of one structure
    are stacked under one scan; `unstack_layers` gives the form that decodes fast.

    **Arguments:**

    - `path`: a folder with `config.json` and safetensors files, or a GGUF file.
    - `dtype`, `remat`: of `Transformer`.
    - `parameter_dtype`: of the parameters, whatever the file has.
    - `mesh`, `rules`: of `named_shardings`: each process reads the parts of its own devices alone,
        so that a model larger than one host can be loaded.
    - `ignored`: keys of `config.json` that do not change the function of the model.

    **Returns:** a `Transformer`, dense; `convert` routes it.

    **Raises:** `ValueError`, before anything is loaded, for a path without a model, files that are
    missing, cut off or pickled, a configuration that needs what this library lacks, and tensors
    that are missing, left over, or of another shape than the configuration says.

    >>> import mode
    >>> model = mode.pretrained.load("SmolLM2-135M.gguf")  # doctest: +SKIP
    """
    opened = open_model(path, ignored)
    model = opened.shapes(dtype, remat)
    arrays, rest = eqx.partition(model, is_shaped)
    leaves, structure = jax.tree.flatten(arrays)
    if mesh is None:
        one = SingleDeviceSharding(jax.local_devices()[0])
        shardings: list[Any] = [one] * len(leaves)
    else:
        shardings = jax.tree.leaves(named_shardings(arrays, mesh, rules))
    parameter_dtype = jnp.dtype(parameter_dtype)

    def read(source: Any, sharding: Any) -> jax.Array:
        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            return read_array(source, opened.tensors, parameter_dtype, index)

        return jax.make_array_from_callback(source.shape, sharding, part)

    # The largest tensors first: each is in memory twice for a moment, when there is little else.
    loaded: list[Any] = [None] * len(leaves)
    for number in sorted(range(len(leaves)), key=lambda n: -opened.sources[n].tensor_size):
        loaded[number] = read(opened.sources[number], shardings[number])
    return eqx.combine(jax.tree.unflatten(structure, loaded), rest)


def load_shapes(path: str | Path, *, ignored: Collection[str] = ()) -> Transformer:
    """Returns the model at `path` with shapes instead of numbers, for `mode.aot` and `count_flops`.

    **Raises:** `ValueError` as `load`.
    """
    return open_model(path, ignored).shapes(jnp.float32, False)


@dataclasses.dataclass(frozen=True)
class OpenedModel:
    """A model's file or folder: checked, and not read yet but for its configuration.

    `sources` say where each array stands among the tensors. `values` are those of a GGUF file,
    which has the tokenizer among them.
    """

    config: Config
    tensors: Mapping[str, Tensor]
    sources: list[Source]
    values: Mapping[str, Any]

    def shapes(self, dtype: DTypeLike, remat: bool) -> Transformer:
        """The model with shapes instead of numbers."""
        return eqx.filter_eval_shape(build, self.config, dtype, remat, jax.random.key(0))


def open_model(path: str | Path, ignored: Collection[str] = ()) -> OpenedModel:
    """Opens a file or a folder, and checks that its tensors are those of its configuration.

    **Raises:** `ValueError` as `load`.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        config, tensors, names = read_folder(path, ignored)
        values: dict[str, Any] = {}
    elif not path.is_file():
        raise ValueError(f"`path` must be a folder or a GGUF file, got {path}, which is neither.")
    else:
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise ValueError(
                    f"`path` must be a GGUF file or the folder with `config.json`, got {path}."
                )
        config, tensors, names, values = read_gguf(path)
    model = eqx.filter_eval_shape(build, config, jnp.float32, False, jax.random.key(0))
    sources = find_sources(model, config, names)
    check_sources(sources, tensors, names)
    return OpenedModel(config, tensors, sources, values)


def save(
    model: Transformer,
    folder: str | Path,
    *,
    tokenizer: Any = None,
    max_shard_bytes: int = 4 * 1024**3,
) -> None:
    """Saves a dense model as `config.json` and safetensors files, which `transformers` loads.

    **Arguments:**

    - `model`: a model of a family that `load` knows.
    - `folder`: a new folder. It appears once everything is written.
    - `tokenizer`: a `tokenizers.Tokenizer`, saved as `tokenizer.json`.
    - `max_shard_bytes`: about the size of the largest file.

    **Raises:** `ValueError` for a model that no family has, such as a routed one, and for a folder
    with files in it.
    """
    check_installed("safetensors", "pretrained")
    from safetensors.numpy import save_file

    config = _known_config(model)
    sources = find_sources(model, config, folder_names(config))
    values = {**to_json(config), "torch_dtype": str(model.embedding.dtype)}
    leaves = jax.tree.leaves(eqx.filter(model, is_shaped))
    sizes = {
        name: math.prod(source.tensor_shape(part)) * leaf.dtype.itemsize
        for source, leaf in zip(sources, leaves, strict=True)
        for layer in source.names
        for part, name in enumerate(layer)
    }
    place = _places(sizes, max_shard_bytes)
    count = 1 + max(place.values())
    files = [f"model-{n:05}-of-{count:05}.safetensors" for n in range(1, count + 1)]
    files = files if count > 1 else [SINGLE]

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        for source, leaf in zip(sources, leaves, strict=True):
            yield from write_tensors(source, leaf).items()

    with new_folder(Path(folder).expanduser()) as written:
        for number, some in itertools.groupby(tensors(), key=lambda item: place[item[0]]):
            save_file(dict(some), written / files[number], metadata={"format": "pt"})
        if count > 1:
            weights = {name: files[number] for name, number in place.items()}
            _write_json(
                written / INDEX,
                {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weights},
            )
        _write_json(written / "config.json", values)
        if tokenizer is not None:
            tokenizer.save(str(written / "tokenizer.json"))


def _places(sizes: dict[str, int], most: int) -> dict[str, int]:
    """Returns the number of the file of each tensor, none larger than `most` if it can be."""
    places, file, used = {}, 0, 0
    for name, size in sizes.items():
        if used and used + size > most:
            file, used = file + 1, 0
        places[name], used = file, used + size
    return places


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _known_config(model: Transformer) -> Config:
    """Returns the shape of a model, if a model loaded from a file of it would be the same."""
    config = config_of(model)
    like = eqx.filter_eval_shape(build, config, model.dtype, False, jax.random.key(0))
    again = from_json(to_json(config))
    differs = [
        f"{field.name} {getattr(config, field.name)!r}"
        for field in dataclasses.fields(Config)
        if getattr(config, field.name) != getattr(again, field.name)
    ]
    if model.embedding_scale != 1:
        differs.append(f"embedding_scale {model.embedding_scale:g} instead of 1")
    shapes = [[leaf.shape for leaf in jax.tree.leaves(m) if is_shaped(leaf)] for m in (model, like)]
    if not differs and sorted(shapes[0]) != sorted(shapes[1]):
        differs.append("layers of different options")
    if differs:
        raise ValueError(
            "`model` must be one that other libraries know, got one that is otherwise of the "
            f"family {config.family} with {', '.join(differs)}. Save it by "
            "`equinox.tree_serialise_leaves`."
        )
    return config
