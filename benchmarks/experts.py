"""What routing costs: an expert-choice layer against its bare matrix products.

python benchmarks/experts.py
"""

import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import timing

import mode


BATCH, TOKENS, DIM, EXPERTS = 8, 512, 256, 8


def make_expert(key: jax.Array) -> mode.GELUFeedForward:
    return mode.GELUFeedForward(DIM, key=key)


def routed(layer: mode.MixtureOfExperts, x: jax.Array) -> jax.Array:
    return layer(x)[0]


def bare(layer: mode.MixtureOfExperts, slots: jax.Array) -> jax.Array:
    """The same experts on slots that are already in place: no routing, gathering or scattering."""
    return eqx.filter_vmap(lambda expert, rows: jax.vmap(expert)(rows))(layer.experts, slots)


def one_hot(layer: mode.MixtureOfExperts, x: jax.Array) -> jax.Array:
    """The same layer with the dispatch and combine of the usual JAX codes: one-hot einsums."""
    routing = layer.router(x, mode.TokenInfo.plain(x.shape[:-1]))
    dispatch = jax.nn.one_hot(routing.index, x.shape[-2])
    slots = jnp.einsum("gect,gtd->egcd", dispatch, x)
    rows = slots.reshape(EXPERTS, -1, DIM)
    updates = bare(layer, rows).reshape(slots.shape)
    return jnp.einsum("gect,gec,egcd->gtd", dispatch, routing.weight, updates)


def dense(feedforward: mode.GELUFeedForward, x: jax.Array) -> jax.Array:
    return feedforward(x)


def time_layer() -> bool:
    keys = jax.random.split(jax.random.key(0), 3)
    layer = mode.MixtureOfExperts(
        lambda key: mode.GELUFeedForward(DIM, key=key),
        DIM,
        EXPERTS,
        capacity_factor=1.0,
        key=keys[0],
    )
    x = jax.random.normal(keys[1], (BATCH, TOKENS, DIM))
    slots = x.reshape(EXPERTS, -1, DIM)
    feedforward = mode.GELUFeedForward(DIM, key=keys[2])
    met = True
    for kind in ("forward+backward", "forward"):
        gradient = timing.with_gradient if kind == "forward+backward" else lambda f: f
        variants = {
            "bare matrix products": timing.compiled(gradient(bare), layer, slots),
            "expert choice": timing.compiled(gradient(routed), layer, x),
            "one-hot einsum form": timing.compiled(gradient(one_hot), layer, x),
            "dense feed-forward of equal FLOPs": timing.compiled(gradient(dense), feedforward, x),
        }
        met &= timing.report(
            f"[{BATCH}, {TOKENS}, {DIM}], {EXPERTS} experts, capacity factor 1, {kind}",
            timing.take_turns(variants),
            base="bare matrix products",
            limits={"expert choice": 1.10},
        )
    return met


def count_noop_flops() -> bool:
    """No-ops cost nothing: XLA's count with them against that of the real experts alone."""
    keys = jax.random.split(jax.random.key(0), 2)
    x = jax.random.normal(keys[1], (BATCH, TOKENS, DIM))
    met = True
    print("\nXLA's count of FLOPs, forward, integrated MoDE against its real experts alone")
    for num_noop in (0, 2, 8):
        layer = mode.MixtureOfExperts(
            make_expert, DIM, EXPERTS, num_noop=num_noop, capacity_factor=0.75, key=keys[0]
        )
        slots = x.reshape(EXPERTS, -1, DIM)[:, : BATCH * layer(x)[1][0].index.shape[-1]]
        ratio = timing.compiled(routed, layer, x).flops / timing.compiled(bare, layer, slots).flops
        met &= ratio < 1.03
        print(f"  {num_noop} no-op experts: {ratio:6.3f} x (limit 1.03, the router's part)")
    return met


if __name__ == "__main__":
    timing.header()
    results = [time_layer(), count_noop_flops()]
    sys.exit(0 if all(results) else 1)
