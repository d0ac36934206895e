"""What `mode-lab analyze` observes and sums up, for every arm, against slow counts."""

import dataclasses
import functools
import itertools
import math
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mode
from mode.lab import measures
from mode.lab.analysis_figures import plot_analysis
from mode.lab.arms import ARMS, Arm, arm_named
from mode.lab.data import Batch, Sequences
from mode.lab.observe import Observation, RouterObservation, name_layers, observe, router_places
from mode.lab.options import Size
from mode.lab.passage import find_passage
from mode.lab.routing_map import RoutingMap
from mode.lab.summary import summarise
from tests.helpers import assert_close
from tests.lab.helpers import LINE, documents


SIZE = Size(dim=8, depth=4, heads=1, length=32, batch=3, experts=2, noop=1, capacity=0.25)

# Two files, whose border is inside a sequence, and padding at the end.
DOCUMENTS = documents("".join(LINE.format(n) for n in range(3)), LINE.format(10) * 2 + "x")
SOURCE = Sequences(DOCUMENTS, SIZE.length)


def built(name: str) -> tuple[Arm, mode.Transformer]:
    arm = arm_named(name)
    return arm, arm.build(SIZE, key=jax.random.key(1))


@functools.cache
def observed(name: str) -> dict[str, Observation]:
    arm, model = built(name)
    models = {"top-k": model, "causal": arm.causal(model)}
    if arm.rule is None:
        models = {"as trained": model}
    return {
        name: observe(one, SOURCE, range(len(SOURCE)), batch=SIZE.batch, key=jax.random.key(2))
        for name, one in models.items()
    }


# Observations.


@eqx.filter_jit
def alone(
    model: mode.Transformer, batch: Batch
) -> tuple[jax.Array, jax.Array, tuple[mode.Routing, ...]]:
    logits, routings = model(batch.inputs, batch.info)
    return logits, jax.nn.log_softmax(logits), routings


@pytest.mark.parametrize("name", [arm.name for arm in ARMS if arm.name != "mod-random"])
def test_what_is_observed_is_what_the_model_did(name: str) -> None:
    """Sequences in batches of three, the last with padding, against one at a time."""
    arm, model = built(name)
    for selection, one in observed(name).items():
        chosen = arm.causal(model) if selection == "causal" else model
        for row in range(len(SOURCE)):
            batch = Batch.of({name: x[None] for name, x in SOURCE[row].items()})
            logits, logs, routings = jax.device_get(alone(chosen, batch))
            counted = np.asarray(batch.weights[0]) > 0
            assert np.array_equal(one.counted[row], counted)
            entropy = measures.prediction_entropy(logits[0])
            assert_close(one.entropy[row].astype(np.float32), entropy, scale=5)
            bits = [-logs[0, n, int(t)] / math.log(2) for n, t in enumerate(batch.targets[0])]
            loss = one.loss[row].astype(np.float32)
            assert_close(loss[counted], np.array(bits)[counted], scale=5)
            nested = [router.place.nested for router in one.routers]
            assert nested == [place == 1 for place in range(len(routings))]
            for router, routing in zip(one.routers, routings, strict=True):
                check_router(router, routing, row, routings[0], counted)


def check_router(
    router: RouterObservation,
    routing: mode.Routing,
    row: int,
    outer: mode.Routing,
    counted: np.ndarray,
) -> None:
    weight = np.full(router.weight[row].shape, np.nan)
    for layer, _, expert, slot in np.ndindex(routing.index.shape):
        token = routing.index[layer, 0, expert, slot]
        if token < routing.num_tokens:
            weight[layer, token, expert] = routing.weight[layer, 0, expert, slot]
    selected = router.selected[row]
    assert np.array_equal(selected, np.isfinite(weight))
    assert_close(router.weight[row][selected], weight[selected], scale=5)
    expected = np.broadcast_to(counted, (len(weight), len(counted)))
    if router.place.nested:
        slots = outer.index[:, 0, 0].tolist()
        expected = [[slot < len(counted) and counted[slot] for slot in row] for row in slots]
    assert np.array_equal(router.counted[row], expected)


