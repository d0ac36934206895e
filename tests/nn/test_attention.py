"""`CausalAttention`: numbers, gradients, causality and memory, in both forms."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array, Float

import mode
from tests import reference as ref
from tests.helpers import assert_close, f64, hidden_states, oracle_options, packed_info, rng


# All scores at once, and block by block: the same numbers.
FORMS: dict[str, int | None] = {"at once": None, "in blocks": 64}
forms = pytest.mark.parametrize("block_size", FORMS.values(), ids=FORMS)

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scale": {"scale": 1.3},
    "soft cap": {"soft_cap": 0.8},
    "window": {"window": 20},
    "alibi": {"alibi": True},
    "all": {"scale": 2.0, "soft_cap": 1.5, "window": 70, "alibi": True},
}

Heads = Float[Array, "batch tokens heads head_dim"]


def draw(
    seed: int,
    batch: int,
    tokens: int,
    heads: int = 2,
    kv_heads: int = 1,
    dim: int = 4,
    dtype: Any = jnp.float32,
) -> list[Heads]:
    """Queries, keys and values."""
    shapes = [(batch, tokens, n, dim) for n in (heads, kv_heads, kv_heads)]
    return [jnp.asarray(rng(seed + i).normal(size=shape), dtype) for i, shape in enumerate(shapes)]


def naive(qkv: Sequence[Heads], info: mode.TokenInfo) -> Heads:
    """The definition, T x T and all, one step a line; zeros where no key is seen."""
    q, k, v = qkv
    k, v = (jnp.repeat(z, q.shape[2] // k.shape[2], axis=2) for z in (k, v))
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / jnp.sqrt(jnp.float32(q.shape[-1]))
    same = info.segment_ids[:, :, None] == info.segment_ids[:, None, :]
    seen = jnp.tril(same & info.valid[:, None, :])[:, None]
    weights = jax.nn.softmax(jnp.where(seen, scores, -1e9), axis=-1)
    return jnp.einsum("bhqk,bkhd->bqhd", jnp.where(seen, weights, 0), v)


def attend(block_size: int | None, **options: Any) -> mode.CausalAttention:
    return mode.CausalAttention(block_size=block_size, **options)


def apply(attend: mode.CausalAttention, qkv: Sequence[Heads], info: mode.TokenInfo) -> Heads:
    """The result for queries, keys and values."""
    q, k, v = qkv
    return attend(q, k, v, info)


attended = jax.jit(apply)


def oracle(
    qkv: Sequence[Any], info: mode.TokenInfo, attend: mode.CausalAttention | None = None
) -> ref.Floats:
    """What the oracle makes of each sequence."""
    options = ref.AttentionOptions() if attend is None else oracle_options(attend)

    def of_one(q: Any, k: Any, v: Any, segments: Any, positions: Any) -> ref.Floats:
        return ref.causal_attention(q, k, v, segments, positions, options)

    arrays = [np.asarray(info.segment_ids), np.asarray(info.positions)]
    return ref.over_groups(of_one, 1, *map(f64, qkv), *arrays)


def gradient(
    function: Callable[[Sequence[Heads]], Heads], qkv: Sequence[Heads], weight: Heads | None = None
) -> list[Heads]:
    """Of a weighted sum of the result."""

    def loss(qkv: Sequence[Heads]) -> Array:
        out = function(qkv).astype(jnp.float32)
        return jnp.sum(out if weight is None else weight * out)

    return jax.jit(jax.grad(loss))(qkv)


@forms
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("tokens", [1, 7, 129])
def test_equals_the_oracle(block_size: int | None, options: str, tokens: int) -> None:
    """Packed documents and padding, positions with gaps as among selected tokens, shared keys."""
    function = attend(block_size, **OPTIONS[options])
    qkv = draw(0, 2, tokens, heads=4, kv_heads=2)
    third = max(1, tokens // 3)
    info = packed_info((third, (tokens - third) // 2), (tokens,), tokens=tokens)
    info = mode.TokenInfo(3 * info.positions + info.positions**2 // 9, info.segment_ids)
    got = attended(function, qkv, info)
    assert np.isfinite(got).all()

    real = np.asarray(info.valid)
    assert_close(got[real], oracle(qkv, info, function)[real])


@forms
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 4), (6, 2), (4, 1)])
def test_query_heads_share_keys_and_values(
    block_size: int | None, heads: int, kv_heads: int
) -> None:
    """Query head h reads key-value head h // (heads / kv_heads)."""
    qkv = draw(10, 1, 70, heads, kv_heads)
    info = mode.TokenInfo.plain((1, 70))
    assert_close(attended(attend(block_size), qkv, info), oracle(qkv, info))


@forms
@pytest.mark.parametrize("options", ["plain", "all"])
def test_gradients(block_size: int | None, options: str) -> None:
    """Across blocks, segments and padding: those of the definition, by automatic derivatives of
    the form with all scores where an option has no formula here."""
    tokens = 150
    qkv = draw(20, 2, tokens, heads=4, kv_heads=2)
    info = packed_info((70, 50), (tokens,), tokens=tokens)
    weight = jnp.where(info.valid[..., None, None], hidden_states(23, *qkv[0].shape), 0)
    function = attend(block_size, **OPTIONS[options])
    got = gradient(lambda qkv: apply(function, qkv, info), qkv, weight)
    if options == "plain":
        expected = gradient(lambda qkv: naive(qkv, info), qkv, weight)
    else:
        whole = attend(None, **OPTIONS[options])
        expected = gradient(lambda qkv: apply(whole, qkv, info), qkv, weight)
    assert all(np.isfinite(leaf).all() for leaf in got)
    assert_close(got, expected, scale=4)


