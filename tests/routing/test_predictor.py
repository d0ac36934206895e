"""A predictor beside a router: it decides nothing in training and changes no number."""

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

import mode
from tests.helpers import hidden_states, run
from tests.routing.draws import DIM, make_router


def test_a_predictor_changes_no_bit_of_the_rest() -> None:
    """Hidden states and gradients of everything else are those of the router without it."""
    watched = make_router(19)
    alone = eqx.tree_at(lambda r: r.predictor, watched, None)
    x = hidden_states(20, 2, 16, DIM)

    def objective(router: mode.Router) -> tuple[Array, Array]:
        routing = router(x, mode.TokenInfo.plain((2, 16)))
        hidden = mode.combine(jnp.sin(mode.dispatch(x, routing)), routing, onto=x)
        extra = 0.0 if routing.predictor is None else mode.predictor_bce(routing)
        return jnp.sum(jnp.sin(hidden)) + extra, hidden

    results = []
    for router in (watched, alone):
        gradient, hidden = run(eqx.filter_grad(objective, has_aux=True), router)
        results.append((np.asarray(gradient.scorer.weight), np.asarray(hidden)))
    for first, second in zip(*results, strict=True):
        assert first.tobytes() == second.tobytes()
