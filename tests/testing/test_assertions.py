"""Each assertion of `mode.testing` passes on what is right, with padding and packing too."""

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest

import mode
from mode import testing
from tests.helpers import padded_info
from tests.layers import DIM, TOKENS, VOCAB, depth, stack

from .models import ASSERTIONS, GOOD, HIDDEN, IDS, INFOS, KEY, PACKED, Around, deformed


# Where an assertion says of itself that it does not hold.
NOT_FOR = {
    ("residual_identity", "stack"),
    ("exact_capacity", "causal"),
    ("causal", "mod"),
    ("causal", "moe"),
    ("causal", "stack"),
}


@pytest.mark.parametrize("info", INFOS)
@pytest.mark.parametrize(
    ("assertion", "name"),
    [(one, name) for one in ASSERTIONS for name in GOOD if (one, name) not in NOT_FOR],
)
def test_passes_on_what_is_right(assertion: str, name: str, info: str) -> None:
    ASSERTIONS[assertion](GOOD[name](), HIDDEN, INFOS[info])


@pytest.mark.parametrize("info", INFOS)
@pytest.mark.parametrize(("assertion", "name"), sorted(NOT_FOR))
def test_fails_where_it_says_so(assertion: str, name: str, info: str) -> None:
    with pytest.raises(AssertionError):
        ASSERTIONS[assertion](GOOD[name](), HIDDEN, INFOS[info])


def test_what_padding_alone_shows() -> None:
    """A leak is seen in sequences that end early; the output of padding may be anything."""
    leaky = Around(mode.make_causal(depth(KEY)), before=lambda x: x + jnp.roll(x, -1, -2))
    with pytest.raises(AssertionError, match="on changed the output at 1"):
        testing.assert_causal(leaky, HIDDEN, padded_info(8, 6, tokens=TOKENS))
    late = Around(
        mode.make_causal(depth(KEY)),
        after=lambda x, out, routings: (out.at[..., -1, :].set(jnp.nan), routings),
    )
    testing.assert_causal(late, HIDDEN, PACKED)  # nobody reads the output of padding
    with pytest.raises(AssertionError, match="has NaN where there is no padding"):
        testing.assert_causal(late, HIDDEN)


def test_a_short_sequence_is_selected_whole() -> None:
    """With fewer real tokens than slots, and not one less."""
    info = padded_info(3, 32, tokens=TOKENS)
    testing.assert_exact_capacity(depth(KEY), HIDDEN, info)
    one_less = deformed(lambda i: i.at[..., 2].set(TOKENS).sort(axis=-1))
    with pytest.raises(AssertionError, match="2 slots are empty that a token could fill"):
        testing.assert_exact_capacity(one_less, HIDDEN, info)


def test_one_bad_layer_of_a_scan_is_seen() -> None:
    """A gradient that reaches all layers of a stack but one."""
    good = stack(KEY, repeats=3)
    bad = eqx.tree_at(
        lambda m: m.layers[1].block.outer.weight, good, replace_fn=lambda w: w.at[1].set(0)
    )
    with pytest.raises(AssertionError, match="no gradient reaches the scorer of router 0"):
        testing.assert_router_gradients(bad, HIDDEN)


@pytest.mark.parametrize("info", INFOS)
def test_models_of_token_ids(info: str) -> None:
    """Every assertion but that of the residual takes them."""
    model = mode.mod_transformer(VOCAB, DIM, 2, 2, key=KEY)
    causal = mode.make_causal(model)
    for name, assertion in ASSERTIONS.items():
        if name != "residual_identity":
            assertion(causal if name == "causal" else model, IDS, INFOS[info])
    for name in ("causal", "exact_capacity"):
        with pytest.raises(AssertionError):
            ASSERTIONS[name](model if name == "causal" else causal, IDS, INFOS[info])


def test_shapes_stand_for_arrays() -> None:
    """Of inputs, padding and the model: nothing is allocated."""
    model = eqx.filter_eval_shape(lambda: mode.mod_transformer(VOCAB, DIM, 2, 2, key=KEY))
    shape = jax.ShapeDtypeStruct((1024, 2**16), jnp.int32)
    info = eqx.filter_eval_shape(mode.TokenInfo.plain, shape.shape)
    testing.assert_static_shapes(model, shape)
    testing.assert_static_shapes(model, shape, info)


def test_a_recorded_routing_keeps_its_slots() -> None:
    layer = depth(KEY)
    _, (routing,) = layer(HIDDEN)
    replayed = eqx.tree_at(lambda m: m.router.select, layer, mode.Replay(routing))
    testing.assert_static_shapes(replayed, HIDDEN)


def test_the_users_key_reaches_the_model() -> None:
    layer = depth(KEY, select=mode.RandomChoice())
    testing.assert_exact_capacity(layer, HIDDEN, key=jax.random.key(3))
    testing.assert_residual_identity(layer, HIDDEN, PACKED, key=jax.random.key(3))
