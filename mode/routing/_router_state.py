"""What a router remembers between training steps."""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class RouterState(eqx.Module):
    """The numbers that a router remembers between steps. Only `update_router_state` changes them.

    No gradient reaches them, and `is_trainable` keeps them from the optimizer.

    **Attributes:**

    - `bias`: `[choices]`, added to the logits when tokens are selected, never to the weights.
    - `threshold`: `[experts]`, a running estimate of the score that separates the best tokens, a
        fraction `capacity` of all, from the rest.
    - `updates`: `[]`, the number of updates so far.

    Layers that are scanned over share one state with a leading axis of layers.
    """

    bias: Float[Array, "*layers choices"]
    threshold: Float[Array, "*layers experts"]
    updates: Int[Array, "*layers"]

    @staticmethod
    def initial(num_experts: int, num_choices: int) -> "RouterState":
        """Returns the state before the first update: all zeros."""
        return RouterState(
            jnp.zeros(num_choices, jnp.float32),
            jnp.zeros(num_experts, jnp.float32),
            jnp.zeros((), jnp.int32),
        )

    @property
    def layers(self) -> tuple[int, ...]:
        """The leading axes of layers that are scanned over; `()` for a layer by itself."""
        return self.bias.shape[:-1]
