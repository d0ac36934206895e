"""Conversion: the same function at capacity 1, a gradient to every router, and decoding."""

from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mode
from tests.helpers import rng, run
from tests.pretrained.cases import CONFIGS, VOCAB, make_tensors, write_folder


FORMS = tuple(mode.pretrained.FORMS)
IDS = jnp.asarray(rng(3).integers(0, VOCAB, (3, 24)))
KEY = jax.random.key(5)


# Every form, and every option of a family with a form that reads it in its own way.
PAIRS = (
    *(("llama", form) for form in FORMS),
    ("qwen3", "mod-both"),
    ("qwen3", "moe"),
    ("gpt2", "mod-queries"),
    ("gpt2", "mode-integrated"),
    ("qwen2-window", "mod-queries"),
    ("qwen2-window", "mode-staged"),
)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, mode.Transformer]:
    folder: Path = tmp_path_factory.mktemp("models")
    return {
        name: mode.pretrained.load(write_folder(folder / name, config, make_tensors(config)))
        for name, config in CONFIGS.items()
        if name in {pair[0] for pair in PAIRS}
    }


@pytest.fixture(scope="module")
def qwen(models: dict[str, mode.Transformer]) -> mode.Transformer:
    return models["qwen3"]


def _scorer(router: mode.Router) -> mode.pretrained.NormedScorer:
    assert isinstance(router.scorer, mode.pretrained.NormedScorer)
    return router.scorer


@pytest.mark.optimized
@pytest.mark.parametrize(("name", "form"), PAIRS)
def test_the_function_is_the_same_at_capacity_1(
    models: dict[str, mode.Transformer], name: str, form: str
) -> None:
    model = models[name]
    routed = mode.pretrained.convert(model, [0, 2], capacity=1, form=form, key=KEY)
    info = mode.TokenInfo.packed(jnp.asarray([[1] * 24, [1] * 10 + [0] * 14, [1] * 9 + [2] * 15]))
    before, after = (np.asarray(run(m, IDS, info)[0]) for m in (model, routed))
    real = np.asarray(info.valid)
    if form == "mod":
        np.testing.assert_array_equal(after[real], before[real])
    scale = np.abs(before[real]).max()
    assert np.abs(after - before)[real].max() <= 1e-6 * scale


@pytest.mark.parametrize(("form", "capacity"), [("mod", 0.5), *((form, 1) for form in FORMS)])
def test_every_router_has_a_gradient(qwen: mode.Transformer, form: str, capacity: float) -> None:
    routed = mode.pretrained.convert(qwen, [0, 2], capacity=capacity, form=form, key=KEY)

    @eqx.filter_jit
    @eqx.filter_grad
    def gradient(model: mode.Transformer) -> jax.Array:
        logits, _ = model(IDS)
        return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - logits[..., 3])

    for router in mode.routers(gradient(routed)):
        for layer in _scorer(router).linear.weight:
            assert jnp.abs(layer).max() > 1e-6


@pytest.mark.parametrize("form", FORMS)
def test_converted_models_decode(qwen: mode.Transformer, form: str) -> None:
    routed = mode.pretrained.convert(qwen, [1], capacity=0.5, form=form, key=KEY)
    causal = mode.make_causal(mode.calibrate_thresholds(routed, (IDS, None)))
    mode.testing.assert_decodes(causal, IDS)
    mode.testing.assert_exact_capacity(routed, IDS)


def test_the_layers_named_are_routed_and_share_scans(qwen: mode.Transformer) -> None:
    deep = mode.with_layers(qwen, mode.list_layers(qwen) * 4)
    routed = mode.pretrained.convert(deep, [3, 5, 7, 9], capacity=0.5, key=KEY)
    kinds = [isinstance(layer, mode.MixtureOfDepths) for layer in mode.list_layers(routed)]
    assert [number for number, kind in enumerate(kinds) if kind] == [3, 5, 7, 9]
    assert [(len(stack.layers), stack.repeats) for stack in routed.stacks] == [
        (1, 3),
        (2, 4),
        (1, 1),
    ]
    scorers = _scorer(mode.routers(routed)[0]).linear.weight
    assert len({float(layer[0, 0]) for layer in scorers}) == 4


def test_logits_of_routers_do_not_grow_with_the_stream(qwen: mode.Transformer) -> None:
    routed = mode.pretrained.convert(qwen, [1], capacity=0.5, key=KEY)
    loud = eqx.tree_at(lambda m: m.embedding, routed, replace_fn=lambda table: 1e3 * table)
    for one in (routed, loud):
        (routing,) = run(one, IDS)[1]
        assert 0.2 < jnp.std(routing.logits) < 3


