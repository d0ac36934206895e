"""Decoding on a mesh: the numbers of one device."""

import equinox as eqx
import jax
from jax.sharding import NamedSharding, PartitionSpec

import mode
from tests.helpers import assert_close

from .meshes import mesh_of
from .models import TOKENS, build, tokens


def test_decoding_on_a_mesh() -> None:
    """Caches lie where their sequences are; the logits are those of one device."""
    mesh = mesh_of(data=2, expert=4)
    model = build("mod", "moe")
    routings = eqx.filter_jit(model)(tokens())[1]
    model = mode.make_causal(mode.update_router_state(model, routings))
    expected, _ = mode.prefill(model, tokens()[:, :8], max_tokens=TOKENS)
    expected, _ = mode.decode_step(model, expected, tokens()[:, 8])
    with jax.set_mesh(mesh):
        placed = eqx.filter_shard(model, mode.named_shardings(model, mesh))
        batch_sharding = mode.named_shardings(tokens(), mesh, mode.BATCH_RULES)
        prompts = jax.device_put(tokens()[:, :9], batch_sharding)
        state, _ = mode.prefill(placed, prompts[:, :8], max_tokens=TOKENS)
        shardings = mode.named_shardings(state, mesh, mode.DECODE_RULES)
        state = eqx.filter_shard(state, shardings)
        state, _ = mode.decode_step(placed, state, prompts[:, 8])
    assert_close(state.logits, expected.logits, scale=4)
    length, expected_length = state.caches[0][0].length, expected.caches[0][0].length
    assert length is not None
    assert expected_length is not None
    assert (length == expected_length).all()
    over = NamedSharding(mesh, PartitionSpec(None, ("data", "expert")))
    assert length.sharding.is_equivalent_to(over, 2)
