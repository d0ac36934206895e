"""What `mode-lab analyze` observes and sums up, for every arm, against slow counts."""

import dataclasses
import functools
import math
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mode
from mode.lab import measures
from mode.lab.analysis_plots import plot_analysis
from mode.lab.arms import ARMS, Arm, Size, arms_named
from mode.lab.data import Batch, Sequences
from mode.lab.evaluate import causal_model
from mode.lab.observe import Observed, Router, observe, places_of
from mode.lab.passage import find_passage
from mode.lab.summary import summarise

from .helpers import assert_close
from .lab import LINE, documents


SIZE = Size(dim=8, depth=4, heads=1, length=32, batch=3, experts=2, noop=1, capacity=0.25)

# Two files, whose border is inside a sequence, and padding at the end.
DOCUMENTS = documents("".join(LINE.format(n) for n in range(3)), LINE.format(10) * 2 + "x")
SOURCE = Sequences(DOCUMENTS, SIZE.length)


def built(name: str, **changes: object) -> tuple[Arm, mode.Transformer]:
    (arm,) = arms_named([name])
    return arm, arm.build(dataclasses.replace(SIZE, **changes), key=jax.random.key(1))


@functools.cache
def observed(name: str) -> dict[str, Observed]:
    arm, model = built(name)
    models = {"top-k": model, "causal": causal_model(arm, model)}
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
        chosen = causal_model(arm, model) if selection == "causal" else model
        for place in range(len(SOURCE)):
            # One sequence, without a batch around it.
            batch = Batch.of({name: x[None] for name, x in SOURCE[place].items()})
            logits, logs, routings = jax.device_get(alone(chosen, batch))
            counted = np.asarray(batch.weights[0]) > 0
            assert np.array_equal(one.counted[place], counted)
            entropy = measures.prediction_entropy(logits[0])
            assert_close(one.entropy[place].astype(np.float32), entropy, scale=5)
            bits = [-logs[0, n, int(t)] / math.log(2) for n, t in enumerate(batch.targets[0])]
            loss = one.loss[place].astype(np.float32)
            assert_close(loss[counted], np.array(bits)[counted], scale=5)
            nested = [router.nested for router in one.routers]
            assert nested == [place == 1 for place in range(len(routings))]
            for router, routing in zip(one.routers, routings, strict=True):
                check_router(router, routing, place, routings[0], counted)


def check_router(
    router: Router, routing: mode.Routing, place: int, outer: mode.Routing, counted: np.ndarray
) -> None:
    weight = np.full(router.weight[:, place].shape, np.nan)
    for layer, _, expert, slot in np.ndindex(routing.index.shape):
        token = routing.index[layer, 0, expert, slot]
        if token < routing.num_tokens:
            weight[layer, token, expert] = routing.weight[layer, 0, expert, slot]
    taken = router.selected[:, place]
    assert np.array_equal(taken, np.isfinite(weight))
    assert_close(router.weight[:, place][taken], weight[taken], scale=5)
    expected = np.broadcast_to(counted, (len(weight), len(counted)))
    if router.nested:
        slots = outer.index[:, 0, 0].tolist()
        expected = [[slot < len(counted) and counted[slot] for slot in row] for row in slots]
    assert np.array_equal(router.counted[:, place], expected)


def test_padding_and_last_bytes_do_not_count() -> None:
    one = observed("dense")["as trained"]
    # Every byte but the document starts is a target, and those at the border of the files not.
    assert one.counted.sum() == len(DOCUMENTS.tokens) - len(DOCUMENTS.names)
    assert not one.counted.all()


def test_random_routing_takes_its_share() -> None:
    one = observed("mod-random")["as trained"]
    whole = one.taken[:, :-1]  # all but the sequence with padding
    assert (whole.sum(-1) == SIZE.capacity * SIZE.length).all()
    assert one.most == len(one.layers) == 2


@pytest.mark.parametrize(
    ("depth", "every", "layers"),
    [(4, 2, (2, 4)), (5, 2, (2, 4)), (3, 1, (1, 2, 3)), (7, 3, (2, 5))],
)
def test_layers_are_numbered_as_in_the_model(
    depth: int, every: int, layers: tuple[int, ...]
) -> None:
    arm, _ = built("mode-staged")
    arm = dataclasses.replace(arm, every=every)
    model = arm.build(dataclasses.replace(SIZE, depth=depth), key=jax.random.key(0))
    places = places_of(model)
    for nested in (False, True):
        assert tuple(n for some, inside in places if inside == nested for n in some) == layers
    one = observe(model, SOURCE, range(2), batch=2, key=jax.random.key(0))
    assert one.layers == layers
    assert one.taken.shape == (len(layers), 2, SIZE.length)


