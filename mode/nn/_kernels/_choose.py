"""Which kernels there are for given queries and keys, or why not."""

from typing import Literal

from ._blockwise import blockwise
from ._call import Arrays, Kernel, Kernels
from ._cudnn import cudnn
from ._scoring import Scoring
from ._splash import splash


Implementation = Literal["blockwise", "cudnn", "splash"]
_PLATFORMS = {"cudnn": "cuda", "splash": "tpu"}


def causal_kernels(
    scoring: Scoring,
    x: Arrays,
    others: Arrays,
    layout: str,
    *,
    block_size: int,
    implementation: Implementation | None,
) -> Kernels:
    """Returns what `call` chooses from, for `x` and `others` as `blockwise` takes them.

    **Raises:** `ValueError` where `implementation` names a kernel that cannot do it.
    """
    default = blockwise(scoring, block_size)
    if implementation == "blockwise":
        return Kernels(default, dict.fromkeys(_PLATFORMS.values(), "it is required"))
    dtypes = {part.dtype for part in x}
    found: dict[str, Kernel | str] = dict.fromkeys(
        _PLATFORMS.values(), "queries, keys and values differ in dtype"
    )
    if len(dtypes) == 1:
        found = {
            "cuda": cudnn(scoring, x, others, layout),
            "tpu": splash(scoring, x, others, layout),
        }
    if implementation is None:
        return Kernels(default, found)
    chosen = found[_PLATFORMS[implementation]]
    if isinstance(chosen, str):
        raise ValueError(
            f"`implementation` must be able to compute this attention, got {implementation!r}: "
            f"{chosen}. Leave it out, and what cannot be had falls back."
        )
    return Kernels(default, found, required=implementation)