def test_padding_and_last_bytes_do_not_count() -> None:
    one = observed("dense")["as trained"]
    # Every byte but the document starts is a target, and those at the border of the files are not.
    assert one.counted.sum() == len(DOCUMENTS.tokens) - len(DOCUMENTS.names)
    assert not one.counted.all()


def test_random_routing_selects_its_capacity() -> None:
    one = observed("mod-random")["as trained"]
    whole = one.counts[:, :-1]  # all but the sequence with padding
    assert (whole.sum(-1) == SIZE.capacity * SIZE.length).all()
    assert len(one.fractions) == len(one.layers) == 2


@pytest.mark.parametrize(
    ("depth", "every", "layers"),
    [(4, 2, (2, 4)), (5, 2, (2, 4)), (3, 1, (1, 2, 3)), (7, 3, (2, 5))],
)
def test_layers_are_numbered_as_in_the_model(
    depth: int, every: int, layers: tuple[int, ...]
) -> None:
    arm = dataclasses.replace(arm_named("mode-staged"), every=every)
    model = arm.build(dataclasses.replace(SIZE, depth=depth), key=jax.random.key(0))
    places = router_places(model)
    for nested in (False, True):
        of_kind = [place.layers for place in places if place.nested == nested]
        assert tuple(itertools.chain(*of_kind)) == layers
    assert places[0].name == name_layers(places[0].layers)
    assert places[1].name == f"{places[0].name}, inside the block"
    one = observe(model, SOURCE, range(2), batch=2, key=jax.random.key(0))
    assert one.layers == layers
    assert one.counts.shape == (len(layers), 2, SIZE.length)


def test_compute_is_added_up_over_layers_and_experts() -> None:
    one = observed("mode-integrated")["causal"]
    (router,) = one.routers
    slow = np.zeros(one.counts.shape, int)
    for row, layer, token, expert in zip(*np.nonzero(router.selected), strict=True):
        assert expert < SIZE.experts
        slow[layer, row, token] += 1
    assert np.array_equal(one.counts, slow)
    assert len(one.fractions) == 2 * SIZE.experts
    assert router.noop is not None
    assert ((router.noop > 0) & (router.noop < 1)).all()


def test_a_broken_model_is_not_observed() -> None:
    _, model = built("dense")
    broken = eqx.tree_at(lambda m: m.embedding, model, replace_fn=lambda x: x * jnp.nan)
    with pytest.raises(ValueError, match="predictions are finite"):
        observe(broken, SOURCE, [0], batch=1, key=jax.random.key(0))


# Summaries.


def slow_independent(fractions: np.ndarray) -> np.ndarray:
    """How likely each number of choices is, added up over all that may happen."""
    chances = np.zeros(len(fractions) + 1)
    for selected in itertools.product([0, 1], repeat=len(fractions)):
        parts = np.where(selected, fractions, 1 - fractions)
        chances[sum(selected)] += math.prod(parts)
    return chances


