"""The reference decoder: token ids in, logits out, any pattern of layers in between."""

from collections.abc import Callable, Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree, Shaped

from ._block import (
    AbstractBlock,
    AbstractLayer,
    Layer,
    Residual,
    Routings,
    can_be_called,
    check_layer,
    type_name,
)
from ._capacity import Share, check_count
from ._depth import MixtureOfDepths
from ._gate import AbstractGate, Raw
from ._info import TokenInfo, resolve_info
from ._linear import Linear, RMSNorm, project
from ._precision import float32_or_wider
from ._router import Predictor
from ._sharding import along_batch, gathered
from ._transformer import TransformerBlock


MakeLayer = Callable[[PRNGKeyArray], Layer]


class Stack(AbstractLayer):
    """A few layers, repeated: one scan, so that compiling takes as long for 48 layers as for 4.

    **Attributes:**

    - `layers`: one period of the pattern; every array has a leading axis of `repeats`.
    - `repeats`: how often the period is run, each time with parameters of its own.
    - `remat`: whether the backward pass recomputes each repeat instead of storing its activations.
    """

    layers: tuple[Layer, ...]
    repeats: int = eqx.field(static=True)
    remat: bool = eqx.field(static=True)

    def __call__(
        self,
        x: Float[Array, "*groups tokens dim"],
        info: TokenInfo | None = None,
        *,
        key: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, "*groups tokens dim"], Routings]:
        """As a layer; each routing has a leading axis of `repeats`."""
        arrays, rest = eqx.partition(self.layers, eqx.is_array)
        keys = None if key is None else jax.random.split(key, (self.repeats, len(self.layers)))

        def repeat(
            x: Float[Array, "*groups tokens dim"],
            step: tuple[PyTree, Shaped[Array, "period ..."] | None],
        ) -> tuple[Float[Array, "*groups tokens dim"], Routings]:
            arrays, keys = step
            routings: Routings = ()
            for place, layer in enumerate(eqx.combine(gathered(arrays), rest)):
                x, routed = layer(x, info, key=None if keys is None else keys[place])
                routings += routed
            return along_batch(x), routings

        if self.remat:
            repeat = jax.checkpoint(repeat, prevent_cse=False)  # pyright: ignore
        return jax.lax.scan(repeat, x, (arrays, keys))


