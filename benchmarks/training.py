"""FLOPs saved become time saved: a whole training step, dense against every other block routed.

The fraction of the time saved over the fraction of the FLOPs saved, both against the dense model of
the same depth and width.

    python benchmarks/training.py
"""

import sys

import equinox as eqx
import jax
import optax
import timing

import mode


VOCAB, DIM, DEPTH, HEADS, BATCH, TOKENS = 256, 256, 8, 4, 4, 512
LEAST = 0.90


def training_step(
    model: mode.Transformer, state: optax.OptState, tokens: jax.Array
) -> tuple[mode.Transformer, optax.OptState, jax.Array]:
    """One step as a user writes it: loss, gradient, clipped AdamW, router state."""
    parameters, rest = eqx.partition(model, mode.is_trainable(model))

    def loss(parameters: mode.Transformer) -> tuple[jax.Array, tuple[mode.Routing, ...]]:
        logits, routings = eqx.combine(parameters, rest)(tokens[:, :-1])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
        return losses.mean(), routings

    (value, routings), gradients = jax.value_and_grad(loss, has_aux=True)(parameters)
    updates, state = OPTIMIZER.update(gradients, state, parameters)
    model = eqx.combine(eqx.apply_updates(parameters, updates), rest)
    return mode.update_router_state(model, routings), state, value


OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))


def decoder(*, routed: bool) -> mode.Transformer:
    """Every other block routed at 0.125, or (offset beyond the depth) none."""
    offset = 1 if routed else DEPTH
    return mode.mod_transformer(VOCAB, DIM, DEPTH, HEADS, offset=offset, key=jax.random.key(0))


if __name__ == "__main__":
    timing.header()
    tokens = jax.random.randint(jax.random.key(1), (BATCH, TOKENS + 1), 0, VOCAB)
    variants, flops = {}, {}
    for name in ("dense", "routed"):
        model = decoder(routed=name == "routed")
        state = OPTIMIZER.init(eqx.filter(model, mode.is_trainable(model)))
        variants[name] = timing.compiled(training_step, model, state, tokens)
        flops[name] = mode.count_flops(training_step, model, state, tokens).total
    medians = timing.take_turns(variants)
    timing.report(
        f"training step, {DEPTH} layers, [{BATCH}, {TOKENS}, {DIM}]", medians, "dense", {}
    )
    flops_saved = 1 - flops["routed"] / flops["dense"]
    time_saved = 1 - medians["routed"] / medians["dense"]
    turned = time_saved / flops_saved
    print(f"  FLOPs saved {flops_saved:.1%}, time saved {time_saved:.1%}")
    print(f"  saved FLOPs that became saved time: {turned:.1%} (at least {LEAST:.0%})")
    sys.exit(0 if turned >= LEAST else 1)
