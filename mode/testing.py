"""Invariants that a user calls on what they composed: a layer, a stack of them, a whole model.

Each draws its own inputs: hidden states where `dim` is given, token ids where `vocab` is. Each
raises `AssertionError`, saying what differed and where. Our own tests call them too.
`compiles_for` goes further: it runs the compilers of TPU and GPU, on any machine.

>>> import jax, mode
>>> block = mode.TransformerBlock(32, num_heads=4, key=jax.random.key(0))
>>> layer = mode.MixtureOfDepths(block, 32, capacity=0.125, key=jax.random.key(1))
>>> mode.testing.assert_static_shapes(layer, tokens=(64, 128), dim=32)  # nothing is allocated
>>> mode.testing.assert_exact_capacity(layer, tokens=64, dim=32)
>>> mode.testing.assert_causal(mode.causal(layer), tokens=32, dim=32)
>>> model = mode.mod_decoder(64, 32, depth=2, num_heads=4, key=jax.random.key(0))
>>> mode.testing.assert_decodes(mode.causal(model), vocab=64)
"""

from collections.abc import Callable, Sequence

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, PRNGKeyArray, PyTree

from ._capacity import token_capacity
from ._decode_testing import assert_decodes as assert_decodes
from ._hlo import Collective as Collective
from ._memory import Exceeded as Exceeded, memory_of as memory_of
from ._router import Router
from ._routing import Routing
from ._state import routers, trainable, update_state
from ._targets import (
    Compiled as Compiled,
    compiles_for as compiles_for,
    mesh_for as mesh_for,
)


Model = Callable[..., tuple[Array, tuple[Routing, ...]]]


def _abstract(
    groups: tuple[int, ...], tokens: int, dim: int | None, vocab: int | None, dtype: DTypeLike
) -> jax.ShapeDtypeStruct:
    if (dim is None) == (vocab is None):
        raise ValueError(
            f"give exactly one of `dim` (hidden states) and `vocab` (token ids), got dim={dim} and "
            f"vocab={vocab}."
        )
    if dim is None:
        return jax.ShapeDtypeStruct((*groups, tokens), jnp.int32)
    return jax.ShapeDtypeStruct((*groups, tokens, dim), dtype)


def _inputs(like: jax.ShapeDtypeStruct, vocab: int | None, key: PRNGKeyArray) -> Array:
    if vocab is None:
        return jax.random.normal(key, like.shape, like.dtype)
    return jax.random.randint(key, like.shape, 0, vocab, like.dtype)


def _key(key: PRNGKeyArray | None) -> PRNGKeyArray:
    return jax.random.key(0) if key is None else key


@eqx.filter_jit
def _run(model: Model, x: Array, key: PRNGKeyArray) -> tuple[Array, tuple[Routing, ...]]:
    return model(x, key=key)


def _check_routed(model: Model) -> None:
    if not routers(model):
        raise AssertionError("the model has no router: there is nothing to check.")


def _pairs(model: Model, routings: tuple[Routing, ...]) -> list[tuple[Router, Routing]]:
    """Each router with its routing; both are in the order of the model."""
    found = routers(model)
    if len(found) != len(routings):
        raise AssertionError(f"{len(found)} routers, but {len(routings)} routings were returned.")
    return list(zip(found, routings, strict=True))


def assert_static_shapes(
    model: Model,
    *,
    tokens: int | Sequence[int],
    dim: int | None = None,
    vocab: int | None = None,
    groups: tuple[int, ...] = (2,),
    dtype: DTypeLike = jnp.float32,
) -> None:
    """Every shape is what the configuration says, at each length, before anything runs.

    Hidden states keep shape and dtype; every routing has `token_capacity` slots. Nothing is
    allocated: a model for a large accelerator can be checked on a laptop.

    **Arguments:**

    - `model`: a layer (with `dim`) or a model of token ids (with `vocab`).
    - `tokens`: the lengths to try, or one.
    - `groups`: leading axes.
    """
    for length in (tokens,) if isinstance(tokens, int) else tokens:
        like = _abstract(groups, length, dim, vocab, dtype)
        hidden, routings = eqx.filter_eval_shape(
            lambda m, x: m(x, key=jax.random.key(0)), model, like
        )
        if vocab is None:
            chex.assert_shape(hidden, like.shape)
            chex.assert_type(hidden, like.dtype)
        else:
            chex.assert_shape(hidden, (*like.shape, vocab))
        for router, routing in _pairs(model, routings):
            _check_routing_shapes(router, routing, groups)


def _check_routing_shapes(router: Router, routing: Routing, groups: tuple[int, ...]) -> None:
    stacked = router.state.layers
    leading = (*stacked, *groups)
    length = routing.num_tokens
    choices = router.state.bias.shape[-1]
    slots = token_capacity(length, router.select.share(router.fraction))
    chex.assert_shape([routing.index, routing.weight], (*leading, router.num_experts, slots))
    chex.assert_shape(routing.logits, (*leading, length, choices))
    chex.assert_shape(routing.load, (*leading, choices))
    chex.assert_shape(routing.valid, (*leading, length))
    chex.assert_type([routing.index, routing.load], jnp.int32)
    if jnp.finfo(routing.logits.dtype).bits < 32:
        raise AssertionError(f"the router computed in {routing.logits.dtype}, below float32.")