class Transformer(eqx.Module):
    """A decoder-only language model with any pattern of layers.

    Layers of equal structure that repeat with a period, found by comparing them, are scanned over;
    so the routings come one per routed layer *of the period*, with a leading axis of repeats.
    Parameters are float32; activations have `dtype`; routers and logits are float32.

    **Arguments:**

    - `vocab`: number of token ids.
    - `dim`: features of the hidden states.
    - `layers`: one function per layer, from bottom to top, that builds it from a key: see
        `every_other`. A capacity schedule is a list whose functions differ.
    - `tied`: whether the embedding is the output projection too.
    - `dtype`: of the activations, such as `jnp.bfloat16`.
    - `remat`: recompute activations in the backward pass, one period of layers at a time.

    **Raises:** `ValueError` for no layers, sizes below 1, or what builds no layer.

    >>> import jax, jax.numpy as jnp, mode
    >>> dense = lambda key: mode.Residual(mode.TransformerBlock(32, 4, key=key))
    >>> model = mode.Transformer(256, 32, [dense] * 6, key=jax.random.key(0))
    >>> logits, routings = model(jnp.zeros((2, 16), int))
    >>> logits.shape, routings
    ((2, 16, 256), ())
    """

    embedding: Float[Array, "vocab dim"]
    stacks: tuple[Stack, ...]
    norm: RMSNorm
    head: Linear | None
    dtype: jnp.dtype = eqx.field(static=True)

    def __init__(
        self,
        vocab: int,
        dim: int,
        layers: Sequence[MakeLayer],
        *,
        tied: bool = True,
        dtype: DTypeLike = jnp.float32,
        remat: bool = False,
        key: PRNGKeyArray,
    ):
        for name, value in (("vocab", vocab), ("dim", dim), ("layers", len(layers))):
            check_count(name, value, 1)
        embedding_key, head_key, *layer_keys = jax.random.split(key, 2 + len(layers))
        # Scaled up by sqrt(dim) on the way in, so that tied logits start with unit variance.
        self.embedding = dim**-0.5 * jax.random.normal(embedding_key, (vocab, dim), jnp.float32)
        self.stacks = _stacked(
            [_make_layer(make, key) for make, key in zip(layers, layer_keys, strict=True)], remat
        )
        self.norm = RMSNorm(dim)
        self.head = None if tied else Linear(dim, vocab, key=head_key)
        self.dtype = jnp.dtype(dtype)

    @property
    def depth(self) -> int:
        """Number of layers."""
        return sum(len(stack.layers) * stack.repeats for stack in self.stacks)

    def embed(self, tokens: Int[Array, "*groups tokens"]) -> Float[Array, "*groups tokens dim"]:
        """Hidden states of token ids, as the first layer takes them."""
        # NaN for an id that does not exist: clamping it, as indexing does, would go unnoticed.
        rows = (
            gathered(self.embedding)
            .at[tokens]
            .get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
        )
        return along_batch(rows.astype(self.dtype) * self.embedding.shape[-1] ** 0.5)

    def __call__(
        self,
        tokens: Int[Array, "*groups tokens"],
        info: TokenInfo | None = None,
        *,
        key: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, "*groups tokens vocab"], Routings]:
        """`tokens`: `[*groups, tokens]`, ids below `vocab`; any other, but in the padding,
        makes its sequence NaN. Returns next-token logits in float32 or wider, and the routings."""
        if tokens.ndim < 1 or not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise ValueError(
                "`tokens` must be integers with the axes [*groups, tokens], got shape "
                f"{tokens.shape} and dtype {tokens.dtype}."
            )
        if info is not None:
            info = resolve_info(tokens[..., None], info)
            tokens = jnp.where(info.valid, tokens, 0)  # any id may stand in the padding
        x = self.embed(tokens)
        keys = [None] * len(self.stacks) if key is None else jax.random.split(key, len(self.stacks))
        routings: Routings = ()
        for stack, stack_key in zip(self.stacks, keys, strict=True):
            x, routed = stack(x, info, key=stack_key)
            routings += routed
        return self.unembed(x), routings

    def unembed(self, x: Float[Array, "*axes dim"]) -> Float[Array, "*axes vocab"]:
        """Logits, float32 or wider, of hidden states as the last layer returns them."""
        with jax.named_scope("mode.logits"):
            x = self.norm(x)
            embedding, head = gathered((self.embedding, self.head))
            logits = project(x, embedding.T) if head is None else head(x)
            return along_batch(logits.astype(float32_or_wider(x.dtype)))


def _make_layer(make: MakeLayer, key: PRNGKeyArray) -> Layer:
    if isinstance(make, AbstractLayer | AbstractBlock) or not can_be_called(make, key):
        raise ValueError(
            "`layers` must be functions, each of which builds a layer from a key, got "
            f"{type_name(make)}. Write `lambda key: Residual(TransformerBlock(..., key=key))`."
        )
    layer = make(key)
    check_layer("layers", layer)
    return layer


def _stacked(layers: list[Layer], remat: bool) -> tuple[Stack, ...]:
    """Group layers into repeated periods and stack the parameters of each."""
    structures = [_structure(layer) for layer in layers]
    stacks = []
    start = 0
    while start < len(layers):
        period, repeats = _period(structures[start:])
        places = (
            layers[start + place : start + period * repeats : period] for place in range(period)
        )
        stacks.append(Stack(tuple(_stack(same) for same in places), repeats, remat))
        start += period * repeats
    return tuple(stacks)


def _stack(layers: list[Layer]) -> Layer:
    return jax.tree.map(
        lambda *leaves: jnp.stack(leaves) if eqx.is_array(leaves[0]) else leaves[0], *layers
    )


def _structure(layer: Layer) -> tuple[object, ...]:
    """What two layers must share to be run by the same code."""
    leaves, tree = jax.tree.flatten(layer)
    return tree, *((x.shape, x.dtype) if eqx.is_array(x) else x for x in leaves)


