"""Asserts what must not matter: later tokens, other sequences, and values for a program."""

from typing import Any

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from .._types import Key
from ..routing import routers, update_router_state
from ._case import Case, Info, Model, call_model


def assert_causal(model: Model, x: Array, info: Info = None, *, key: Key = None) -> None:
    """Asserts that changing later tokens changes no earlier output, bit for bit.

    `make_causal(model)` passes. A model whose selector sees the whole sequence, as in training,
    fails. Tokens are replaced from a quarter, a half and three quarters of the longest sequence on,
    and then the last one alone.
    """
    case = Case(model, x, info, key)
    valid = case.valid()
    tokens = valid.shape[-1]
    length = 1 + int(np.flatnonzero(valid.reshape(-1, tokens).any(axis=0)).max())
    if length < 2:
        raise ValueError("`x` must have at least two tokens in time, got 1: nothing comes later.")

    def output(x: Array) -> np.ndarray:
        result = np.asarray(case.run(x)[0])
        if np.isnan(result[valid].astype(np.float32)).any():
            raise AssertionError("the output has NaN where there is no padding.")
        return result

    before, replacement = output(x), case.other_inputs()
    time = jnp.arange(tokens) if case.has_ids else jnp.arange(tokens)[:, None]
    for cut in sorted({length // 4, length // 2, 3 * length // 4, length - 1} - {0}):
        after = output(jnp.where(jnp.broadcast_to(time >= cut, x.shape), replacement, x))
        differs = np.any(before != after, axis=-1) & valid
        changed = np.any(differs.reshape(-1, tokens), axis=0)[:cut]
        if changed.any():
            raise AssertionError(
                f"changing the tokens from {cut} on changed the output at {int(changed.argmax())}: "
                f"the model sees the future. {_reason(model)}"
            )


def _reason(model: Model) -> str:
    selectors = [router.select for router in routers(model)]
    names = sorted({type(select).__name__ for select in selectors if not select.is_causal})
    if names:
        return f"So does {' and '.join(names)}; evaluate and sample with `mode.make_causal(model)`."
    return (
        "All its selectors say that they are causal, so a selector says so wrongly, or a block, "
        "such as its attention, sees the future."
    )


def assert_batch_independent(model: Model, x: Array, info: Info = None, *, key: Key = None) -> None:
    """Asserts that the output of a sequence does not depend on the rest of its batch, bit for bit.

    The first axis of `x` is the batch, of at least 2. All sequences but the first, and then all but
    the last, are replaced. Also, `jax.vmap` over the batch must give what the batch does; it does
    not for `RandomChoice`, whose draws depend on the shape.
    """
    case = Case(model, x, info, key)
    valid = case.valid()
    if valid.ndim < 2 or len(valid) < 2:
        raise ValueError(
            "`x` must have a first axis of at least 2 sequences, [batch, *groups, tokens, ...], "
            f"got shape {x.shape}."
        )
    together, routings = case.run()
    drawn = case.other_inputs()
    # Other inputs may happen to rank as these do; larger or equal ones do not.
    extreme = jnp.broadcast_to(drawn[:1], x.shape) if case.has_ids else 10 * drawn
    for row in (0, len(x) - 1):
        for replacement in (drawn, extreme):
            mixed, _ = case.run(replacement.at[row].set(x[row]))
            before, after = (np.asarray(out[row])[valid[row]] for out in (together, mixed))
            if before.tobytes() != after.tobytes():
                raise AssertionError(
                    f"changing all other sequences of a batch changed the output of sequence {row}."
                )
    over_batch = eqx.filter_jit(eqx.filter_vmap(call_model, in_axes=(None, 0, 0, None)))
    mapped, mapped_routings = over_batch(model, x, info, case.key)
    tolerance = 1e-4 if jnp.finfo(together.dtype).bits >= 32 else 3e-2
    outputs = (np.asarray(out, np.float32)[valid] for out in (mapped, together))
    chex.assert_trees_all_close(*outputs, rtol=tolerance, atol=tolerance)
    for batched, vmapped in zip(routings, mapped_routings, strict=True):
        if batched.num_filled.sum() != vmapped.num_filled.sum():
            raise AssertionError("`jax.vmap` over the batch filled another number of slots.")


def assert_no_retrace(model: Model, x: Array, info: Info = None, *, key: Key = None) -> None:
    """Asserts that one compiled program serves every routing and every step.

    Three calls, with inputs that route differently and the router state that
    `update_router_state` returns, must be traced once. A model fails if it decides in Python by the
    value of an array, or if its shapes depend on something else than its arguments.
    """
    case = Case(model, x, info, key)
    traces = 0

    @eqx.filter_jit
    def call(model: Model, *args: Any) -> Any:
        nonlocal traces
        traces += 1
        output, routings = call_model(model, *args)
        return output, routings, update_router_state(model, routings)

    updated, results = model, []
    inputs = (x, case.other_inputs(1), case.other_inputs(2))
    try:
        for step_input, step_key in zip(inputs, jax.random.split(case.key, 3), strict=True):
            *results, updated = call(updated, step_input, info, step_key)
    except jax.errors.ConcretizationTypeError as error:
        raise AssertionError(f"the model reads the value of an array in Python: {error}") from error
    if traces != 1:
        raise AssertionError(f"calls with one shape were traced {traces} times.")
    again = eqx.filter_eval_shape(call_model, model, x, info, case.key)
    for before, after in zip(jax.tree.leaves(results), jax.tree.leaves(again), strict=True):
        if (before.shape, before.dtype) != (after.shape, after.dtype):
            raise AssertionError(
                f"traced again, the same call gave shape {after.shape} instead of {before.shape}: "
                "the model depends on something outside its arguments."
            )