@forms
def test_gradients_stay_finite_where_scores_are_huge(block_size: int | None) -> None:
    """Scores of 1e4 overflow neither the softmax nor its gradient."""
    q, k, v = draw(30, 1, 130)
    info = mode.TokenInfo.plain((1, 130))
    got = gradient(lambda qkv: apply(attend(block_size), qkv, info), [100 * q, 100 * k, v])
    assert all(np.isfinite(leaf).all() for leaf in got)


@pytest.mark.optimized
@forms
@pytest.mark.parametrize("cut", [1, 63, 64, 65, 199])
def test_later_tokens_change_nothing_bit_for_bit(block_size: int | None, cut: int) -> None:
    """Replacing all that comes after leaves the results before as they were."""
    qkv, info = draw(40, 1, 200), mode.TokenInfo.plain((1, 200))
    late = (jnp.arange(200) >= cut)[None, :, None, None]
    before = attended(attend(block_size), qkv, info)
    after = attended(attend(block_size), [jnp.where(late, 7 - z, z) for z in qkv], info)
    assert np.asarray(before[:, :cut]).tobytes() == np.asarray(after[:, :cut]).tobytes()
    assert not np.array_equal(before[:, cut:], after[:, cut:])


@pytest.mark.optimized
@forms
def test_other_documents_and_padding_change_nothing(block_size: int | None) -> None:
    """What stands in another segment reaches neither results nor gradients, bit for bit."""
    qkv = draw(50, 1, 160)
    info = packed_info((70, 60), tokens=160)
    second = (info.segment_ids == 2)[..., None, None]
    function = attend(block_size)

    @jax.jit
    def outcome(qkv: list[Heads]) -> Any:
        def of_second(qkv: list[Heads]) -> Heads:
            return jnp.where(second, apply(function, qkv, info), 0)

        return of_second(qkv), jax.grad(lambda qkv: jnp.sum(jnp.sin(of_second(qkv))))(qkv)

    before = outcome(qkv)
    after = outcome([jnp.where(second, z, 5 - z) for z in qkv])
    for one, other in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


@forms
def test_vmap_of_a_gradient(block_size: int | None) -> None:
    """A further axis by `vmap` gives what a loop over it gives."""
    draws = [draw(70 + 3 * place, 2, 130) for place in range(2)]
    info = packed_info((100, 20), (130,), tokens=130)
    function = attend(block_size)
    of_one = jax.grad(lambda qkv: jnp.sum(jnp.sin(apply(function, qkv, info))))
    got = jax.jit(jax.vmap(of_one))([jnp.stack(z) for z in zip(*draws, strict=True)])
    expected = [jnp.stack(z) for z in zip(*map(jax.jit(of_one), draws), strict=True)]
    assert_close(got, expected, scale=4)


@forms
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bfloat16", "float16"])
def test_narrow_dtypes(block_size: int | None, dtype: Any) -> None:
    """Results and gradients have the dtype of the input, and the accuracy that dtype has."""
    qkv = draw(80, 2, 140, dtype=dtype)
    info = packed_info((90, 50), (140,), tokens=140)
    wide = [z.astype(jnp.float32) for z in qkv]
    got = attended(attend(block_size), qkv, info)
    assert got.dtype == dtype
    assert_close(got, naive(wide, info))
    narrow = gradient(lambda qkv: apply(attend(block_size), qkv, info), qkv)
    assert [leaf.dtype for leaf in narrow] == [dtype] * 3
    assert_close(narrow, gradient(lambda qkv: naive(qkv, info), wide), scale=4)


@forms
def test_float64(block_size: int | None) -> None:
    """In double precision to 1e-9."""
    with jax.enable_x64(True):
        qkv = draw(90, 1, 131, dtype=jnp.float64)
        info = mode.TokenInfo.plain((1, 131))
        got = np.asarray(attended(attend(block_size), qkv, info))
        expected = oracle(qkv, info)
    assert got.dtype == np.float64
    assert_close(got, expected)


def temporary_bytes(tokens: int) -> int:
    """What the backward pass holds besides inputs and results."""
    shape = jax.ShapeDtypeStruct((1, tokens, 4, 32), jnp.float32)

    def loss(qkv: list[Heads]) -> Array:
        return jnp.sum(apply(mode.CausalAttention(), qkv, mode.TokenInfo.plain((1, tokens))))

    compiled = jax.jit(jax.value_and_grad(loss)).lower([shape] * 3).compile()
    memory: Any = compiled.memory_analysis()
    return memory.temp_size_in_bytes


def test_memory_grows_with_the_length_and_not_its_square() -> None:
    """Twice the tokens take about twice the memory, forward and backward."""
    assert temporary_bytes(2048) < 2.6 * temporary_bytes(1024)


def test_heads_that_nothing_turns_may_have_an_odd_size() -> None:
    """Values are those of one head after the other, without a turn."""
    block = mode.Attention(9, 3, rope_theta=None, key=jax.random.key(0))
    x = jnp.asarray(rng(120).normal(size=(2, 7, 9)), jnp.float32)
    update, _ = block(x)
    q, k, v = (part.reshape(2, 7, 3, 3) for part in np.split(f64(x) @ f64(block.qkv.weight), 3, -1))
    scores = np.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(3)
    scores = np.where(np.tri(7, dtype=bool), scores, -np.inf)
    share = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    mixed = np.einsum("bhqk,bkhd->bqhd", share, v).reshape(2, 7, 9)
    assert_close(update, mixed @ f64(block.out.weight))
    with pytest.raises(ValueError, match="`dim` must be `num_heads` times a number, got dim=8"):
        mode.Attention(8, 3, rope_theta=None, key=jax.random.key(0))