def _period(structures: list[tuple[object, ...]]) -> tuple[int, int]:
    """The period and the number of repeats that cover most of the list from its start."""
    best = (1, 1)
    for period in range(1, len(structures) // 2 + 1):
        repeats = 1
        first = structures[:period]
        while structures[repeats * period : (repeats + 1) * period] == first:
            repeats += 1
        if repeats > 1 and period * repeats > best[0] * best[1]:
            best = (period, repeats)
    return best


def every_other(
    dense: MakeLayer, routed: MakeLayer, depth: int, *, every: int = 2, offset: int = 1
) -> list[MakeLayer]:
    """Layers of a `Transformer`: `routed` at `offset`, `offset + every`, ..., others `dense`.

    **Arguments:**

    - `dense`, `routed`: build a layer from a key.
    - `depth`: number of layers.
    - `every`: period of the routed layers; 1 routes all of them from `offset` on.
    - `offset`: the first routed layer, counted from 0.

    **Raises:** `ValueError` for `depth` or `every` below 1, or a negative `offset`.

    *Source:* arXiv:2404.02258, section 4.1: routing every other block is crucial. *Relative to the
    paper:* it does not say whether the first block is routed; here it is dense.
    """
    for name, value, least in (("depth", depth, 1), ("every", every, 1), ("offset", offset, 0)):
        check_count(name, value, least)
    return [
        routed if place >= offset and (place - offset) % every == 0 else dense
        for place in range(depth)
    ]


def mod_decoder(
    vocab: int,
    dim: int,
    depth: int,
    num_heads: int,
    *,
    capacity: Share | Sequence[Share] = 0.125,
    every: int = 2,
    offset: int = 1,
    num_kv_heads: int | None = None,
    gate: AbstractGate = Raw(),
    predictor: bool = False,
    position_bins: int = 1,
    tied: bool = True,
    dtype: DTypeLike = jnp.float32,
    remat: bool = False,
    key: PRNGKeyArray,
) -> Transformer:
    """The paper's model: a `Transformer` with Mixture-of-Depths around every other block.

    **Arguments:**

    - `vocab`, `dim`, `tied`, `dtype`, `remat`: of `Transformer`.
    - `depth`: number of layers.
    - `num_heads`, `num_kv_heads`: of `TransformerBlock`.
    - `capacity`: of each routed layer; a sequence is a schedule, one number per routed layer from
        bottom to top. Layers of one capacity in a row share a scan.
    - `every`, `offset`: which layers are routed, see `every_other`.
    - `gate`: of `MixtureOfDepths`.
    - `predictor`: whether each router has a `Predictor`.
    - `position_bins`: of `MixtureOfDepths`.

    **Raises:** `ValueError` for a schedule of another length than the number of routed layers.

    >>> import jax, jax.numpy as jnp, mode
    >>> model = mode.mod_decoder(256, 32, depth=12, num_heads=4, key=jax.random.key(0))
    >>> logits, (routing,) = model(jnp.zeros((2, 64), int))
    >>> logits.shape, routing.index.shape  # six routed layers, one scan
    ((2, 64, 256), (6, 2, 1, 8))

    *Source:* arXiv:2404.02258, sections 3.4 and 4.1.
    """

    def block(key: PRNGKeyArray) -> TransformerBlock:
        return TransformerBlock(dim, num_heads, num_kv_heads=num_kv_heads, key=key)

    def dense(key: PRNGKeyArray) -> Residual:
        return Residual(block(key))

    def routed(capacity: Share) -> MakeLayer:
        def make(key: PRNGKeyArray) -> MixtureOfDepths:
            block_key, router_key, predictor_key = jax.random.split(key, 3)
            return MixtureOfDepths(
                block(block_key),
                dim,
                capacity,
                gate=gate,
                predictor=Predictor(dim, key=predictor_key) if predictor else None,
                position_bins=position_bins,
                key=router_key,
            )

        return make

    makers = every_other(dense, routed(1.0), depth, every=every, offset=offset)
    places = [place for place, make in enumerate(makers) if make is not dense]
    count = len(places)
    schedule = list(capacity) if isinstance(capacity, Sequence) else [capacity] * count
    if len(schedule) != count:
        raise ValueError(
            f"`capacity` must have one number per routed layer, {count}, got {len(schedule)}."
        )
    for place, share in zip(places, schedule, strict=True):
        makers[place] = routed(share)
    return Transformer(vocab, dim, makers, tied=tied, dtype=dtype, remat=remat, key=key)
