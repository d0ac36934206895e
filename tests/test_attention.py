"""The contract of `causal_attention`, whatever computes it: numbers, gradients, causality, size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mode
from mode import _attention, _blockwise
from tests import reference as ref
from tests.helpers import assert_close, f64, packed_info, rng


OPTIMISED = True


attention = jax.jit(mode.causal_attention)


@pytest.fixture(autouse=True, scope="module", params=["as it is", "in small blocks"])
def _form(request):
    """Every test runs on the form its length gets, and on the blockwise one with several blocks."""
    if request.param == "in small blocks":
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_blockwise, "BLOCK", 64)
            patch.setattr(_attention, "_SHORT", 0)
            jax.clear_caches()
            yield
    else:
        yield
    jax.clear_caches()


def draw(seed, batch, tokens, heads=2, kv_heads=1, dim=4, dtype=jnp.float32):
    """Queries, keys and values."""
    shapes = [(batch, tokens, n, dim) for n in (heads, kv_heads, kv_heads)]
    return [jnp.asarray(rng(seed + i).normal(size=shape), dtype) for i, shape in enumerate(shapes)]


def one_document(batch, tokens):
    """No padding, one segment."""
    return jnp.ones((batch, tokens), jnp.int32)


def naive(q, k, v, segments):
    """The definition, T x T and all, on one line per step; zeros where no key is seen."""
    shared_by = q.shape[2] // k.shape[2]
    k, v = (jnp.repeat(z, shared_by, axis=2) for z in (k, v))
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / jnp.sqrt(jnp.float32(q.shape[-1]))
    same = (segments[:, :, None] == segments[:, None, :]) & (segments != 0)[:, None, :]
    seen = (same & jnp.tril(jnp.ones(same.shape[-2:], bool))[None])[:, None]
    share = jax.nn.softmax(jnp.where(seen, scores, -1e9), axis=-1)
    return jnp.einsum("bhqk,bkhd->bqhd", jnp.where(seen, share, 0), v)


@pytest.mark.parametrize("tokens", [1, 7, 128, 129, 300])
@pytest.mark.parametrize("segmented", [False, True])
def test_equals_the_oracle(tokens, segmented):
    """At lengths around and beyond the size of a chunk, with packed documents and padding."""
    q, k, v = draw(0, 1, tokens)
    segments = one_document(1, tokens)
    if segmented:
        third = tokens // 3
        segments = packed_info((third, tokens - 2 * third), tokens=tokens).segment_ids
    got = attention(q, k, v, segments)
    real = np.asarray(segments) != 0
    expected = ref.causal_attention(f64(q[0]), f64(k[0]), f64(v[0]), np.asarray(segments[0]))
    assert np.isfinite(got).all()
    assert_close(got[real], expected[None][real])


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 4), (4, 2), (6, 2), (4, 1)])
def test_query_heads_share_keys_and_values(heads, kv_heads):
    """Query head h reads key-value head h // (heads / kv_heads), in every sequence of the batch."""
    q, k, v = draw(10, 2, 9, heads, kv_heads)
    segments = jnp.asarray([[1] * 9, [1] * 4 + [2] * 5], jnp.int32)
    expected = ref.over_groups(ref.causal_attention, 1, *map(np.asarray, (q, k, v, segments)))
    assert_close(attention(q, k, v, segments), expected)


