"""Decoding token by token is the teacher-forced forward of the causal model, for every layer."""

import logging
from collections.abc import Callable, Iterator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mode

from .helpers import assert_close
from .layers import DIM, VOCAB, expert, transformer_block


KEY = jax.random.key(3)
BATCH, PROMPT, TOKENS = 5, 6, 16
LENGTHS = jnp.array([3, 6, 1, 5, 2])


def dense(key: jax.Array) -> mode.Residual:
    return mode.Residual(transformer_block(key, num_kv_heads=1))


def mod(key: jax.Array, **options: Any) -> mode.MixtureOfDepths:
    return mode.MixtureOfDepths(transformer_block(key), DIM, 0.25, key=key, **options)


KINDS: dict[str, Callable[[jax.Array], Any]] = {
    "dense": dense,
    "mod": mod,
    "mod_predictor": lambda key: mod(key, predictor=mode.Predictor(DIM, key=key)),
    "moe_expert_choice": lambda key: mode.integrated_mode(expert, DIM, 2, 4, 0, key=key),
    "moe_token_choice": lambda key: mode.integrated_mode(
        expert, DIM, 2, 4, 0, select=mode.TokenChoice(2), key=key
    ),
    "staged": lambda key: mode.staged_mode(expert, DIM, 2, 2, capacity=0.5, key=key),
    "staged_token_choice": lambda key: mode.staged_mode(
        expert, DIM, 2, 3, capacity=0.5, select=mode.TokenChoice(1), key=key
    ),
    "integrated": lambda key: mode.integrated_mode(
        expert, DIM, 2, 3, 2, select=mode.TokenChoice(2), key=key
    ),
    "shared": lambda key: mode.Residual(
        mode.MixtureOfExperts(expert, DIM, 2, num_shared=1, router_std=0.5, key=key)
    ),
}


def causal(kind: str, limit: float = 1.0, **options: Any) -> mode.Transformer:
    """Two dense and two layers of the kind, thresholds set by one step, deciding causally."""
    model = mode.Transformer(VOCAB, DIM, [dense, KINDS[kind]] * 2, key=KEY, **options)
    model = mode.update_state(model, eqx.filter_jit(model)(texts())[1])
    return mode.causal(model, limit=limit)


def texts(batch: int = BATCH, tokens: int = TOKENS) -> jax.Array:
    return jax.random.randint(KEY, (batch, tokens), 0, VOCAB)


def steps_of(
    model: mode.Transformer, tokens: jax.Array, lengths: jax.Array
) -> Iterator[mode.Decoding]:
    """After every token from the prompts on, until the longest member is full."""
    members, longest = tokens.shape
    decoding = mode.prefill(model, tokens[:, :PROMPT], lengths, max_tokens=longest)
    yield decoding
    for _ in range(longest - int(lengths.max())):
        decoding = mode.step(model, decoding, tokens[jnp.arange(members), decoding.length])
        yield decoding


def decoded(model: mode.Transformer, tokens: jax.Array, lengths: jax.Array) -> list[jax.Array]:
    return [decoding.logits for decoding in steps_of(model, tokens, lengths)]


def check(model: mode.Transformer, tokens: jax.Array, scale: float) -> None:
    expected = np.asarray(eqx.filter_jit(model)(tokens)[0])
    members = np.arange(len(tokens))
    for steps, logits in enumerate(decoded(model, tokens, LENGTHS)):
        assert_close(logits, expected[members, np.asarray(LENGTHS) - 1 + steps], scale=scale)


@pytest.mark.parametrize("kind", KINDS)
def test_decoding_is_the_forward(kind: str) -> None:
    """Members want different blocks at different steps; under a limit, first come first served.

    Kinds in turn take every token that asks, scanned, and half of them, unrolled.
    """
    limited = list(KINDS).index(kind) % 2 == 1
    model = causal(kind, 0.5 if limited else 1.0)
    check(mode.unrolled(model) if limited else model, texts(), scale=2)


@pytest.mark.parametrize("kind", ["mod", "staged"])
def test_the_other_form(kind: str) -> None:
    check(causal(kind), texts(), scale=2)


