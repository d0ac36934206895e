"""Configurations with a name, to plan for: an arm and a size."""

import dataclasses

from .arms import Size


@dataclasses.dataclass(frozen=True)
class Preset:
    """What to train.

    **Attributes:**

    - `arm`: the name of one.
    - `size`: its dimensions.
    - `about`: for the help text.
    """

    arm: str
    size: Size
    about: str


_LARGE = Size(length=2048, vocab=32768, dtype="bfloat16")
_100M = dataclasses.replace(_LARGE, dim=768, depth=12, heads=12, batch=16)
_1B = dataclasses.replace(_LARGE, dim=2048, depth=20, heads=16, batch=8, remat=True)

PRESETS = {
    "mode-100b": Preset(
        "mode-integrated",
        dataclasses.replace(
            _LARGE,
            dim=3072,
            depth=40,
            heads=24,
            kv_heads=8,
            length=4096,
            batch=256,
            experts=64,
            noop=64,
            remat=True,
        ),
        "integrated MoDE, 99.3 billion parameters: 64 experts and 64 no-ops in 20 of 40 layers",
    ),
    "h100-fits": Preset(
        "mod",
        dataclasses.replace(_LARGE, dim=2560, depth=46, heads=20, batch=4, remat=True),
        "Mixture-of-Depths that just fits on one H100; two more layers do not",
    ),
    "dense-100m": Preset("dense", _100M, "110 million parameters"),
    "mod-100m": Preset("mod", _100M, "110 million, half of the layers for an eighth of the tokens"),
    "mode-100m": Preset(
        "mode-integrated",
        dataclasses.replace(_100M, dim=512, depth=8, heads=8, experts=8, noop=8),
        "100 million, 8 experts and 8 no-ops in half of the layers",
    ),
    "dense-1b": Preset("dense", _1B, "1.07 billion parameters"),
    "mod-1b": Preset("mod", _1B, "1.07 billion, half of the layers for an eighth of the tokens"),
    "mode-1b": Preset(
        "mode-integrated",
        dataclasses.replace(_1B, dim=1024, depth=12, heads=8, experts=16, noop=16),
        "0.94 billion, 16 experts and 16 no-ops in half of the layers",
    ),
}


def preset_named(name: str) -> Preset:
    """The preset of that name.

    **Raises:** `ValueError` for an unknown one.
    """
    if name not in PRESETS:
        raise ValueError(f"`preset` must be one of {', '.join(PRESETS)}, got {name!r}.")
    return PRESETS[name]


def presets_help() -> str:
    """What each preset is, for the command line."""
    each = "; ".join(f"{name}: {preset.about}" for name, preset in PRESETS.items())
    return f"A named configuration, of which flags of `size` and `arm` change parts. {each}."
