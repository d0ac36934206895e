"""The records of a healing: its settings, checkpoints and results."""

from ..checkpoint import AbstractNotes
from ..files import FloatOrNaN, Record
from .options import Converting, Healing


class HealSettings(Record):
    """The settings of a run of `mode-lab heal`, and the fingerprint of its text."""

    format = "mode-lab heal"
    version = 1

    options: Healing
    corpus: str


class HealNotes(AbstractNotes):
    """A checkpoint of one arm but for its arrays."""

    format = "mode-lab heal checkpoint"
    version = 2

    arm: str
    settings: HealSettings
    losses: tuple[FloatOrNaN, ...]
    converted: float
    routers: float | None = None


class HealResult(Record):
    """`result.json` of one arm: held-out losses in nats per token.

    `converted` is before any training, `routers` after the steps of routers alone (`None` where
    there were none), `healed` at the end, as trained, and `causal` under the rule by which text is
    sampled, `None` for an arm without routers that learn. `flops` are those of a forward pass per
    token; `capacity_causal` is the fraction of the tokens that the causal rule selects.
    """

    format = "mode-lab heal result"
    version = 1

    arm: str
    settings: HealSettings
    dense: float
    converted: float
    routers: float | None
    healed: float
    causal: float | None
    capacity_causal: float | None
    flops: float
    flops_dense: float
    losses: tuple[FloatOrNaN, ...]
    seconds: float


class LayersRecord(Record):
    """`layers.json` of `mode-lab convert`: what each layer is worth, and those that were routed.

    Losses are in nats per token; `cosines` are of the input and the output of each layer.
    """

    format = "mode-lab convert"
    version = 1

    options: Converting
    corpus: str
    dense: float
    converted: float
    layers: tuple[int, ...]
    cosines: tuple[float, ...] | None
    losses_without: tuple[float, ...] | None