@pytest.mark.parametrize("kind", ["dense", "mod", "staged"])
def test_in_bfloat16(kind: str) -> None:
    """Parameters stay float32; a softmax in parts rounds otherwise than one in a piece."""
    narrow = causal(kind, dtype=jnp.bfloat16)
    expected = np.asarray(eqx.filter_jit(narrow)(texts())[0])
    for steps, logits in enumerate(decoded(narrow, texts(), LENGTHS)):
        assert logits.dtype == jnp.float32
        after = expected[np.arange(BATCH), np.asarray(LENGTHS) - 1 + steps]
        assert np.abs(logits - after).max() < 0.01 * np.abs(expected).max()


@pytest.mark.parametrize("kind", ["moe_expert_choice", "integrated"])
def test_experts_in_bfloat16(kind: str) -> None:
    """As close wherever the same experts computed the text so far. Rounding the hidden states may
    turn a choice between two that are level, and turns no other."""
    narrow = causal(kind, dtype=jnp.bfloat16)
    expected, (routing,) = eqx.filter_jit(narrow)(texts())
    steps = list(steps_of(narrow, texts(), jnp.full(BATCH, PROMPT)))
    taken = steps[-1].caches[0][1].left[1].taken
    same = np.asarray((taken == routing.selected).all(axis=(0, 3)))
    assert same.mean() > 0.8
    compared = 0
    for step in steps:
        length = int(step.length[0])
        so_far = same[:, :length].all(axis=1)
        apart = np.abs(step.logits - expected[:, length - 1])[so_far]
        assert (apart < 0.01 * np.abs(expected).max()).all()
        compared += so_far.sum()
    assert compared > len(steps) * BATCH / 2


def test_after_several_hundred_steps() -> None:
    model = causal("mod")
    made = mode.generate(model, texts()[:2, :PROMPT], steps=300)
    whole = jnp.concatenate([texts()[:2, :PROMPT], made.tokens], axis=1)
    logits, (routing,) = eqx.filter_jit(model)(whole)
    assert_close(made.decoding.logits, logits[:, -1], scale=5)
    assert (jnp.argmax(logits[:, PROMPT - 1 : -1], axis=-1) == made.tokens).mean() > 0.99
    (found,) = mode.entered(model, made.decoding)
    assert_close(found.share, routing.num_filled / whole.shape[1])
    assert (found.count == routing.selected[..., 0].astype(int)).all()
    assert made.decoding.max_tokens == whole.shape[1]


@pytest.mark.parametrize("wanted", [0, 3, 5])
def test_any_number_of_members_may_want_a_block(wanted: int) -> None:
    """None, some, or all of them at every step: no drops, whatever the usual slots hold."""
    model = causal("mod")
    tokens = jnp.where(jnp.arange(BATCH)[:, None] < wanted, 1, 2) * jnp.ones((1, TOKENS), int)
    router = mode.routers(model)[0]
    # The first feature alone decides, and the embedding alone sets it.
    weight = jnp.zeros_like(router.scorer.weight).at[:, 0].set(1.0)
    threshold = jnp.zeros_like(router.state.threshold)
    embedding = model.embedding.at[1, 0].set(50.0).at[2, 0].set(-50.0)
    model = mode.map_routers(
        lambda r: eqx.tree_at(
            lambda r: (r.scorer.weight, r.state.threshold), r, (weight, threshold)
        ),
        model,
    )
    model = eqx.tree_at(lambda m: m.embedding, model, embedding)
    (routing,) = eqx.filter_jit(model)(tokens)[1]
    demand = np.where(np.arange(BATCH) < wanted, TOKENS, 0)
    assert (np.asarray(routing.num_filled) == demand).all()
    check(model, tokens, scale=20)


def test_a_routed_cache_holds_what_it_processed_and_no_more() -> None:
    """Slots are `token_capacity(max_tokens, limit)`; positions are the original ones."""
    model = causal("mod", limit=0.5)
    decoding = mode.prefill(model, texts(), max_tokens=40)
    (full, routed) = decoding.caches[0]
    assert (full.slots, routed.slots) == (40, mode.token_capacity(40, 0.5))
    (routing,) = eqx.filter_jit(model)(jnp.pad(texts(), ((0, 0), (0, 24))), padded(40))[1]
    for layer in range(2):
        for member in range(BATCH):
            taken = np.flatnonzero(routing.selected[layer, member, :, 0])
            held = int(routed.length[layer, member])
            assert np.array_equal(routed.info.positions[layer, member, :held], taken)
            assert not routed.info.valid[layer, member, held:].any()


