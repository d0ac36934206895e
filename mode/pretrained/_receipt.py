"""What a conversion changed."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp

from .._dtypes import is_shaped
from .._types import Ids, Scalar
from ..decoding import DecodeState, prefill
from ..flops import count_flops
from ..models import Transformer
from ..routing import count_parameters, make_causal


@dataclasses.dataclass(frozen=True)
class Receipt:
    """Two models on the same tokens. Pairs are those of the first and of the second.

    **Attributes:**

    - `difference`: the norm of the difference of their logits over that of the first's.
    - `parameters`: numbers in their arrays.
    - `flops_per_token`: of a forward pass over the tokens given, divided by their number.
    - `cache_bytes`: of the caches of one sequence of as many tokens; those of a routed layer have
        slots for its capacity (`make_causal(model, max_capacity=None)`).
    """

    difference: float
    parameters: tuple[int, int]
    flops_per_token: tuple[float, float]
    cache_bytes: tuple[int, int]

    def __str__(self) -> str:
        """A line for each."""
        rows = [f"logits            {self.difference:.2e} of their norm changed"]
        for name in ("parameters", "flops_per_token", "cache_bytes"):
            before, after = getattr(self, name)
            label = name.replace("_", " ").replace("flops", "FLOPs")
            rows.append(
                f"{label:<17} {before:,.0f} before, {after:,.0f} after: {after / before:.3f}"
            )
        return "\n".join(rows)


def compare(before: Transformer, after: Transformer, tokens: Ids) -> Receipt:
    """Runs two models on the same tokens, `[batch, tokens]`, and says what differs.

    **Raises:** `ValueError` for models of different vocabularies, or tokens of another shape.

    >>> import jax, jax.numpy as jnp, mode
    >>> dense = lambda key: mode.Residual(mode.TransformerBlock(32, 4, key=key))
    >>> model = mode.Transformer(256, 32, [dense], repeats=4, key=jax.random.key(0))
    >>> routed = mode.pretrained.convert(model, [1], capacity=1, key=jax.random.key(1))
    >>> receipt = mode.pretrained.compare(model, routed, jnp.zeros((2, 16), int))
    >>> receipt.difference < 1e-6, receipt.parameters[1] - receipt.parameters[0]
    (True, 64)
    """
    vocabularies = before.embedding.shape[0], after.embedding.shape[0]
    if vocabularies[0] != vocabularies[1] or tokens.ndim != 2:
        raise ValueError(
            "`before` and `after` must have one vocabulary and `tokens` the axes [batch, tokens], "
            f"got vocabularies of {vocabularies} and tokens of shape {tokens.shape}."
        )

    def flops(model: Transformer) -> float:
        return count_flops(model, tokens).total / tokens.size

    length = tokens.shape[-1]
    return Receipt(
        difference=float(logit_difference(before, after, tokens)),
        parameters=(count_parameters(before), count_parameters(after)),
        flops_per_token=(flops(before), flops(after)),
        cache_bytes=(_cache_bytes(before, length), _cache_bytes(after, length)),
    )


@eqx.filter_jit
def logit_difference(before: Transformer, after: Transformer, tokens: Ids) -> Scalar:
    """The norm of the difference of two models' logits over that of the first's."""
    logits, changed = before(tokens)[0], after(tokens)[0]
    return jnp.linalg.norm(changed - logits) / jnp.linalg.norm(logits)


def _cache_bytes(model: Transformer, length: int) -> int:
    """Bytes of the caches of one sequence of so many tokens, without computing them."""
    tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)

    def begin(model: Transformer, tokens: Ids) -> DecodeState:
        return prefill(make_causal(model, max_capacity=None), tokens, max_tokens=length)[0]

    state = eqx.filter_eval_shape(begin, model, tokens)
    return sum(
        leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state.caches) if is_shaped(leaf)
    )
