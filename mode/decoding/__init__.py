"""Decoding: prefill, decode steps, generation and sampling."""

from ._generate import (
    Generation as Generation,
    continue_generation as continue_generation,
    generate as generate,
    stream as stream,
)
from ._sampler import Sampler as Sampler
from ._state import DecodeState as DecodeState
from ._steps import (
    decode_step as decode_step,
    decode_tokens as decode_tokens,
    prefill as prefill,
    rewind as rewind,
)