def test_experts_that_are_drawn_anew_differ(qwen: mode.Transformer) -> None:
    options = {"capacity": 1, "form": "moe", "num_experts": 3, "key": KEY}
    copied, drawn = (
        mode.pretrained.convert(qwen, [1], redrawn=redrawn, **options) for redrawn in (0.0, 0.5)
    )

    def up(model: mode.Transformer, name: str) -> np.ndarray:
        layer = mode.list_layers(model)[1]
        assert isinstance(layer, mode.Residual)
        assert isinstance(layer.block, mode.TransformerBlock)
        return np.asarray(getattr(layer.block.feedforward, name).up.weight)

    original = up(qwen, "function")
    for expert in up(copied, "experts"):
        np.testing.assert_array_equal(expert, original)
    for expert in up(drawn, "experts"):
        columns = (expert == original).all(0)
        assert columns.sum() == 20  # of 40, the same columns of gate and up, rows of down
        new = expert[:, ~columns]
        assert abs(new.std() - original.std()) < 0.3 * original.std()
    assert mode.pretrained.compare(qwen, copied, IDS).difference < 1e-6
    assert mode.pretrained.compare(qwen, drawn, IDS).difference > 1e-3


def test_a_form_of_ones_own(qwen: mode.Transformer) -> None:
    def strided(
        block: mode.TransformerBlock, options: object, key: jax.Array
    ) -> mode.MixtureOfDepths:
        del options
        return mode.MixtureOfDepths(block, 24, 0.5, select=mode.Strided(), key=key)

    routed = mode.pretrained.convert(qwen, [1], capacity=0.5, form=strided, key=KEY)
    (routing,) = run(routed, IDS)[1]
    assert routing.num_filled.tolist() == [[12] * 3]


def test_the_receipt_says_what_changed(qwen: mode.Transformer) -> None:
    routed = mode.pretrained.convert(qwen, [0, 1], capacity=0.5, key=KEY)
    receipt = mode.pretrained.compare(qwen, routed, IDS)
    a, b = (np.asarray(run(m, IDS)[0], np.float64) for m in (qwen, routed))
    assert receipt.difference == pytest.approx(np.linalg.norm(b - a) / np.linalg.norm(a), rel=1e-5)
    assert receipt.parameters[1] - receipt.parameters[0] == 2 * 2 * 24
    # Two layers of three keep half of their entries: keys and values of 2 heads of 14, and the
    # positions and segments of the tokens.
    assert receipt.cache_bytes[1] < receipt.cache_bytes[0]
    counted = mode.count_flops(routed, IDS).total / IDS.size
    assert receipt.flops_per_token[1] == counted < receipt.flops_per_token[0]
    assert "parameters" in str(receipt)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"layers": [3]}, "from 0 to 2"),
        ({"layers": [-1]}, "layers"),
        ({"layers": [1, 1]}, "different"),
        ({"layers": []}, "at least one"),
        ({"capacity": 0}, "capacity"),
        ({"capacity": 1.5}, "capacity"),
        ({"form": "mor"}, "form.*mor"),
        ({"form": "moe", "num_experts": 0}, "num_experts"),
        ({"form": "moe", "redrawn": 1.5}, "redrawn"),
        ({"form": "moe", "expert_capacity": 0}, "capacity"),
        ({"form": "mode-integrated", "num_noop": -1}, "num_noop"),
        ({"gate": mode.SoftmaxGate()}, "gate"),
    ],
)
def test_errors(changes: dict, match: str, qwen: mode.Transformer) -> None:
    options = {"layers": [1], "capacity": 0.5, "key": KEY, **changes}
    with pytest.raises(ValueError, match=match):
        mode.pretrained.convert(qwen, options.pop("layers"), **options)


def test_routed_layers_are_not_routed_again(qwen: mode.Transformer) -> None:
    routed = mode.pretrained.convert(qwen, [1], capacity=0.5, key=KEY)
    with pytest.raises(ValueError, match="MixtureOfDepths"):
        mode.pretrained.convert(routed, [1], capacity=0.5, key=KEY)


def test_only_models_of_one_vocabulary_are_compared(qwen: mode.Transformer) -> None:
    small = eqx.tree_at(lambda m: m.embedding, qwen, qwen.embedding[:9])
    with pytest.raises(ValueError, match="vocabulary"):
        mode.pretrained.compare(qwen, small, IDS)
