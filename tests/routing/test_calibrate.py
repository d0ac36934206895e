"""Thresholds from data: the causal model computes the fraction of tokens that it should."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array, Float, Int

import mode
from tests import reference as ref
from tests.helpers import f64, padded_info


def small(capacity: float) -> mode.Transformer:
    """Four layers of which two are routed, with routers that already rank tokens."""
    return mode.mod_transformer(
        64, 16, depth=4, num_heads=2, capacity=capacity, key=jax.random.key(0)
    )


def text(seed: int, batch: int = 8, tokens: int = 64) -> Int[Array, "batch tokens"]:
    """Random token ids."""
    return jax.random.randint(jax.random.key(seed), (batch, tokens), 0, 64)


def computed(model: mode.Transformer, tokens: Int[Array, "batch tokens"]) -> Float[Array, ""]:
    """Slots filled per token, of each routed layer under the causal rule."""
    routing = eqx.filter_jit(mode.make_causal(model))(tokens)[1][0]
    return jnp.mean(routing.num_filled, axis=-1) / routing.num_tokens


@pytest.mark.parametrize("capacity", [0.0625, 0.125, 0.3, 0.5, 1.0])
def test_the_fraction_is_exact_on_the_text_of_the_calibration(capacity: float) -> None:
    """In every layer, the second one at the hidden states that the first threshold makes."""
    model = mode.calibrate_thresholds(small(capacity), text(1))
    assert np.allclose(computed(model, text(1)), round(512 * capacity) / 512, atol=1 / 512)


def test_stale_thresholds_are_forgotten() -> None:
    """After many updates a single one moves a threshold by a few percent; this one replaces it."""
    model = small(0.125)
    stale = mode.map_routers(
        lambda router: eqx.tree_at(
            lambda r: (r.state.threshold, r.state.updates),
            router,
            (router.state.threshold - 5, router.state.updates + 400),
        ),
        model,
    )
    assert np.allclose(computed(stale, text(1)), 1)
    assert np.allclose(computed(mode.calibrate_thresholds(stale, text(1)), text(1)), 0.125)


def test_several_batches_count_equally_and_other_text_is_close() -> None:
    """The threshold of the first layer is the mean of the oracle's quantiles of the batches."""
    model, batches = small(0.25), [text(seed) for seed in range(4)]
    calibrated = mode.calibrate_thresholds(model, *batches)
    quantiles = []
    for batch in batches:
        # The layer below the first router is dense; scores are sizes of logits.
        scores = np.abs(f64(model(batch)[1][0].logits[0]))
        valid = np.ones(scores.shape[:-1], bool)
        quantiles.append(ref.running_quantile(np.zeros(1), scores, valid, 0.25, 0.0, 0)[0])
    (router,) = mode.routers(calibrated)
    assert np.allclose(router.state.threshold[0, 0], np.mean(quantiles), atol=1e-6)
    assert router.state.updates.tolist() == [4, 4]
    assert np.allclose(computed(calibrated, text(9, batch=64)), 0.25, atol=0.03)


def test_nothing_but_thresholds_changes() -> None:
    """Parameters, biases and selectors are those of before."""
    model = small(0.125)
    calibrated = mode.calibrate_thresholds(model, text(1))
    assert jax.tree.structure(calibrated) == jax.tree.structure(model)
    parameters = [eqx.filter(m, mode.is_trainable(m)) for m in (model, calibrated)]
    assert eqx.tree_equal(*parameters)
    (router,) = mode.routers(calibrated)
    assert isinstance(router.select, mode.ExpertChoice)
    assert not jnp.any(router.state.bias)


def test_padding_and_experts() -> None:
    """A layer of experts, with padding that no quantile counts."""
    make = lambda key: mode.GELUFeedForward(8, key=key)  # noqa: E731
    block = mode.MixtureOfExperts(make, 8, 2, capacity_factor=0.5, key=jax.random.key(3))
    x, info = jax.random.normal(jax.random.key(4), (2, 32, 8)), padded_info(32, 16, tokens=32)
    block = mode.calibrate_thresholds(block, (x, info))
    _, (routing,) = mode.make_causal(block)(x, info)
    assert jnp.sum(routing.load, axis=0).tolist() == [12, 12]  # a quarter of 48 real tokens each


def test_a_batch_is_needed() -> None:
    """Without one there is nothing to calibrate on."""
    with pytest.raises(ValueError, match="`batches` must hold at least one"):
        mode.calibrate_thresholds(small(0.125))
