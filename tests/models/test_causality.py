"""What a model may know of later tokens: nothing under thresholds, something under top-k."""

import functools
import inspect

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mode
from tests.helpers import assert_close, padded_info
from tests.layers import DIM, TOKENS, VOCAB, experts, hidden, run, transformer_block, with_selector


pytestmark = pytest.mark.optimized


KEY = jax.random.key(3)
IDS = jax.random.randint(KEY, (2, TOKENS), 0, VOCAB)
THRESHOLDS = [mode.QuantileThreshold, mode.LogitThreshold, mode.PredictorThreshold]


@functools.cache
def trained() -> mode.Transformer:
    """A dense and a routed layer with a predictor, whose thresholds have seen some tokens."""
    model = mode.mod_transformer(VOCAB, DIM, 2, 2, capacity=0.25, predictor=True, key=KEY)
    tokens = jax.random.randint(KEY, (8, TOKENS), 0, VOCAB)
    return eqx.filter_jit(mode.update_router_state)(model, run(model, tokens)[1])


@pytest.mark.parametrize("threshold", THRESHOLDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("max_capacity", [1.0, None])
def test_thresholds_do_not_see_the_future(
    threshold: type[mode.AbstractThreshold], max_capacity: float | None
) -> None:
    """Changing later tokens changes no bit before them, dropped tokens or not."""
    model = mode.make_causal(trained(), threshold=threshold(max_capacity))
    mode.testing.assert_causal(model, IDS)
    _, (routing,) = run(model, IDS)
    assert 0 < routing.num_filled.sum() < 2 * TOKENS


def test_token_choice_does_not_see_the_future() -> None:
    """No later token evicts an earlier one, first choice or second."""
    layer = experts(KEY, select=mode.TokenChoice(2), capacity_factor=0.75)
    mode.testing.assert_causal(layer, hidden()[:2])
    _, (routing,) = run(layer, hidden()[:2])
    assert np.all(routing.num_dropped > 0)


def test_top_k_sees_the_future() -> None:
    """Of depths and of experts; so the causal loss is another number than the top-k loss."""
    with pytest.raises(AssertionError, match="sees the future"):
        mode.testing.assert_causal(trained(), IDS)
    with pytest.raises(AssertionError, match="sees the future"):
        mode.testing.assert_causal(experts(KEY), hidden()[:2])
    assert np.any(run(trained(), IDS)[0] != run(mode.make_causal(trained()), IDS)[0])


@pytest.mark.parametrize("length", [1, 2, 20])
def test_a_prefix_alone_gets_the_logits_that_it_gets_in_a_text(length: int) -> None:
    """Cut off, or with padding in place of the rest."""
    model = mode.make_causal(trained())
    whole, _ = run(model, IDS)
    assert_close(run(model, IDS[:, :length])[0], whole[:, :length], scale=5)
    padded, _ = run(model, IDS, padded_info(length, length, tokens=TOKENS))
    assert np.array_equal(padded[:, :length], whole[:, :length])


def test_one_token_is_not_the_best_of_one() -> None:
    """A sequence of one token is selected by its own margin; under top-k it always is."""
    layer = mode.MixtureOfDepths(transformer_block(KEY), DIM, 0.25, key=KEY)
    first = jnp.zeros((DIM, 1)).at[0].set(1.0)
    layer = eqx.tree_at(lambda m: m.router.scorer.weight, layer, first)
    margins = jnp.array([1.0, -1.0, 2.0, 0.0, -2.0, 3.0, -3.0, 0.5])
    x = hidden()[:, :1].at[:, 0, 0].set(margins)
    assert run(layer, x)[1][0].num_filled.tolist() == [1] * 8
    out, (routing,) = run(with_selector(mode.LogitThreshold(), layer), x)
    selected = (margins > 0).astype(int)
    assert routing.num_filled.tolist() == selected.tolist()
    changed = np.any(np.asarray(out != x), axis=(1, 2))
    assert changed.tolist() == selected.astype(bool).tolist()


def test_what_sees_the_future_says_so() -> None:
    """In the docstring of the selector, and of a layer whose default it is."""
    assert "not causal" in str(inspect.getdoc(mode.ExpertChoice))
    for layer in (mode.MixtureOfDepths, mode.MixtureOfExperts):
        assert "sees the future" in str(inspect.getdoc(layer))
