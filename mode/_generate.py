"""Text from a model: a batch of prompts in, tokens out, one program for all steps."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from ._cache import Cache
from ._capacity import check_count
from ._decode import Decoding, advance, prefill
from ._decoder import Transformer
from ._depth import MixtureOfDepths
from ._experts import Membership
from ._router import Router
from ._sample import Sampler
from ._state import routers


class Generation(eqx.Module):
    """What `generate` made.

    **Attributes:**

    - `tokens`: `[batch, steps]`; behind a member's stop token, that token again.
    - `lengths`: `[batch]`, new tokens of each member, its stop token included.
    - `decoding`: where the batch stands: `entered` reads from it what was computed.
    """

    tokens: Int[Array, "batch steps"]
    lengths: Int[Array, " batch"]
    decoding: Decoding


def generate(
    model: Transformer,
    prompts: Int[Array, "batch tokens"],
    lengths: Int[Array, " batch"] | None = None,
    *,
    steps: int,
    sampler: Sampler = Sampler(temperature=0),
    keys: Shaped[Array, "batch ..."] | None = None,
    stop: int | None = None,
    max_tokens: int | None = None,
) -> Generation:
    """Continue each prompt of a batch by up to `steps` tokens.

    A member's text depends on its prompt and key alone: not on its batch mates, nor on what the
    shorter prompts are padded with.

    **Arguments:**

    - `model`: a model that decides token by token, `causal(model)`; `unrolled(causal(model))`
        decodes fastest.
    - `prompts`, `lengths`: as `prefill` takes them.
    - `steps`: new tokens of each member, at least 1.
    - `sampler`: draws a token from logits; by default the likeliest.
    - `keys`: `[batch]`, one key per member, such as `jax.random.split(key, batch)`; may be left out
        at temperature 0.
    - `stop`: a token after which a member is finished; when all are, so is the program.
    - `max_tokens`: size of the caches; by default what the longest prompt and `steps` need.

    **Raises:** `ValueError` for steps below 1, prompts and steps that do not fit `max_tokens`, keys
    that are missing or not one per member, a stop token outside the vocabulary; and as `prefill`.

    >>> import jax, jax.numpy as jnp, mode
    >>> model = mode.causal(mode.mod_decoder(256, 32, depth=4, num_heads=2, key=jax.random.key(0)))
    >>> prompts = jnp.array([[1, 2, 3], [4, 5, 0]])
    >>> made = mode.generate(model, prompts, jnp.array([3, 2]), steps=4)
    >>> made.tokens.shape, made.lengths.tolist(), made.decoding.length.tolist()
    ((2, 4), [4, 4], [7, 6])
    """
    steps = check_count("steps", steps, 1)
    needed = prompts.shape[-1] + steps
    max_tokens = needed if max_tokens is None else check_count("max_tokens", max_tokens, 1)
    if needed > max_tokens:
        raise ValueError(
            f"`steps` and `prompts` must fit into max_tokens={max_tokens}, got {steps} steps after "
            f"{prompts.shape[-1]} tokens. Raise `max_tokens`, or ask for fewer steps."
        )
    vocab = model.embedding.shape[0]
    if stop is not None and not 0 <= stop < vocab:
        raise ValueError(f"`stop` must be a token id from 0 to {vocab - 1}, got {stop}.")
    if sampler.temperature > 0 and (keys is None or keys.shape[:1] != prompts.shape[:1]):
        raise ValueError(
            f"`keys` must hold one key per member, {prompts.shape[:1]}, where the temperature is "
            f"above 0, got {'None' if keys is None else keys.shape}. "
            "`jax.random.split(key, batch)` makes them."
        )
    decoding = prefill(model, prompts, lengths, max_tokens=max_tokens)
    return _continue(model, decoding, sampler, keys, stop, steps)


@eqx.filter_jit(donate="all-except-first")
def _continue(
    model: Transformer,
    decoding: Decoding,
    sampler: Sampler,
    keys: Shaped[Array, "batch ..."] | None,
    stop: int | None,
    steps: int,
) -> Generation:
    batch = decoding.length.shape[0]
    start = decoding.length

    def draw(decoding: Decoding) -> Int[Array, " batch"]:
        if keys is None:
            return jax.vmap(sampler)(decoding.logits).astype(jnp.int32)
        # By the place in the text: the same draws however the steps are split over calls.
        now = jax.vmap(jax.random.fold_in)(keys, decoding.length)
        return jax.vmap(sampler)(decoding.logits, now).astype(jnp.int32)

    def one(
        carry: tuple[Int[Array, ""], Decoding, Bool[Array, " batch"], Int[Array, "batch steps"]],
    ) -> tuple[Int[Array, ""], Decoding, Bool[Array, " batch"], Int[Array, "batch steps"]]:
        place, decoding, done, tokens = carry
        token = draw(decoding)
        if stop is not None:
            token = jnp.where(done, stop, token)
        decoding = advance(model, decoding, token, ~done)
        if stop is not None:
            done = done | (token == stop)
        return place + 1, decoding, done, tokens.at[:, place].set(token)

    tokens = jnp.full((batch, steps), 0 if stop is None else stop, jnp.int32)
    carry = (jnp.zeros((), jnp.int32), decoding, jnp.zeros(batch, bool), tokens)
    _, decoding, _, tokens = jax.lax.while_loop(
        lambda carry: (carry[0] < steps) & ~jnp.all(carry[2]), one, carry
    )
    return Generation(tokens, decoding.length - start, decoding)


class Entered(eqx.Module):
    """What one router let in while decoding, prompt included.

    **Attributes:**

    - `share`: `[*layers, batch]`, tokens that entered per token that came; for experts, the experts
        a token entered, on average.
    - `trained`: the share it was trained with.
    - `refused`: `[*layers, batch]`, tokens that asked and found the layer's slots full; `None` for
        experts.
    """

    share: Float[Array, "*layers batch"]
    trained: float = eqx.field(static=True)
    refused: Int[Array, "*layers batch"] | None


def entered(model: Transformer, decoding: Decoding) -> list[Entered]:
    """What was computed, one record per router, in the order of `routers(model)`.

    Read off the caches: they hold what entered a layer, and nothing else.
    """
    found: list[Entered] = []
    for stack, caches in zip(model.stacks, decoding.caches, strict=True):
        for layer, cache in zip(stack.layers, caches, strict=True):
            own = routers(layer)
            if isinstance(layer, MixtureOfDepths):
                came = jnp.broadcast_to(decoding.length, cache.length.shape)
                share = cache.length / jnp.maximum(came, 1)
                found.append(Entered(share, float(own.pop(0).fraction), cache.refused))
            found += _experts_entered(own, cache)
    return found


def _experts_entered(own: list[Router], cache: Cache) -> list[Entered]:
    nodes = jax.tree.leaves(cache.left, is_leaf=lambda node: isinstance(node, Membership))
    memberships = [node for node in nodes if isinstance(node, Membership)]
    records = []
    for router, node in zip(own, memberships, strict=True):
        taken = node.taken & cache.info.valid[..., None]
        share = jnp.sum(taken, axis=(-1, -2)) / jnp.maximum(cache.length, 1)
        records.append(Entered(share, float(router.fraction * router.num_experts), None))
    return records