def padded(tokens: int) -> mode.TokenInfo:
    segments = (jnp.arange(tokens) < TOKENS).astype(jnp.int32)
    return mode.TokenInfo.packed(jnp.broadcast_to(segments, (BATCH, tokens)))


def test_a_full_layer_refuses_and_counts() -> None:
    """First come, first served: what it turned away goes around the block, as in the forward."""
    model = causal("mod", limit=0.1)
    decoding = mode.prefill(model, texts()[:, :PROMPT], max_tokens=TOKENS)
    for place in range(PROMPT, TOKENS):
        decoding = mode.step(model, decoding, texts()[:, place])
    (routing,) = eqx.filter_jit(model)(texts())[1]
    (found,) = mode.entered(model, decoding)
    assert found.refused is not None
    assert (found.refused == routing.num_dropped).all()
    assert (found.refused > 0).any()


@pytest.mark.parametrize("kind", ["integrated"])
def test_a_member_s_text_is_its_own(kind: str) -> None:
    """Alone and among fifteen others, whose prompts are longer: the same tokens."""
    model = causal(kind)
    keys = jax.random.split(KEY, 16)
    lengths = 1 + jnp.arange(16) % PROMPT
    sampler = mode.Sampler(temperature=1.0, top_k=20, top_p=0.9)
    options = {"steps": 12, "sampler": sampler, "stop": 7}
    together = mode.generate(model, texts(16, PROMPT), lengths, keys=keys, **options)
    for member in (0, 4, 15):
        one = slice(member, member + 1)
        alone = mode.generate(
            model, texts(16, PROMPT)[one], lengths[one], keys=keys[one], **options
        )
        assert (alone.tokens[0] == together.tokens[member]).all()
        assert alone.lengths[0] == together.lengths[member]


def test_a_stop_token_ends_a_member() -> None:
    model = causal("mod")
    free = mode.generate(model, texts()[:, :PROMPT], steps=8)
    stop = int(free.tokens[0, 3])
    made = mode.generate(model, texts()[:, :PROMPT], steps=8, stop=stop)
    for member in range(BATCH):
        ends = np.flatnonzero(np.asarray(free.tokens[member]) == stop)
        length = int(ends[0]) + 1 if len(ends) else 8
        assert made.lengths[member] == length
        assert (made.tokens[member, :length] == free.tokens[member, :length]).all()
        assert (made.tokens[member, length:] == stop).all()
    assert (made.decoding.length == PROMPT + made.lengths).all()


def test_a_text_in_pieces_is_the_text() -> None:
    """However its steps are split over calls, and keys survive the calls."""
    model = causal("staged")
    options = {"sampler": mode.Sampler(temperature=1.0), "keys": jax.random.split(KEY, BATCH)}
    whole = mode.generate(model, texts()[:, :PROMPT], LENGTHS, steps=10, stop=7, **options)
    made = mode.prefill(model, texts()[:, :PROMPT], LENGTHS, max_tokens=TOKENS)
    pieces = []
    for steps in (1, 4, 5):
        made = mode.sample(model, made, steps=steps, stop=7, **options)
        pieces.append(made.tokens)
    assert (jnp.concatenate(pieces, axis=1) == whole.tokens).all()
    assert (made.done == whole.done).all()
    assert whole.done.any()
    assert not whole.done.all()
    depth, experts = mode.entered(model, made.decoding)
    both = mode.entered(model, whole.decoding)
    assert (depth.count == both[0].count).all()
    assert (experts.count == both[1].count).all()
    # Inside, experts see what the depth let in, and nobody else.
    assert (experts.count[depth.count == 0] == 0).all()
    assert experts.count.any()


def test_one_program_for_all_pieces() -> None:
    """Where arrays are bound to a device, as those read from a checkpoint are, too."""
    arrays, rest = eqx.partition(causal("mod"), eqx.is_array)
    model = eqx.combine(jax.device_put(arrays, jax.devices()[0]), rest)
    made = mode.prefill(model, texts()[:, :PROMPT], LENGTHS, max_tokens=TOKENS)
    made = mode.sample(model, made, steps=2, stop=7)
    with jax.log_compiles(), pytest.MonkeyPatch.context() as patch:
        compiled: list[str] = []
        patch.setattr(
            logging.Logger, "_log", lambda self, level, msg, *rest, **_: compiled.append(msg)
        )
        for _ in range(2):
            made = mode.sample(model, made, steps=2, stop=7)
    assert not [
        message for message in compiled if "XLA compilation" in message and "_sample" in message
    ]


