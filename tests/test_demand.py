"""While decoding, what is computed follows what is asked for: counted, not estimated."""

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
from mode._demand import on_demand, slot_counts

from .helpers import assert_close


DIM, VOCAB, BATCH, TOKENS = 8, 16, 12, 10
KEY = jax.random.key(2)


@pytest.mark.parametrize("fraction", [Fraction(1, 8), Fraction(1, 3), Fraction(1)])
@pytest.mark.parametrize("members", [1, 2, 7, 8, 32, 128])
def test_slots_are_the_share_and_then_near_the_demand(members: int, fraction: Fraction) -> None:
    counts = slot_counts(members, fraction)
    share = mode.token_capacity(members, fraction)
    assert counts == tuple(sorted(set(counts)))
    assert {0, share, members} <= set(counts)
    for demand in range(1, members + 1):
        slots = min(count for count in counts if count >= demand)
        assert slots <= max(share, 1.5 * demand)


@pytest.mark.parametrize("asked", [0, 1, 3, 5, 12])
def test_those_who_ask_get_what_all_would_get(asked: int) -> None:
    rows = jax.random.normal(KEY, (BATCH, DIM))
    who = jnp.zeros(BATCH, bool).at[jax.random.permutation(KEY, BATCH)[:asked]].set(True)
    computed: Counter[int] = Counter()

    def function(index: Any) -> Any:
        some = rows if index is None else rows[index]
        jax.debug.callback(lambda: computed.update([len(some)]))
        return {"twice": 2 * some, "sum": some.sum(-1, keepdims=True)}

    counts = slot_counts(BATCH, Fraction(1, 4))
    found = jax.jit(lambda: on_demand(function, who, counts))()
    jax.effects_barrier()
    assert np.array_equal(found["twice"][who], 2 * rows[who])
    assert_close(found["sum"][who], rows.sum(-1, keepdims=True)[who], scale=5)
    expected = min(count for count in counts if count >= asked)
    assert computed == ({expected: 1} if expected else {})


class Counted(eqx.Module):
    """An expert that counts the rows it is given."""

    linear: mode.Linear
    count: Callable[[], None] = eqx.field(static=True)

    def __call__(self, x: jax.Array) -> jax.Array:
        jax.debug.callback(lambda _: self.count(), x[0])  # of an array: once for every row
        return self.linear(x)


def mixture(count: Callable[[], None], **options: Any) -> mode.Transformer:
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
                **options,
            )
        )

    return mode.Transformer(VOCAB, DIM, [layer], key=KEY)


def rows_of_a_step(model: mode.Transformer, rows: list[int]) -> tuple[int, np.ndarray]:
    """Rows that experts computed in one step, and how many each expert took."""
    text = jax.random.randint(KEY, (BATCH, TOKENS), 0, VOCAB)
    decoding = mode.prefill(model, text, max_tokens=2 * TOKENS)
    jax.block_until_ready(decoding)
    jax.effects_barrier()
    rows.clear()
    decoding = jax.block_until_ready(mode.step(model, decoding, text[:, 0]))
    jax.effects_barrier()
    taken = decoding.caches[0][0].left.taken[0, :, TOKENS]
    return len(rows), np.asarray(taken.sum(axis=0))


def test_an_expert_computes_its_rows_and_no_more_than_the_slack() -> None:
    rows: list[int] = []
    model = mixture(lambda: rows.append(1))
    computed, demand = rows_of_a_step(model, rows)
    assert 0 < demand.sum() < BATCH  # some chose a no-op
    fraction = mode.routers(model)[0].fraction
    counts = slot_counts(BATCH, fraction)
    assert computed == sum(min(c for c in counts if c >= wanted) for wanted in demand)


def test_no_op_choices_cost_nothing() -> None:
    rows: list[int] = []
    model = mixture(lambda: rows.append(1))
    bias = jnp.array([[0.0] * 6 + [100.0] * 2])
    model = mode.map_routers(lambda r: eqx.tree_at(lambda r: r.state.bias, r, bias), model)
    computed, demand = rows_of_a_step(model, rows)
    assert demand.sum() == 0
    assert computed == 0