@pytest.mark.parametrize("name", ["mod", "mode-staged", "mode-integrated"])
def test_a_summary_is_a_count(name: str) -> None:
    observations = observed(name)
    tokens = np.stack([SOURCE[row]["tokens"][:-1] for row in range(len(SOURCE))])
    classes = np.stack([measures.byte_classes(row.astype(np.int64)) for row in tokens])
    summary = summarise(observations, classes, seed=0, draws=20)
    assert list(summary.totals["selection"]) == list(observations)
    for selection, one in observations.items():
        compute, where = one.counts.sum(0), list(zip(*np.nonzero(one.counted), strict=True))
        spent = sum(int(compute[at]) for at in where)
        total = summary.of("totals")[selection].iloc[0]
        assert total["tokens"] == len(where)
        assert_close(total["compute"], spent / len(where))
        assert_close(total["bits_per_byte"], sum(one.loss[at] for at in where) / len(where))
        rows = summary.of("classes")[selection].to_dict("records")
        assert [row["class"] for row in rows] == list(measures.CLASSES)
        for number, row in enumerate(rows):
            own = [at for at in where if classes[at] == number]
            assert row["tokens"] == len(own)
            assert_close(row["token_fraction"], len(own) / len(where))
            if own and spent:
                fraction = sum(int(compute[at]) for at in own) / spent
                assert_close(row["compute_fraction"], fraction)
                assert_close(row["ratio"], fraction / (len(own) / len(where)))
                assert_close(row["entropy"], sum(one.entropy[at] for at in own) / len(own))
        depths = summary.of("depths")[selection]
        for row in depths.to_dict("records"):
            own = [at for at in where if compute[at] == row["compute"]]
            assert row["count"] == len(own)
            if own:
                assert_close(row["mean"], sum(one.entropy[at] for at in own) / len(own))
        assert_close(depths["independent"].to_numpy(), slow_independent(one.fractions))
        assert_close((depths["independent"] * depths["compute"]).sum(), total["compute"])
        check_routers(summary.of("routers")[selection].to_dict("records"), one)
        loads = summary.of("loads")[selection]
        bins = summary.of("histograms")[selection]
        for number, router in enumerate(one.routers):
            for place, layer in enumerate(router.place.layers):
                selected = router.selected[:, place][router.counted[:, place]]
                here = loads[(loads["router"] == number) & (loads["layer"] == layer)]
                if len(selected):
                    assert_close(here["fraction"].to_numpy(), selected.mean(0))
                here = bins[(bins["router"] == number) & (bins["layer"] == layer)]
                assert here["selected"].sum() == selected.sum()
                assert here["skipped"].sum() == (~selected).sum()


def check_routers(rows: list[dict], one: Observation) -> None:
    pairs = [
        (router, place, layer)
        for router in one.routers
        for place, layer in enumerate(router.place.layers)
    ]
    for row, (router, place, layer) in zip(rows, pairs, strict=True):
        counted = router.counted[:, place]
        weight = router.weight[:, place][counted].astype(np.float64)
        selected = router.selected[:, place][counted]
        assert (row["layer"], row["nested"]) == (layer, router.place.nested)
        assert row["selected_count"] == selected.sum()
        assert row["skipped_count"] == (~selected).sum()
        if selected.any():
            assert_close(row["selected_mean"], weight[selected].mean())
            assert_close(row["selected_50%"], np.median(weight[selected]))
            assert_close(row["above_half"], (weight > 0.5).mean())


def with_threshold(name: str, threshold: float) -> dict[str, Observation]:
    """A causal rule that selects every token or none."""
    arm, model = built(name)

    def moved(router: mode.Router) -> mode.Router:
        there = router.state.threshold
        return eqx.tree_at(lambda r: r.state.threshold, router, jnp.full_like(there, threshold))

    causal = arm.causal(mode.map_routers(moved, model))
    return {
        name: observe(one, SOURCE, range(len(SOURCE)), batch=3, key=jax.random.key(0))
        for name, one in (("top-k", model), ("causal", causal))
    }


@pytest.mark.parametrize(("name", "threshold"), [("mode-staged", math.inf), ("mod", -math.inf)])
def test_a_rule_that_selects_all_or_none_has_no_correlation(
    name: str, threshold: float, tmp_path: Path
) -> None:
    observations = with_threshold(name, threshold)
    classes = np.ones(observations["causal"].counted.shape, int)
    summary = summarise(observations, classes, seed=0, draws=20)
    causal = summary.of("totals")["causal"].iloc[0]
    assert causal["compute"] == (0 if threshold > 0 else 2)
    assert math.isnan(causal["pearson"])
    assert math.isnan(causal["spearman_low"])
    ratio = summary.of("classes")["causal"]["ratio"].iloc[1]
    assert math.isnan(ratio) == (threshold > 0)
    passage = find_passage(SOURCE)
    rows = list(passage.rows)
    counts = {
        name: tuple(map(tuple, passage.cut(one.counts[:, rows]).tolist()))
        for name, one in observations.items()
    }
    tokens = tuple(passage.tokens.tolist())
    routing_map = RoutingMap("0", tokens, (5,), summary.layers, counts)
    for picture in plot_analysis(tmp_path, summary, routing_map, "A model."):
        assert (tmp_path / f"{picture}.png").read_bytes().startswith(b"\x89PNG")
        assert (tmp_path / f"{picture}.pdf").read_bytes().startswith(b"%PDF")
