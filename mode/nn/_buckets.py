"""Buckets of rows: run a function on only the rows that need it, in one of a few static sizes."""

from collections.abc import Callable
from fractions import Fraction
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, PyTree

from .._capacity import token_capacity
from ..routing import first_come_first_served


def bucket_sizes(rows: int, capacity: Fraction) -> tuple[int, ...]:
    """Returns the numbers of rows that a program is compiled for, ascending.

    0, the trained fraction of the rows, and from there up by half and by a third in turn to all of
    them. The smallest that holds the rows in need runs: above the trained fraction, at most 1.5
    times what is needed.

    >>> bucket_sizes(32, Fraction(1, 8)), bucket_sizes(1, Fraction(1, 8))
    ((0, 4, 6, 8, 12, 16, 24, 32), (0, 1))
    """
    size = token_capacity(rows, capacity)
    sizes = {0, rows}
    while size < rows:
        sizes |= {size, min(rows, -(-3 * size // 2))}
        size *= 2
    return tuple(sorted(sizes))


def run_bucketed(
    function: Callable[[Int[Array, " size"] | None], PyTree],
    needed: Bool[Array, " rows"],
    sizes: tuple[int, ...],
) -> PyTree:
    """Runs `function` on the rows that need it, as if it had been called for all.

    **Arguments:**

    - `function`: maps the indices of some rows to a tree of arrays with an axis of these rows
        first. Indices behind the rows in need repeat some row; `None` means all rows, in order.
    - `needed`: `[rows]`.
    - `sizes`: ascending numbers of rows, from 0 to all, as `bucket_sizes` returns them.

    **Returns:** the tree with an axis of all rows. The values of a row that is not needed are
    finite if the inputs are, and mean nothing.
    """
    rows = needed.shape[0]
    like = jax.eval_shape(lambda: function(None))

    def run(size: int) -> PyTree:
        if size == rows:  # nothing to gather: in the worst case it costs what a dense layer costs
            return function(None)
        zeros = jax.tree.map(jnp.zeros_like, like)
        if size == 0:
            return zeros
        index = first_come_first_served(needed[:, None], size)[0]
        parts = function(jnp.minimum(index, rows - 1))
        return jax.tree.map(lambda z, part: z.at[index].set(part, mode="drop"), zeros, parts)

    smallest = jnp.searchsorted(jnp.array(sizes, jnp.int32), jnp.sum(needed, dtype=jnp.int32))
    return jax.lax.switch(smallest, [partial(run, size) for size in sizes])