@pytest.mark.parametrize("tokens", [1, 7, 129, 300])
def test_gradients_are_those_of_the_definition(tokens):
    """With respect to queries, keys and values, across chunks, segments and padding."""
    q, k, v = draw(20, 2, tokens, heads=4, kv_heads=2)
    documents = ((max(1, tokens // 2), tokens // 3), (tokens,))
    segments = packed_info(*documents, tokens=tokens).segment_ids
    weights = jnp.asarray(rng(23).normal(size=q.shape), jnp.float32)
    weights = jnp.where((segments != 0)[..., None, None], weights, 0)

    def gradient(attend):
        return jax.jit(jax.grad(lambda qkv: jnp.sum(weights * attend(*qkv, segments))))

    got = gradient(mode.causal_attention)([q, k, v])
    assert all(np.isfinite(leaf).all() for leaf in got)
    assert_close(got, gradient(naive)([q, k, v]), scale=4)


def test_gradients_stay_finite_where_scores_are_huge():
    """Scores of 1e4 neither overflow the softmax nor its gradient."""
    q, k, v = draw(30, 1, 130, dtype=jnp.float32)
    gradient = jax.jit(jax.grad(lambda z: jnp.sum(mode.causal_attention(*z, one_document(1, 130)))))
    assert all(np.isfinite(leaf).all() for leaf in gradient([100 * q, 100 * k, v]))


@pytest.mark.parametrize("cut", [1, 5, 127, 128, 129, 199])
def test_later_tokens_change_nothing_bit_for_bit(cut):
    """Replacing all that comes after leaves the outputs before as they were."""
    q, k, v = draw(40, 1, 200)
    late = (jnp.arange(200) >= cut)[None, :, None, None]
    before = attention(q, k, v, one_document(1, 200))
    after = attention(*(jnp.where(late, 7 - z, z) for z in (q, k, v)), one_document(1, 200))
    assert np.asarray(before[:, :cut]).tobytes() == np.asarray(after[:, :cut]).tobytes()
    assert not np.array_equal(before[:, cut:], after[:, cut:])


def test_other_documents_and_padding_change_nothing():
    """What stands in another segment reaches neither outputs nor gradients, bit for bit."""
    q, k, v = draw(50, 1, 160)
    segments = packed_info((70, 60), tokens=160).segment_ids
    second = (segments == 2)[..., None, None]

    @jax.jit
    def outcome(qkv):
        def attend(qkv):
            return jnp.where(second, mode.causal_attention(*qkv, segments), 0)

        return attend(qkv), jax.grad(lambda qkv: jnp.sum(jnp.sin(attend(qkv))))(qkv)

    before = outcome([q, k, v])
    after = outcome([jnp.where(second, z, 5 - z) for z in (q, k, v)])
    for one, other in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


def test_a_sequence_does_not_see_its_batch_mates():
    """Row by row the result is that of the whole batch."""
    q, k, v = draw(60, 3, 140)
    together = attention(q, k, v, one_document(3, 140))
    for row in range(3):
        one = slice(row, row + 1)
        alone = attention(q[one], k[one], v[one], one_document(1, 140))
        assert_close(alone, together[one])


def test_vmap_of_a_gradient():
    """A further axis by `vmap` gives what a loop over it gives, gradients included."""
    draws = [draw(70 + 3 * place, 2, 130) for place in range(2)]
    segments = packed_info((100, 20), (130,), tokens=130).segment_ids
    gradient = jax.grad(lambda qkv: jnp.sum(jnp.sin(mode.causal_attention(*qkv, segments))))
    stacked = [jnp.stack(z) for z in zip(*draws, strict=True)]
    got = jax.jit(jax.vmap(gradient))(stacked)
    expected = [jnp.stack(z) for z in zip(*map(jax.jit(gradient), draws), strict=True)]
    assert_close(got, expected, scale=4)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_dtypes(dtype):
    """The result has the dtype of the input and the accuracy that dtype has; so have gradients."""
    q, k, v = draw(80, 2, 140, dtype=dtype)
    segments = packed_info((90, 50), (140,), tokens=140).segment_ids
    got = attention(q, k, v, segments)
    wide = [z.astype(jnp.float32) for z in (q, k, v)]
    assert got.dtype == dtype
    assert_close(got, naive(*wide, segments))

    def gradient(attend, qkv):
        def loss(qkv):
            return jnp.sum(attend(*qkv, segments).astype(jnp.float32))

        return jax.jit(jax.grad(loss))(qkv)

    narrow = gradient(mode.causal_attention, [q, k, v])
    assert [leaf.dtype for leaf in narrow] == [dtype] * 3
    assert_close(narrow, gradient(naive, wide), scale=4)


def test_float64():
    """In double precision to 1e-9."""
    with jax.enable_x64(True):
        q, k, v = draw(90, 1, 131, dtype=jnp.float64)
        segments = one_document(1, 131)
        got = np.asarray(attention(q, k, v, segments))
        expected = ref.causal_attention(*(np.asarray(z[0]) for z in (q, k, v, segments)))
    assert got.dtype == np.float64
    assert_close(got[0], expected)


def temporary_bytes(tokens):
    """What the backward pass holds besides inputs and results."""
    shape = jax.ShapeDtypeStruct((1, tokens, 4, 32), jnp.float32)
    segments = jax.ShapeDtypeStruct((1, tokens), jnp.int32)

    def loss(qkv, segments):
        return jnp.sum(mode.causal_attention(*qkv, segments))

    compiled = jax.jit(jax.value_and_grad(loss)).lower([shape] * 3, segments).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_memory_grows_with_the_length_and_not_its_square():
    """Twice the tokens take about twice the memory, forward and backward."""
    assert temporary_bytes(2048) < 2.6 * temporary_bytes(1024)


@pytest.mark.parametrize("theta", [100.0, 10_000.0])
def test_rope_at_any_positions(theta):
    """Positions need be neither consecutive nor start at 0, and differ between sequences."""
    x = jnp.asarray(rng(100).normal(size=(2, 6, 3, 8)), jnp.float32)
    positions = jnp.asarray([[0, 1, 5, 9, 200, 4000], [3, 0, 1, 2, 0, 1]], jnp.int32)
    expected = ref.over_groups(lambda x, p: ref.rope(x, p, theta), 1, f64(x), np.asarray(positions))
    # float32 angles of 4,000 radians are good to 2e-4.
    assert_close(mode.rope(x, positions, theta), expected, scale=30)


def test_rope_makes_scores_depend_on_distances_alone():
    """Shifting all positions by the same amount leaves every query-key product."""
    q, k = (jnp.asarray(rng(110 + i).normal(size=(5, 2, 8)), jnp.float32) for i in range(2))
    positions = jnp.asarray([0, 2, 3, 7, 30], jnp.int32)

    def products(shift):
        at = positions + shift
        return jnp.einsum("qhd,khd->hqk", mode.rope(q, at), mode.rope(k, at))

    assert_close(products(50), products(0), scale=4)
