"""Router state: moved by `update_state` as the oracle has it, and by nothing else; causal rules."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mode
from mode import _state
from tests import reference as ref
from tests.helpers import (
    assert_close,
    f64,
    hidden_states,
    oracle_block,
    oracle_router,
    packed_info,
    padded_info,
    rng,
    run,
)


DIM = 8


def make_depths(capacity=0.25, **options):
    """A Mixture-of-Depths layer around a feed-forward."""
    block = mode.PositionWise(mode.GELU(DIM, 8, key=jax.random.key(0)))
    return mode.MixtureOfDepths(block, DIM, capacity, key=jax.random.key(1), **options)


def make_experts(select, **options):
    """Three experts and a no-op."""
    return mode.MixtureOfExperts(
        lambda key: mode.GELU(DIM, 8, key=key),
        DIM,
        3,
        num_noop=1,
        select=select,
        key=jax.random.key(2),
        **options,
    )


LAYERS = {
    "depths raw": (make_depths(), "raw"),
    "depths sigmoid": (make_depths(0.5, gate=mode.Sigmoid()), "sigmoid"),
    "depths full": (make_depths(1.0), "raw"),
    "expert choice": (make_experts(mode.ExpertChoice()), "softmax"),
    "token choice": (make_experts(mode.TokenChoice(2), capacity_factor=1.5), "softmax"),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("rates", [{}, {"quantile_rate": 0.3, "bias_rate": 0.1}])
def test_several_updates_follow_the_oracle(name, rates):
    """Threshold and bias after every one of five steps; a step of padding alone moves nothing."""
    model, gate = LAYERS[name]
    fraction = model.router.fraction
    experts, choices = model.router.num_experts, model.router.state.bias.shape[0]
    threshold, bias, updates = np.zeros(experts), np.zeros(choices), 0

    @eqx.filter_jit
    def step(model, x, info):
        _, routings = model(x, info)
        return mode.update_state(model, routings, **rates), routings[0]

    for number in range(5):
        lengths = (0, 0) if number == 2 else (12, 9 - number)
        info = padded_info(*lengths, tokens=12)
        x = hidden_states(number, 2, 12, DIM)
        model, routing = step(model, x, info)
        logits, valid = f64(routing.logits), np.asarray(info.valid)
        scores = ref.over_groups(lambda z, b=bias: ref.selection_scores(z, gate, b), 1, logits)
        threshold = ref.running_quantile(
            threshold,
            scores[..., :experts],
            valid,
            fraction,
            rates.get("quantile_rate", 0.03),
            updates,
        )
        if name == "token choice":
            rate = rates.get("bias_rate", 0.001)
            bias = ref.balancing_bias(bias, np.asarray(routing.load), rate)
        updates += valid.any()
        state = model.router.state
        assert_close(state.threshold, threshold)
        assert_close(state.bias, bias)
        assert state.updates == updates
    assert name != "token choice" or np.abs(bias).max() > 0


def test_the_first_quantile_takes_exactly_the_tokens_that_top_k_took():
    """One update sets the threshold between the k-th and the next score of the batch."""
    layer = make_depths()
    x = hidden_states(10, 16, DIM)
    _, routings = run(layer, x)
    moved = mode.causal(mode.update_state(layer, routings))
    _, (routing,) = run(moved, x)
    np.testing.assert_array_equal(routing.selected, routings[0].selected)
    assert int(routing.num_filled) == 4


@pytest.mark.parametrize("count", [1, 2, 7, 24, 40])
def test_the_nth_largest_is_that_of_a_sort(count):
    """Bit for bit, of large and tiny numbers, ties, both zeros and infinities."""
    values = rng(count).normal(size=(40, 6)) * 10.0 ** np.array([-36, -8, 0, 0, 9, 38])
    values = np.clip(values, -3e38, 3e38).astype(np.float32)
    values[:, 2] = np.round(values[:, 2])
    values[::3, 3] = -0.0
    values[::5, 4] = -np.inf
    values[::4, 5] = np.inf
    found = run(_state._largest, jnp.asarray(values), jnp.asarray(count))
    np.testing.assert_array_equal(found[0], -np.sort(-values, axis=0)[count - 1])
    values[7, 1] = np.nan
    assert np.isnan(run(_state._largest, jnp.asarray(values), jnp.asarray(count))[0, 1])


def test_the_bias_evens_out_the_loads_of_token_choice():
    """From a router that sends nearly all tokens to one expert to one that uses all choices."""
    layer = make_experts(mode.TokenChoice(1))
    skewed = jnp.zeros((DIM, 4)).at[0].set(jnp.asarray([2.0, 0.0, 0.0, 0.0]))
    spread = layer.router.scorer.weight / layer.router.scorer.weight.std() * DIM**-0.5
    layer = eqx.tree_at(lambda m: m.router.scorer.weight, layer, spread + skewed)
    x = hidden_states(11, 4, 32, DIM).at[..., 0].set(1.0)

    @eqx.filter_jit
    def step(layer):
        _, routings = layer(x)
        return mode.update_state(layer, routings, bias_rate=0.05), routings[0]

    _, before = step(layer)
    for _ in range(60):
        layer, after = step(layer)
    shares = [np.asarray(r.load.sum(0)) / 128 for r in (before, after)]
    assert shares[0].max() > 0.6
    assert shares[1].max() < 0.35
    assert not np.array_equal(layer.router.state.bias, np.zeros(4))


@eqx.filter_jit
def make_decoder(**options):
    """Four layers, every other one routed: one scan of two periods."""
    options = {"depth": 4, "num_heads": 2, "capacity": 0.5, **options}
    return mode.mod_decoder(17, DIM, key=jax.random.key(3), **options)


def draw_tokens(seed, *shape):
    return jnp.asarray(rng(seed).integers(0, 17, shape), jnp.int32)


def test_every_layer_of_a_scan_has_a_state_of_its_own():
    """Thresholds of a scanned decoder follow the oracle layer by layer over three steps."""
    model = make_decoder()
    expected = np.zeros((2, 1))

    @eqx.filter_jit
    def step(model, tokens, info):
        _, routings = model(tokens, info)
        return mode.update_state(model, routings), routings

    for number in range(3):
        info = packed_info((6, 4), (7,), tokens=10)
        model, (routing,) = step(model, draw_tokens(number, 2, 10), info)
        assert routing.logits.shape == (2, 2, 10, 1)
        for place in range(2):
            expected[place] = ref.running_quantile(
                expected[place],
                f64(routing.logits[place]),
                np.asarray(info.valid),
                0.5,
                0.03,
                number,
            )
        (router,) = mode.routers(model)
        assert_close(router.state.threshold, expected)
        assert router.state.updates.tolist() == [number + 1] * 2
    assert expected[0, 0] != expected[1, 0]


def test_no_optimizer_moves_router_state():
    """AdamW with weight decay changes every parameter and leaves state, bit for bit, alone."""
    model = make_decoder(predictor=True)
    state = jax.tree.map(
        lambda leaf: leaf + jnp.asarray(3, leaf.dtype), mode.routers(model)[0].state
    )
    model = mode.map_routers(lambda router: eqx.tree_at(lambda r: r.state, router, state), model)
    optimizer = optax.adamw(1e-2, weight_decay=0.1)
    parameters, rest = eqx.partition(model, mode.trainable(model))
    tokens = draw_tokens(5, 2, 10)

    @jax.jit
    def step(parameters, opt_state):
        def loss(parameters):
            logits, (routing,) = eqx.combine(parameters, rest)(tokens[:, :-1])
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
            return jnp.mean(losses) + mode.predictor_bce(routing)

        gradient = jax.grad(loss)(parameters)
        with jax.numpy_dtype_promotion("standard"):  # optax counts steps in integers
            updates, opt_state = optimizer.update(gradient, opt_state, parameters)
        return eqx.apply_updates(parameters, updates), opt_state

    moved, opt_state = parameters, optimizer.init(parameters)
    for _ in range(2):
        moved, opt_state = step(moved, opt_state)
    after = mode.routers(eqx.combine(moved, rest))[0].state
    for one, other in zip(jax.tree.leaves(state), jax.tree.leaves(after), strict=True):
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()
    for one, other in zip(jax.tree.leaves(parameters), jax.tree.leaves(moved), strict=True):
        assert not np.array_equal(one, other)


def test_update_state_moves_nothing_but_state():
    """All other leaves are the very arrays that were passed in."""
    model = make_decoder(predictor=True)
    _, routings = run(model, draw_tokens(6, 2, 10))
    moved = mode.update_state(model, routings)
    old, new = (eqx.filter(m, mode.trainable(m)) for m in (model, moved))
    pairs = zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True)
    assert all(one is other for one, other in pairs)
    assert jax.tree.structure(model) == jax.tree.structure(moved)


RULES = {"predictor": mode.ByPredictor(), "logit": mode.ByLogit(), "quantile": mode.ByQuantile()}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("limit", [1.0, 0.25, None])
def test_causal_model_against_the_oracle(rule, limit):
    """Under each rule the tokens above the threshold take part, up to the limit."""
    keys = jax.random.split(jax.random.key(4), 3)
    block = mode.TransformerBlock(DIM, 2, key=keys[0])
    predictor = mode.Predictor(DIM, key=keys[1])
    layer = mode.MixtureOfDepths(block, DIM, 0.5, predictor=predictor, key=keys[2])
    layer = eqx.tree_at(lambda m: m.router.state.threshold, layer, jnp.asarray([-0.4]))
    model = mode.causal(layer, by=RULES[rule], limit=limit)
    info = packed_info((5, 4, 3), (8, 2), tokens=12)
    x = hidden_states(7, 2, 12, DIM)
    hidden, (routing,) = run(model, x, info)
    slots = {1.0: 12, 0.25: 3, None: 6}[limit]
    assert routing.index.shape == (2, 1, slots)

    def depths(x, valid, positions, segments):
        inner = x @ f64(predictor.up.weight)
        guess = (inner * ref.sigmoid(inner)) @ f64(predictor.down.weight)
        shift = {"predictor": guess, "logit": None, "quantile": 0.4}[rule]

        def margin(scores):
            return shift if rule == "predictor" else scores + (shift or 0)

        return ref.mixture_of_depths(
            x,
            oracle_router(layer.router)[0],
            oracle_block(block),
            0.5,
            "raw",
            valid,
            positions,
            segments,
            select=lambda scores, valid: ref.threshold(margin(scores), valid, slots),
        )

    given = map(np.asarray, (info.valid, info.positions, info.segment_ids))
    expected, assignment = ref.over_groups(depths, 1, f64(x), *given)
    np.testing.assert_array_equal(routing.index, assignment.index)
    np.testing.assert_array_equal(routing.load, assignment.load)
    assert_close(hidden, expected)
    dropped = assignment.load.sum() - (assignment.index < 12).sum()
    assert int(routing.num_dropped.sum()) == dropped
    assert (limit == 1.0) <= (dropped == 0)
    asked = mode.causal_membership(layer, (routing,), by=RULES[rule])[0]
    assert int(asked.sum()) == assignment.load.sum()


def test_causal_quantile_of_experts_compares_biased_log_probabilities():
    """What `ExpertChoice` compared, against a threshold per expert."""
    layer = make_experts(mode.ExpertChoice(), capacity_factor=1.5)
    thresholds, bias = np.array([-1.2, -1.0, -1.6]), np.array([0.2, 0.0, -0.1, 0.3])
    layer = eqx.tree_at(
        lambda m: (m.router.state.threshold, m.router.state.bias),
        layer,
        (jnp.asarray(thresholds, jnp.float32), jnp.asarray(bias, jnp.float32)),
    )
    x = hidden_states(8, 2, 12, DIM)
    _, (routing,) = run(mode.causal(layer), x)
    for group in range(2):
        logits = ref.router_logits(f64(x[group]), oracle_router(layer.router))
        scores = ref.selection_scores(logits, "softmax", bias)[:, :3] - thresholds
        expected = ref.threshold(scores, np.ones(12, bool), 12)
        np.testing.assert_array_equal(routing.index[group], expected.index)
        assert routing.load[group].tolist() == [*expected.load, 0]
        assert_close(routing.weight[group], ref.combine_weights(logits, expected.index, "softmax"))


def test_causal_replaces_what_looks_ahead_and_nothing_else():
    """The predictor decides where there is one, the quantile elsewhere; causal rules stay."""

    def select(layer):
        return mode.causal(layer).router.select

    assert eqx.tree_equal(select(make_depths()), mode.Threshold(mode.ByQuantile()))
    watched = make_depths(predictor=mode.Predictor(DIM, key=jax.random.key(5)))
    assert eqx.tree_equal(select(watched), mode.Threshold(mode.ByPredictor()))
    for rule in (mode.Strided(), mode.RandomChoice()):
        assert eqx.tree_equal(select(make_depths(select=rule)), rule)
    assert eqx.tree_equal(select(make_experts(mode.TokenChoice(2))), mode.TokenChoice(2))
    again = mode.causal(mode.causal(make_depths()), by=mode.ByLogit(), limit=None)
    assert eqx.tree_equal(again.router.select, mode.Threshold(mode.ByLogit(), None))