def assert_residual_identity(
    layer: Model,
    *,
    tokens: int = 64,
    dim: int,
    groups: tuple[int, ...] = (2,),
    dtype: DTypeLike = jnp.float32,
    key: PRNGKeyArray | None = None,
) -> None:
    """Tokens that the layer's first router did not select leave it with the bits they came with.

    For `MixtureOfDepths` and for `Residual(MixtureOfExperts(...))` without shared experts; not for
    a layer that does something to every token, as integrated MoDE's attention does.
    """
    x = _inputs(_abstract(groups, tokens, dim, None, dtype), None, _key(key))
    hidden, routings = _run(layer, x, _key(key))
    if not routings:
        raise AssertionError("the layer returned no routing: nothing was skipped.")
    skipped = ~np.any(routings[0].selected, axis=-1)
    if skipped.shape != x.shape[:-1]:
        raise AssertionError("the routing is of several layers: give one layer, not a stack.")
    before, after = np.asarray(x)[skipped], np.asarray(hidden)[skipped]
    if before.tobytes() != after.tobytes():
        rows = np.any(before != after, axis=-1)
        raise AssertionError(
            f"{rows.sum()} of {len(rows)} tokens that the first router skipped were changed. This "
            "is right for a layer that does something to every token, such as integrated MoDE's "
            "attention or a shared expert, and not what this assertion is for."
        )


def assert_exact_capacity(
    model: Model,
    *,
    tokens: int = 64,
    dim: int | None = None,
    vocab: int | None = None,
    groups: tuple[int, ...] = (2,),
    dtype: DTypeLike = jnp.float32,
    key: PRNGKeyArray | None = None,
) -> None:
    """Every expert of every router takes exactly its capacity of tokens, each once, in time order.

    For selectors that fill their slots: `ExpertChoice`, `RandomChoice`, `Strided`. `TokenChoice`
    and `Threshold` may leave some empty, and fail this.
    """
    x = _inputs(_abstract(groups, tokens, dim, vocab, dtype), vocab, _key(key))
    _, routings = _run(model, x, _key(key))
    _check_routed(model)
    for router, routing in _pairs(model, routings):
        slots = token_capacity(routing.num_tokens, router.fraction)
        if routing.index.shape[-1] != slots:
            raise AssertionError(
                f"{routing.index.shape[-1]} slots where the capacity is {slots} of "
                f"{routing.num_tokens} tokens."
            )
        if not np.all(routing.filled):
            raise AssertionError(
                f"{int(np.sum(~routing.filled))} slots were left empty. `TokenChoice` and "
                "`Threshold` may leave some: this is for selectors that fill their slots."
            )
        if not np.all(np.diff(routing.index, axis=-1) > 0):
            raise AssertionError("an expert's tokens are not in time order, or one is there twice.")


def assert_no_retrace(
    model: Model,
    *,
    tokens: int = 64,
    dim: int | None = None,
    vocab: int | None = None,
    groups: tuple[int, ...] = (2,),
    dtype: DTypeLike = jnp.float32,
    key: PRNGKeyArray | None = None,
) -> None:
    """One compiled program serves every routing and every step.

    Inputs that route differently, and a model whose router state was moved by `update_state`, trace
    it once; a model that decides in Python by the value of an array, or whose shapes depend on
    something outside its arguments, such as a counter of its calls, fails.
    """
    like = _abstract(groups, tokens, dim, vocab, dtype)
    arrays, rest = eqx.partition(model, eqx.is_array)

    def call(
        arrays: PyTree, x: Array, key: PRNGKeyArray
    ) -> tuple[Array, tuple[Routing, ...], PyTree]:
        nonlocal traces
        traces += 1
        model = eqx.combine(arrays, rest)
        hidden, routings = model(x, key=key)
        return hidden, routings, eqx.filter(update_state(model, routings), eqx.is_array)

    traces = 0
    run = jax.jit(call)
    moved, results = arrays, []
    try:
        for draw in jax.random.split(_key(key), 3):
            *results, moved = run(moved, _inputs(like, vocab, draw), draw)
    except jax.errors.ConcretizationTypeError as error:
        raise AssertionError(f"the model reads the value of an array in Python: {error}") from error
    if traces != 1:
        raise AssertionError(f"calls of one shape were traced {traces} times.")
    # A new function, so that JAX does not answer from the trace it has.
    *again, _ = jax.eval_shape(lambda *args: call(*args), arrays, like, _key(key))
    for first, second in zip(jax.tree.leaves(results), jax.tree.leaves(again), strict=True):
        if (first.shape, first.dtype) != (second.shape, second.dtype):
            raise AssertionError(
                f"traced again, the same call gave shape {second.shape} instead of {first.shape}: "
                "the model depends on something outside its arguments."
            )


