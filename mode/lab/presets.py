"""Configurations with a name, to plan for: an arm and a size."""

from functools import partial
from typing import NamedTuple

from .options import Size


class Preset(NamedTuple):
    """An arm, a size and a line of help."""

    arm: str
    size: Size
    about: str


_large = partial(Size, length=2048, vocab=32768, dtype="bfloat16")
_100m = partial(_large, dim=768, depth=12, heads=12, batch=16)
_1b = partial(_large, dim=2048, depth=20, heads=16, batch=8, remat=True)
_100b = partial(_large, dim=3072, depth=40, heads=24, kv_heads=8, batch=256, remat=True)
_HALF = "half of the layers for an eighth of the tokens"

PRESETS = {
    "mode-100b": Preset(
        "mode-integrated",
        _100b(length=4096, experts=64, noop=64),
        "integrated MoDE, 99.3 billion parameters: 64 experts and 64 no-op experts in 20 of 40 "
        "layers",
    ),
    "h100-fits": Preset(
        "mod",
        _large(dim=2560, depth=46, heads=20, batch=4, remat=True),
        "Mixture-of-Depths that just fits on one H100; two more layers do not",
    ),
    "dense-100m": Preset("dense", _100m(), "110 million parameters"),
    "mod-100m": Preset("mod", _100m(), f"110 million, {_HALF}"),
    "mode-100m": Preset(
        "mode-integrated",
        _100m(dim=512, depth=8, heads=8, experts=8, noop=8),
        "100 million, 8 experts and 8 no-op experts in half of the layers",
    ),
    "dense-1b": Preset("dense", _1b(), "1.07 billion parameters"),
    "mod-1b": Preset("mod", _1b(), f"1.07 billion, {_HALF}"),
    "mode-1b": Preset(
        "mode-integrated",
        _1b(dim=1024, depth=12, heads=8, experts=16, noop=16),
        "0.94 billion, 16 experts and 16 no-op experts in half of the layers",
    ),
}


def preset_named(name: str) -> Preset:
    """Finds a preset by its name; raises `ValueError` for an unknown one."""
    if name not in PRESETS:
        raise ValueError(f"`preset` must be one of {', '.join(PRESETS)}, got {name!r}.")
    return PRESETS[name]


def presets_help() -> str:
    """Describes each preset for the command line."""
    each = "; ".join(f"{name}: {preset.about}" for name, preset in PRESETS.items())
    return f"A named configuration, parts of which the options of `size` and `arm` change. {each}."