def test_a_donated_cache_is_written_in_place() -> None:
    """A step's own memory is a fraction of the caches: none of them is copied."""
    model = mode.unrolled(causal("dense"))
    decoding = mode.prefill(model, texts(32, PROMPT), max_tokens=1024)

    def stepped(caches: Any, kept: Any) -> Any:
        logits, length, tokens = kept
        return mode.step(model, mode.Decoding(logits, length, caches, 1024), tokens).caches

    arguments = (decoding.caches, (decoding.logits, decoding.length, texts(32)[:, 0]))
    compiled = jax.jit(stepped, donate_argnums=0).lower(*arguments).compile()
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(decoding.caches))
    assert compiled.memory_analysis().temp_size_in_bytes < whole / 4


def test_an_inactive_member_stays_where_it_is() -> None:
    model = causal("mod")
    active = jnp.array([True, False, True, False, True])
    decoding = mode.prefill(model, texts()[:, :PROMPT], max_tokens=TOKENS)
    before = decoding
    after = mode.step(model, decoding, texts()[:, PROMPT], active)
    assert (after.length == before.length + active.astype(int)).all()
    assert (after.logits[1] == before.logits[1]).all()
    assert not (after.logits[0] == before.logits[0]).all()


def test_one_program_for_all_steps() -> None:
    model = causal("mod")
    counted = eqx.debug.assert_max_traces(mode.step, max_traces=BATCH * TOKENS)
    decoding = mode.prefill(model, texts()[:, :1], max_tokens=TOKENS)
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), decoding)
    for place in range(1, 5):
        decoding = counted(model, decoding, texts()[:, place])
        assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), decoding) == shapes


class Decodable(eqx.Module):
    """A user's own block: a running mean of what it saw, which it leaves behind."""

    inner: mode.Linear

    def __call__(self, x: Any, info: Any, *, key: Any = None) -> Any:
        seen = jnp.where(info.valid[..., None], self.inner(x), 0)
        count = jnp.maximum(jnp.cumsum(info.valid, axis=-1)[..., None], 1)
        return jnp.cumsum(seen, axis=-2) / count.astype(x.dtype), ()

    def extend(self, x: Any, info: Any, past: mode.Past) -> Any:
        if past.is_empty:
            return self(x, info)[0], jnp.where(info.valid[..., None], self.inner(x), 0)
        new = self.inner(x)
        real = past.info.valid[..., None]
        total = jnp.sum(jnp.where(real, past.left, 0), axis=1, keepdims=True) + new
        return total / (1 + jnp.sum(real, axis=1, keepdims=True)).astype(x.dtype), new


def test_a_block_of_a_user_s_own_joins_by_one_method() -> None:
    def routed(key: jax.Array) -> mode.MixtureOfDepths:
        return mode.MixtureOfDepths(Decodable(mode.Linear(DIM, DIM, key=key)), DIM, 0.5, key=key)

    model = mode.causal(mode.Transformer(VOCAB, DIM, [dense, routed], key=KEY))
    check(model, texts(), scale=2)


class Forgetful(Decodable):
    """Which forgets what it saw."""

    def extend(self, x: Any, info: Any, past: mode.Past) -> Any:
        return self(x, info)[0], jnp.where(info.valid[..., None], self.inner(x), 0)


def test_the_check_tells_a_block_that_decodes_from_one_that_does_not() -> None:
    def model(kind: type[Decodable]) -> mode.Transformer:
        block = kind(mode.Linear(DIM, DIM, key=KEY))
        return mode.Transformer(VOCAB, DIM, [dense, lambda key: mode.Residual(block)], key=KEY)

    mode.testing.assert_decodes(model(Decodable), vocab=VOCAB)
    with pytest.raises(AssertionError, match=r"after \d+ tokens, .* the logits of member \d are"):
        mode.testing.assert_decodes(model(Forgetful), vocab=VOCAB)
