"""Decode steps compute about the rows that need it: counted, not estimated."""

from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mode
from mode.nn import bucket_sizes, run_bucketed
from tests.helpers import assert_close


DIM, VOCAB, BATCH, TOKENS = 8, 16, 12, 10
KEY = jax.random.key(2)


@pytest.mark.parametrize("capacity", [Fraction(1, 8), Fraction(1, 3), Fraction(1)])
@pytest.mark.parametrize("rows", [1, 2, 7, 8, 32, 128])
def test_sizes_are_the_capacity_and_then_near_the_need(rows: int, capacity: Fraction) -> None:
    """None, the trained number of rows, all of them, and at most half too many between."""
    sizes = bucket_sizes(rows, capacity)
    trained = mode.token_capacity(rows, capacity)
    assert sizes == tuple(sorted(set(sizes)))
    assert {0, trained, rows} <= set(sizes)
    for needed in range(1, rows + 1):
        size = min(size for size in sizes if size >= needed)
        assert size <= max(trained, 1.5 * needed)


@pytest.mark.parametrize("needed", [0, 1, 3, 5, 12])
def test_needed_rows_get_what_they_would_get_among_all(needed: int) -> None:
    """And the smallest size that holds them runs, once."""
    rows = jax.random.normal(KEY, (BATCH, DIM))
    chosen = jnp.zeros(BATCH, bool).at[jax.random.permutation(KEY, BATCH)[:needed]].set(True)
    computed: Counter[int] = Counter()

    def function(index: Any) -> Any:
        some = rows if index is None else rows[index]
        jax.debug.callback(lambda: computed.update([len(some)]))
        return {"twice": 2 * some, "sum": some.sum(-1, keepdims=True)}

    sizes = bucket_sizes(BATCH, Fraction(1, 4))
    results = jax.jit(lambda: run_bucketed(function, chosen, sizes))()
    jax.effects_barrier()
    assert np.array_equal(results["twice"][chosen], 2 * rows[chosen])
    assert_close(results["sum"][chosen], rows.sum(-1, keepdims=True)[chosen], scale=5)
    assert all(np.isfinite(leaf).all() for leaf in results.values())
    expected = min(size for size in sizes if size >= needed)
    assert computed == ({expected: 1} if expected else {})


class Counted(eqx.Module):
    """An expert that counts the rows that it computes."""

    linear: mode.Linear
    count: Callable[[], None] = eqx.field(static=True)

    def __call__(self, x: jax.Array) -> jax.Array:
        jax.debug.callback(lambda _: self.count(), x[0])  # of an array: once for every row
        return self.linear(x)


def model_of_experts(count: Callable[[], None]) -> mode.Transformer:
    """One layer of six experts and two no-ops, each token choosing one."""

    def layer(key: jax.Array) -> mode.Residual:
        return mode.Residual(
            mode.MixtureOfExperts(
                lambda key: Counted(mode.Linear(DIM, DIM, key=key), count),
                DIM,
                6,
                num_noop=2,
                capacity_factor=4.0,
                select=mode.TokenChoice(1),
                key=key,
            )
        )

    return mode.Transformer(VOCAB, DIM, [layer], key=KEY)


def rows_of_a_step(model: mode.Transformer, rows: list[int]) -> tuple[int, np.ndarray[Any, Any]]:
    """Rows that experts computed in one step, and how many tokens each expert selected."""
    text = jax.random.randint(KEY, (BATCH, TOKENS), 0, VOCAB)
    state, _ = mode.prefill(model, text, max_tokens=2 * TOKENS)
    jax.block_until_ready(state)
    jax.effects_barrier()
    rows.clear()
    state, (routing,) = mode.decode_step(model, state, text[:, 0])
    jax.block_until_ready(state)
    jax.effects_barrier()
    return len(rows), np.asarray(routing.selected[0, :, 0].sum(axis=0))


@pytest.mark.parametrize("bias", [0.0, 100.0], ids=["balanced", "all no-ops"])
def test_an_expert_computes_its_rows_and_no_more_than_the_slack(bias: float) -> None:
    """And no-op choices cost nothing."""
    rows: list[int] = []
    model = model_of_experts(lambda: rows.append(1))
    of_choices = jnp.array([[0.0] * 6 + [bias] * 2])
    model = mode.map_routers(lambda r: eqx.tree_at(lambda r: r.state.bias, r, of_choices), model)
    computed, selected = rows_of_a_step(model, rows)
    assert selected.sum() < BATCH  # some chose a no-op
    assert bool(selected.any()) == (bias == 0)
    sizes = bucket_sizes(BATCH, mode.routers(model)[0].capacity)
    assert computed == sum(min(size for size in sizes if size >= count) for count in selected)
