"""Softmax attention by the kernel of the platform, and by code for all of them.

`causal_kernels` says which there are for given queries and keys, `call` runs the one of the
platform that a program is lowered for.
"""

from ._after_cache import attend_after_cache as attend_after_cache
from ._blockwise import blockwise as blockwise, info_at as info_at
from ._call import (
    Kernels as Kernels,
    call as call,
    record_choices as record_choices,
    tangent_program as tangent_program,
)
from ._choose import Implementation as Implementation, causal_kernels as causal_kernels
from ._scoring import (
    Mask as Mask,
    Scoring as Scoring,
    product as product,
    stack_rows as stack_rows,
    unstack_rows as unstack_rows,
)