def test_compute_is_added_up_over_layers_and_experts() -> None:
    one = observed("mode-integrated")["causal"]
    (router,) = one.routers
    slow = np.zeros(one.taken.shape, int)
    for layer, row, token, expert in zip(*np.nonzero(router.selected), strict=True):
        assert expert < SIZE.experts
        slow[layer, row, token] += 1
    assert np.array_equal(one.taken, slow)
    assert one.most == 2 * SIZE.experts
    assert router.noop is not None
    assert ((router.noop > 0) & (router.noop < 1)).all()


# Summaries.


@pytest.mark.parametrize("name", ["mod", "mode-staged", "mode-integrated"])
def test_a_summary_is_a_count(name: str) -> None:
    found = observed(name)
    tokens = np.stack([SOURCE[place]["tokens"][:-1] for place in range(len(SOURCE))])
    classes = np.stack([measures.byte_classes(row.astype(np.int64)) for row in tokens])
    for summary, one in zip(
        summarise(found, classes, seed=0, draws=20), found.values(), strict=True
    ):
        compute, where = one.taken.sum(0), list(zip(*np.nonzero(one.counted), strict=True))
        total = sum(int(compute[at]) for at in where)
        assert summary.tokens == len(where)
        assert_close(summary.compute, total / len(where))
        assert_close(summary.bits, sum(one.loss[at] for at in where) / len(where))
        for number, row in enumerate(summary.classes):
            own = [at for at in where if classes[at] == number]
            assert row.tokens == len(own)
            assert_close(row.token_share, len(own) / len(where))
            if own and total:
                share = sum(int(compute[at]) for at in own) / total
                assert_close(row.compute_share, share)
                assert_close(row.ratio.value, share / (len(own) / len(where)))
                assert_close(row.entropy, sum(one.entropy[at] for at in own) / len(own))
        for row in summary.depths:
            own = [at for at in where if compute[at] == row.compute]
            assert row.tokens == len(own)
            if own:
                assert_close(row.entropy.mean, sum(one.entropy[at] for at in own) / len(own))
        assert_close(sum(row.chance for row in summary.depths), 1.0)
        assert_close(sum(row.chance * row.compute for row in summary.depths), summary.compute)
        for router, record in zip(summary.routers, one.routers, strict=True):
            for place, layer in enumerate(router.layers):
                weight = record.weight[place][record.counted[place]].astype(np.float64)
                taken = record.selected[place][record.counted[place]]
                assert layer.taken.count + layer.passed.count == weight.size
                assert sum(layer.taken_bins) == layer.taken.count == taken.sum()
                if taken.any():
                    assert_close(layer.taken.mean, weight[taken].mean())
                    assert_close(layer.taken.quantiles[2], np.median(weight[taken]))
                    assert_close(np.array(layer.shares), taken.mean(0))


def with_threshold(name: str, threshold: float) -> dict[str, Observed]:
    """The causal rule takes every token or none."""
    arm, model = built(name)

    def moved(router: mode.Router) -> mode.Router:
        there = router.state.threshold
        return eqx.tree_at(lambda r: r.state.threshold, router, jnp.full_like(there, threshold))

    causal = causal_model(arm, mode.map_routers(moved, model))
    return {
        name: observe(one, SOURCE, range(len(SOURCE)), batch=3, key=jax.random.key(0))
        for name, one in (("top-k", model), ("causal", causal))
    }


@pytest.mark.parametrize(("name", "threshold"), [("mode-staged", math.inf), ("mod", -math.inf)])
def test_a_rule_that_takes_all_or_none_has_no_correlation(
    name: str, threshold: float, tmp_path: Path
) -> None:
    found = with_threshold(name, threshold)
    classes = np.ones(found["causal"].counted.shape, int)
    summaries = summarise(found, classes, seed=0, draws=20)
    causal = summaries[1]
    assert causal.compute == (0 if threshold > 0 else 2)
    assert math.isnan(causal.pearson.value)
    assert math.isnan(causal.spearman.low)
    assert math.isnan(causal.classes[1].ratio.value) == (threshold > 0)
    passage = find_passage(SOURCE)
    shown = {key: passage.of(one.taken[:, list(passage.places)]) for key, one in found.items()}
    for picture in plot_analysis(tmp_path, summaries, passage, shown):
        assert (tmp_path / f"{picture}.png").read_bytes().startswith(b"\x89PNG")
        assert (tmp_path / f"{picture}.pdf").read_bytes().startswith(b"%PDF")
