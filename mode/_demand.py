"""Work for those who want it: a static number of slots near the number of members that asked."""

from collections.abc import Callable
from fractions import Fraction

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, PyTree

from ._capacity import token_capacity
from ._select import first_come


def slot_counts(members: int, fraction: Fraction) -> tuple[int, ...]:
    """The numbers of slots a program is compiled for: none, the trained share of the members, and
    from there up by half and by a third in turn (4, 6, 8, 12, 16, ...) to all of them.

    The smallest that holds the demand runs, so what is computed follows the demand within a factor
    of 1.5 above the share, and never exceeds all.

    >>> slot_counts(32, Fraction(1, 8)), slot_counts(1, Fraction(1, 8))
    ((0, 4, 6, 8, 12, 16, 24, 32), (0, 1))
    """
    share = token_capacity(members, fraction)
    counts = {0, members}
    while share < members:
        counts |= {share, min(members, -(-3 * share // 2))}
        share *= 2
    return tuple(sorted(counts))


def on_demand(
    function: Callable[[Int[Array, " slots"] | None], PyTree],
    asked: Bool[Array, " members"],
    counts: tuple[int, ...],
) -> PyTree:
    """`function(index)` for the members that asked, as if it had been called for all.

    **Arguments:**

    - `function`: from the members in its slots, in order, to a tree of arrays with an axis of slots
        first. An empty slot repeats some member; `None` stands for all members.
    - `asked`: `[members]`.
    - `counts`: ascending numbers of slots, from 0 to all members.

    **Returns:** the tree with an axis of all members; what stands there for a member that did not
    ask is finite if its inputs are, and means nothing.
    """
    members = asked.shape[0]
    like = jax.eval_shape(lambda: function(None))

    def none() -> PyTree:
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), like)

    def some(slots: int) -> PyTree:
        index = first_come(asked[:, None], slots)[0]
        found = function(jnp.minimum(index, members - 1))
        return jax.tree.map(
            lambda whole, part: whole.at[index].set(part, mode="drop"), none(), found
        )

    def branch(slots: int) -> Callable[[], PyTree]:
        if slots == members:  # nothing to gather: at worst it costs what the dense layer costs
            return lambda: function(None)
        return (lambda: some(slots)) if slots else none

    demand = jnp.sum(asked, dtype=jnp.int32)
    smallest = jnp.searchsorted(jnp.array(counts, jnp.int32), demand)
    return jax.lax.switch(smallest, [branch(slots) for slots in counts])
