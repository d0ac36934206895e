"""Every dtype through every kind of layer: activations keep theirs, routers widen."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array

import mode
from tests.helpers import assert_close
from tests.layers import CASES, DIM, TOKENS, Case, build, loss, run, split


KINDS = ("dense", "mod", "mod_delta", "mod_predictor", "moe_noop_top_1", "moe_shared_sigmoid")
KINDS += ("integrated", "staged", "stack")
kinds = pytest.mark.parametrize("case", [c for c in CASES if c.name in KINDS], ids=str)
narrow = pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bf16", "f16"])


@functools.cache
def inputs() -> Array:
    """Numbers that bfloat16 holds exactly, so that routers see the same in every dtype."""
    x = jax.random.normal(jax.random.key(1), (2, TOKENS, DIM))
    return x.astype(jnp.bfloat16).astype(jnp.float32)


def check(case: Case, x: Array, router_dtype: jnp.dtype) -> tuple[Array, tuple[mode.Routing, ...]]:
    out, routings = run(build(case), x)
    assert (out.dtype, out.shape) == (x.dtype, x.shape)
    for one in routings:
        assert one.logits.dtype == one.weight.dtype == router_dtype
        assert one.index.dtype == one.load.dtype == jnp.int32
        assert one.predictor is None or one.predictor.dtype == router_dtype
    return out, routings


@kinds
@narrow
def test_narrow_activations(case: Case, dtype: jnp.dtype) -> None:
    """The output has the dtype of the input and is close to the float32 result."""
    x = inputs()
    out, routings = check(case, x.astype(dtype), jnp.dtype("float32"))
    wide, wide_routings = check(case, x, jnp.dtype("float32"))
    if case.name.startswith("mod"):
        # The router reads the input itself, which is the same number in each dtype.
        assert np.array_equal(routings[0].logits, wide_routings[0].logits)
    # Where rounding changed a selection further in, there is nothing to compare.
    same = np.ones(x.shape[:2], bool)
    for one, other in zip(routings, wide_routings, strict=True):
        changed = np.any(np.asarray(one.selected != other.selected), axis=-1)
        same &= ~changed if changed.shape == same.shape else ~changed.any()
    assert same.mean() > 0.9
    assert_close(np.asarray(out)[same], np.asarray(wide)[same], scale=3)


@kinds
def test_double_precision(case: Case) -> None:
    """Nothing is narrowed on the way: float64 in, float64 routers, float64 out."""
    x = inputs()
    wide, _ = run(build(case), x)
    with jax.enable_x64(True):
        out, _ = check(case, x.astype(jnp.float64), jnp.dtype("float64"))
        assert_close(np.asarray(out, np.float32), np.asarray(wide), scale=10)
        assert np.any(np.asarray(out) != np.asarray(out).astype(np.float32))


@kinds
@narrow
def test_gradients_have_the_dtype_of_the_parameters(case: Case, dtype: jnp.dtype) -> None:
    of_parameters, of_input = eqx.filter_eval_shape(
        jax.grad(loss, argnums=(0, 2)), *split(build(case)), inputs().astype(dtype)
    )
    assert of_input.dtype == dtype
    assert {leaf.dtype for leaf in jax.tree.leaves(of_parameters)} == {jnp.dtype("float32")}