def assert_causal(
    model: Model,
    *,
    tokens: int = 64,
    dim: int | None = None,
    vocab: int | None = None,
    groups: tuple[int, ...] = (2,),
    dtype: DTypeLike = jnp.float32,
    key: PRNGKeyArray | None = None,
) -> None:
    """Changing later tokens changes no earlier output, bit for bit.

    Passes for `causal(model)`, and fails, as it should, for a model whose training selector looks
    ahead. Four cuts are tried: everything from a quarter, a half, three quarters and the last token
    on is replaced.
    """
    like = _abstract(groups, tokens, dim, vocab, dtype)
    first, second = jax.random.split(_key(key))
    x, other = _inputs(like, vocab, first), _inputs(like, vocab, second)
    axis = len(groups)
    late = jnp.arange(tokens).reshape(tokens, *[1] * (x.ndim - axis - 1))
    before, _ = _run(model, x, first)
    for cut in sorted({tokens // 4, tokens // 2, 3 * tokens // 4, tokens - 1} - {0}):
        after, _ = _run(model, jnp.where(late >= cut, other, x), first)
        differs = np.any(np.asarray(before) != np.asarray(after), axis=-1)
        changed = np.any(differs.reshape(-1, tokens), axis=0)[:cut]
        if changed.any():
            raise AssertionError(
                f"changing the tokens from {cut} on changed the output at {int(changed.argmax())}: "
                f"the model sees the future. {_who_looks_ahead(model)}"
            )


def _who_looks_ahead(model: Model) -> str:
    selectors = {type(r.select).__name__ for r in routers(model) if r.select.looks_ahead}
    if not selectors:
        return (
            "No selector in it says that it looks ahead: one that does without saying so, or a "
            "block, such as its attention, does."
        )
    return (
        f"Its selector {' and '.join(sorted(selectors))} does, as in training it may; evaluate and "
        "sample through `mode.causal(model)`."
    )


def assert_router_gradients(
    model: Model,
    *,
    tokens: int = 64,
    dim: int | None = None,
    vocab: int | None = None,
    groups: tuple[int, ...] = (2,),
    dtype: DTypeLike = jnp.float32,
    key: PRNGKeyArray | None = None,
) -> None:
    """The gradient of a loss on the output reaches the scorer of every router, and is finite."""
    like = _abstract(groups, tokens, dim, vocab, dtype)
    x = _inputs(like, vocab, _key(key))
    parameters, rest = eqx.partition(model, trainable(model))

    @jax.jit
    @jax.grad
    def gradient(parameters: PyTree) -> Array:
        hidden, _ = eqx.combine(parameters, rest)(x, key=_key(key))
        return jnp.sum(jnp.sin(hidden.astype(jnp.float32)))

    _check_routed(model)
    gradients = gradient(parameters)
    if not all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradients)):
        raise AssertionError("a gradient is not finite.")
    for place, (router, gradient_of) in enumerate(
        zip(routers(model), routers(gradients), strict=True)
    ):
        stacked = len(router.state.layers)
        for leaf in jax.tree.leaves(gradient_of.scorer):
            norms = np.abs(np.asarray(leaf)).sum(axis=tuple(range(stacked, leaf.ndim)))
            if not np.all(norms > 0):
                raise AssertionError(f"no gradient reaches the scorer of router {place}.")


def assert_batch_independent(
    model: Model,
    *,
    tokens: int = 64,
    dim: int | None = None,
    vocab: int | None = None,
    batch: int = 4,
    dtype: DTypeLike = jnp.float32,
    key: PRNGKeyArray | None = None,
) -> None:
    """What a sequence gets does not depend on its batch mates, bit for bit.

    And `jax.vmap` over the batch routes as the batch itself does. (The second part does not hold
    for `RandomChoice`, whose draws depend on the shape.)
    """
    like = _abstract((batch,), tokens, dim, vocab, dtype)
    first, second = jax.random.split(_key(key))
    x, other = _inputs(like, vocab, first), _inputs(like, vocab, second)
    together, routings = _run(model, x, first)
    # A second draw may happen to rank as the first did; louder mates, or equal ones, do not.
    for mates in (other, jnp.full_like(other, 10) * other if vocab is None else 0 * other):
        mixed, _ = _run(model, jnp.concatenate([x[:1], mates[1:]]), first)
        if np.asarray(together[0]).tobytes() != np.asarray(mixed[0]).tobytes():
            raise AssertionError("changing the other sequences of a batch changed the first one's.")
    mapped, mapped_routings = eqx.filter_jit(
        lambda m, x: jax.vmap(lambda row: m(row, key=first))(x)
    )(model, x)
    tolerance = 1e-4 if jnp.finfo(together.dtype).bits >= 32 else 3e-2
    chex.assert_trees_all_close(
        np.float32(mapped), np.float32(together), rtol=tolerance, atol=tolerance
    )
    for one, many in zip(routings, mapped_routings, strict=True):
        if one.num_filled.sum() != many.num_filled.sum():
            raise AssertionError("`jax.vmap` over the batch filled another number of slots.")
