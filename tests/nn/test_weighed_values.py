"""The weight that reaches the block: in `TokenInfo`, at the values of attention, in no cache."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array

import mode
from tests.helpers import assert_close, hidden_states, packed_info


DIM, TOKENS = 8, 12


class Shows(mode.AbstractBlock):
    """Returns the weight that it was given in every feature, and 7 where there is none."""

    def extend(self, x, info, cache, *, key=None):
        weight = 7 * jnp.ones(x.shape[:-1]) if info.weight is None else info.weight
        return jnp.broadcast_to(weight[..., None], x.shape), (), ()


def make_layer(block: mode.AbstractBlock, **options: object) -> mode.MixtureOfDepths:
    return mode.MixtureOfDepths(block, DIM, 0.5, key=jax.random.key(1), **options)  # pyright: ignore


@pytest.mark.parametrize("gate", [mode.AbsoluteGate(), mode.SigmoidGate(), mode.IdentityGate()])
def test_a_block_sees_the_weight_of_each_of_its_tokens(gate: mode.AbstractGate) -> None:
    """The update is the weight, and is multiplied by it once more."""
    layer = make_layer(Shows(), gate=gate)
    x = hidden_states(0, 3, TOKENS, DIM)
    hidden, (routing,) = layer(x)
    token = np.asarray(routing.index[:, 0])
    got = np.take_along_axis(np.asarray(hidden - x), token[..., None], axis=1)
    squares = np.asarray(routing.weight[:, 0]) ** 2
    assert_close(got, np.repeat(squares[..., None], DIM, axis=-1))


def test_it_is_none_where_it_is_not_wanted_and_in_dense_layers() -> None:
    """A block that does not care sees what it saw."""
    x = hidden_states(1, 3, TOKENS, DIM)
    hidden, (routing,) = make_layer(Shows(), weigh_values=False)(x)
    token = np.asarray(routing.index[:, 0])
    got = np.take_along_axis(np.asarray(hidden - x), token[..., None], axis=1)[..., 0]
    assert_close(got, 7 * np.asarray(routing.weight[:, 0]))
    assert_close(mode.Residual(Shows())(x)[0], x + 7)


def test_of_nested_layers_the_innermost_counts() -> None:
    """The inner layer gives its own weights to its block."""

    class Inner(mode.AbstractBlock):
        layer: mode.MixtureOfDepths

        def extend(self, x, info, cache, *, key=None):
            hidden, routings, entries = self.layer.extend(x, info, cache, key=key)
            return hidden - x, routings, entries

    inner = make_layer(Shows())
    x = hidden_states(2, 2, TOKENS, DIM)
    _, (outer, nested) = make_layer(Inner(inner))(x)
    slots = mode.dispatch(x, outer)[0]
    expected, (alone,) = inner(slots)
    assert_close(nested.weight, alone.weight)
    update = np.asarray(outer.weight[:, 0, :, None] * (expected - slots))
    got = np.asarray(mode.dispatch(make_layer(Inner(inner))(x)[0] - x, outer)[0])
    assert_close(got, update)


def test_attention_multiplies_values_and_nothing_else() -> None:
    """Scores do not change: doubled weights double what attention returns."""
    block = mode.Attention(DIM, 2, key=jax.random.key(2))
    x, info = hidden_states(3, 2, TOKENS, DIM), packed_info((5, 4, 2), (1, 11), tokens=TOKENS)
    plain = block(x, info)[0]
    ones, twos = (jnp.full((2, TOKENS), w, jnp.float32) for w in (1.0, 2.0))
    assert_close(block(x, info.with_weight(ones))[0], plain)
    assert_close(block(x, info.with_weight(twos))[0], 2 * plain)
    only_first = block(x, info.with_weight(ones.at[:, 1:].set(0)))[0]
    assert not np.allclose(only_first, plain)


def test_any_attention_function_gets_weighed_values() -> None:
    """A plain function too, which sees no weight in its `info`."""
    seen: list[object] = []

    def attend(q: Array, k: Array, v: Array, info: mode.TokenInfo) -> Array:
        seen.append(info.weight)
        return mode.CausalAttention()(q, k, v, info)

    x, weight = hidden_states(4, 2, TOKENS, DIM), jnp.abs(hidden_states(5, 2, TOKENS))
    info = mode.TokenInfo.plain((2, TOKENS)).with_weight(weight)
    own, usual = (
        mode.Attention(DIM, 2, attend=a, key=jax.random.key(2))
        for a in (attend, mode.CausalAttention())
    )
    assert_close(own(x, info)[0], usual(x, info)[0])
    assert seen == [None]


def test_a_router_learns_from_tokens_that_are_only_read() -> None:
    """The loss is at the last token alone, and its own update counts for nothing: the gradient that
    reaches the weights of the others goes through their values, and is 0 without."""
    block = mode.Attention(DIM, 2, key=jax.random.key(3))
    x = hidden_states(6, TOKENS, DIM)

    def gradient(weigh_values: bool) -> Array:
        layer = mode.MixtureOfDepths(
            block, DIM, 1.0, weigh_values=weigh_values, key=jax.random.key(4)
        )

        def loss(logits: Array) -> Array:
            def scorer(x: Array) -> Array:
                return logits[..., None]

            return jnp.sum(eqx.tree_at(lambda m: m.router.scorer, layer, scorer)(x)[0][-1] ** 2)

        return jax.grad(loss)(jnp.linspace(0.5, 1.5, TOKENS))

    assert np.all(gradient(True) != 0)
    assert np.all(gradient(False)[:-1] == 0)


def test_weights_in_bfloat16() -> None:
    """Values keep the dtype of the activations."""
    layer = make_layer(mode.TransformerBlock(DIM, 2, key=jax.random.key(5)))
    hidden, (routing,) = layer(hidden_states(7, 2, TOKENS, DIM).astype(jnp.bfloat16))
    assert hidden.dtype == jnp.bfloat16
    assert routing.weight.dtype == jnp.float32
