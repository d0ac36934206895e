"""What makes a router learn: one factor at a time, on tasks with known answers and on text.

Every variant differs from the default in what its name says. A finished run is a line of a file and
is not repeated. Losses on text are those of every tenth document of the training text, which these
runs do not train on: no held-out text is read. Recovery is that of `mode.lab.recovery`.

    python benchmarks/evidence/routers.py --bench recall --seeds 5 --out runs/routers.jsonl
    python benchmarks/evidence/routers.py --bench text --seeds 5 --variants default random dense ...
    python benchmarks/evidence/routers.py --table --out runs/routers.jsonl
"""

import dataclasses
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import tyro
from jaxtyping import Array, PRNGKeyArray

import mode
from mode.lab.commands import TASK_RECIPE
from mode.lab.data import Batch, Documents, batches, held_out_batches, read_corpus
from mode.lab.intervals import Interval
from mode.lab.options import Recipe, Size
from mode.lab.recovery import recoveries
from mode.lab.step import next_byte_loss
from mode.lab.tables import to_markdown
from mode.lab.tasks.arms import CONTROLS, TaskSize, build, train_and_score
from mode.lab.tasks.fit import fit
from mode.lab.tasks.sequences import task_named
from mode.routing import Routings


class Softplus(mode.AbstractGate):
    """The weight is the softplus of the logit."""

    def scores(self, logits: Array) -> Array:
        return logits

    def __call__(self, logits: Array, selected: Array) -> Array:
        return jax.nn.softplus(logits[..., : selected.shape[-1]])


class OnePlus(mode.AbstractGate):
    """The weight is 1 plus the logit: an undecided router adds the whole update."""

    def scores(self, logits: Array) -> Array:
        return logits

    def __call__(self, logits: Array, selected: Array) -> Array:
        return 1 + logits[..., : selected.shape[-1]]


class Perturbed(mode.AbstractSelector):
    """Top-k of scores that are changed in training alone: where there is a key."""

    change: Callable[[mode.RoutingInputs, PRNGKeyArray], Array] = eqx.field(static=True)
    is_causal = False
    max_capacity = None

    def __call__(self, inputs: mode.RoutingInputs, *, key: Any = None) -> mode.Assignment:
        if key is not None:
            inputs = dataclasses.replace(inputs, scores=self.change(inputs, key))
        return mode.ExpertChoice()(inputs)


def noise(inputs: mode.RoutingInputs, key: PRNGKeyArray) -> Array:
    """Scores with Gumbel noise of scale 0.3."""
    return inputs.scores + 0.3 * jax.random.gumbel(key, inputs.scores.shape, inputs.scores.dtype)


def random_slots(inputs: mode.RoutingInputs, key: PRNGKeyArray) -> Array:
    """Scores by which about a quarter of the slots goes to random tokens."""
    drawn = jax.random.uniform(key, inputs.scores.shape, inputs.scores.dtype)
    chance = 0.25 * inputs.slots / inputs.num_tokens
    return jnp.where(drawn < chance, 1e9 * (1 + drawn), inputs.scores)


class Scorer(eqx.Module):
    """A router's linear map, of a normed input, or one that learns `factor` times as fast."""

    linear: mode.Linear
    norm: mode.RMSNorm | None
    factor: float = eqx.field(static=True)

    def __call__(self, x: Array) -> Array:
        return self.factor * self.linear(x if self.norm is None else self.norm(x))


@dataclasses.dataclass(frozen=True)
class Variant:
    """A routed layer and how it is trained; `arm` is one of those of the tasks."""

    arm: str = "learned"
    select: mode.AbstractSelector | None = None
    gate: mode.AbstractGate = dataclasses.field(default_factory=mode.AbsoluteGate)
    weigh_values: bool = True
    std: float = 1.0  # times dim ** -0.5
    rate: float = 1.0  # the router's learning rate, times that of the rest
    normed: bool = False
    recipe: dict[str, float] = dataclasses.field(default_factory=dict)
    square: float = 0.0  # the coefficient of the squared logit

    def layer(
        self, block: Callable, dim: int, capacity: mode.Capacity, *, key: PRNGKeyArray
    ) -> mode.MixtureOfDepths:
        """Builds the routed layer."""
        select = mode.ExpertChoice() if self.select is None else self.select
        layer = mode.MixtureOfDepths(
            block,
            dim,
            capacity,
            select=select,
            gate=self.gate,
            weigh_values=self.weigh_values,
            router_std=self.std * dim**-0.5 / self.rate,
            key=key,
        )
        norm = mode.RMSNorm(dim) if self.normed else None
        scorer = Scorer(layer.router.scorer, norm, self.rate)  # pyright: ignore
        return eqx.tree_at(lambda m: m.router.scorer, layer, scorer)

    def squared_cost(self, routings: Routings) -> Array:
        """The cost of squared logits."""
        squares = [self.square * mode.router_z_loss(routing) for routing in routings]
        return jnp.mean(jnp.stack(squares)) if squares else jnp.zeros(())


_EQUATION = {"gate": mode.IdentityGate(), "weigh_values": False}
VARIANTS = {
    "default": Variant(),
    "dense": Variant("dense"),
    "left-out": Variant("left-out"),
    "oracle": Variant("oracle"),
    "random": Variant("random"),
    "strided": Variant("strided"),
    "equation 1 as first shipped": Variant(**_EQUATION, std=0.16, recipe={"router_cost": 0.0}),
    "equation 1": Variant(**_EQUATION),
    "equation 1, squared cost": Variant(**_EQUATION, recipe={"router_cost": 0.0}, square=0.01),
    "raw gate": Variant(gate=mode.IdentityGate()),
    "values not weighed": Variant(weigh_values=False),
    "no cost": Variant(recipe={"router_cost": 0.0}),
    "cost 0.01": Variant(recipe={"router_cost": 0.01}),
    "cost 0.1": Variant(recipe={"router_cost": 0.1}),
    "squared cost 0.01": Variant(recipe={"router_cost": 0.0}, square=0.01),
    "squared cost 0.03": Variant(recipe={"router_cost": 0.0}, square=0.03),
    "sigmoid": Variant(gate=mode.SigmoidGate()),
    "twice sigmoid": Variant(gate=mode.SigmoidGate(2.0)),
    "softplus": Variant(gate=Softplus()),
    "1 + logit": Variant(gate=OnePlus()),
    "no ramp": Variant(recipe={"ramp": 0.0}),
    "ramp 0.1": Variant(recipe={"ramp": 0.1, "ramp_stages": 1}),
    "ramp 0.3 in 3": Variant(recipe={"ramp": 0.3, "ramp_stages": 3}),
    "noise for the ramp": Variant(select=Perturbed(noise), recipe={"ramp": 0.0}),
    "random slots for the ramp": Variant(select=Perturbed(random_slots), recipe={"ramp": 0.0}),
    "half the std": Variant(std=0.5),
    "twice the std": Variant(std=2.0),
    "router rate x 0.2": Variant(rate=0.2),
    "router rate x 5": Variant(rate=5.0),
    "normed input": Variant(normed=True),
    "no weight decay": Variant(recipe={"weight_decay": 0.0}),
    "random, values not weighed": Variant("random", weigh_values=False),
    "random, no cost": Variant("random", recipe={"router_cost": 0.0}),
}


def text_run(variant: Variant, seed: int, steps: int, rate: float) -> dict[str, Any]:
    """Trains on text, 6 layers of 64 features with every other routed, and tests."""
    size, recipe = Size(), dataclasses.replace(Recipe(learning_rate=rate), **variant.recipe)
    train, test = split(read_corpus(None, length=size.length).train)
    stream = batches(train, length=size.length, batch=size.batch, seed=seed)
    samples = jax.tree.map(lambda *x: np.stack(x), *[next(stream) for _ in range(steps)])
    model_key, run_key = jax.random.split(jax.random.key(seed))

    sizes = {"vocab": size.vocab, "capacity": size.capacity, "repeats": size.depth // 2}
    model = build(
        variant.arm, TaskSize(size.dim, size.heads), variant.layer, **sizes, key=model_key
    )

    def objective(model: Any, sample: Any, key: PRNGKeyArray) -> Any:
        loss, routings = next_byte_loss(model, Batch.of(sample), key)
        return loss + variant.squared_cost(routings), routings

    model = fit(model, objective, samples, recipe, key=run_key)
    tests = held_out_batches(test, length=size.length, batch=size.batch, sequences=512)

    @eqx.filter_jit
    def loss(model: Any, sample: Any, key: Any) -> Array:
        return next_byte_loss(model, Batch.of(sample), key)[0]

    is_control = variant.arm in CONTROLS
    keys = [jax.random.fold_in(run_key, i) if is_control else None for i in range(len(tests))]
    losses = [float(loss(model, sample, key)) for sample, key in zip(tests, keys, strict=True)]
    return {"bits": round(float(np.mean(losses)) / math.log(2), 5)}


def split(documents: Documents) -> tuple[Documents, Documents]:
    """Splits training documents: every tenth is to test on."""
    bounds = [*documents.starts, len(documents.tokens)]

    def some(numbers: Sequence[int]) -> Documents:
        parts = [documents.tokens[bounds[i] : bounds[i + 1]] for i in numbers]
        names = tuple(documents.names[i] for i in numbers)
        return Documents(names, np.concatenate(parts), np.cumsum([0, *map(len, parts)])[:-1])

    numbers = range(len(documents.names))
    return some([i for i in numbers if i % 10 != 9]), some([i for i in numbers if i % 10 == 9])


def task_run(name: str, variant: Variant, seed: int, steps: int | None) -> dict[str, Any]:
    """Trains and tests on a task."""
    task, recipe = task_named(name), dataclasses.replace(TASK_RECIPE, **variant.recipe)
    top_k, causal = train_and_score(
        task,
        variant.arm,
        recipe,
        steps=steps or task.steps,
        seed=seed,
        make_routed=variant.layer,
        auxiliary=variant.squared_cost,
    )
    last = top_k if causal is None else causal
    return {"top-k": top_k.accuracy, "accuracy": last.accuracy, **last.hits}


@dataclasses.dataclass(frozen=True)
class Options:
    """What makes a router learn."""

    bench: Literal["recall", "s3", "s5", "copy", "arithmetic", "text"] = "recall"
    variants: tuple[str, ...] = tuple(VARIANTS)
    seeds: int = 5
    first_seed: int = 0
    steps: int | None = None
    """By default those of the task; 1500 on text."""
    rate: float = 1e-2
    """Learning rate on text."""
    out: Path = Path("runs/routers.jsonl")
    table: bool = False
    """Print tables of what is there, and train nothing."""


def main(options: Options) -> None:
    """Trains what is missing, or prints tables."""
    options.out.parent.mkdir(parents=True, exist_ok=True)
    lines = options.out.read_text().splitlines() if options.out.exists() else []
    rows = [json.loads(line) for line in lines]
    if options.table:
        print("\n\n".join(tables(pd.DataFrame(rows))))
        return
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        for name in options.variants:
            run = {"bench": options.bench, "variant": name, "seed": seed, "steps": options.steps}
            run |= {"rate": options.rate} if options.bench == "text" else {}
            if any(run.items() <= row.items() for row in rows):
                continue
            start = time.perf_counter()
            if options.bench == "text":
                got = text_run(VARIANTS[name], seed, options.steps or 1500, options.rate)
            else:
                got = task_run(options.bench, VARIANTS[name], seed, options.steps)
            row = run | got | {"seconds": round(time.perf_counter() - start, 1)}
            with options.out.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(json.dumps(row), flush=True)
            jax.clear_caches()


def tables(frame: pd.DataFrame) -> list[str]:
    """Makes a table for each bench: means and intervals over seeds, and recoveries on text."""
    texts = []
    for keys, part in frame.groupby(["bench", "steps", "rate"], dropna=False):
        name = " ".join(str(key) for key in keys if key == key and key is not None)
        wide = part.pivot_table(index="seed", columns="variant", values="bits", dropna=False)
        rows = []
        for variant in [name for name in VARIANTS if name in set(part["variant"])]:
            own = part[part["variant"] == variant]
            row = {"variant": variant, "seeds": len(own)}
            if keys[0] == "text":
                row["bits per byte"] = Interval.of(own["bits"]).text(".4f")
                if {"dense", "left-out"} <= set(wide):
                    gains = recoveries(wide)[variant].dropna()
                    row["recovery, %"] = Interval.of(100 * gains).text("+.0f")
            else:
                row["accuracy"] = Interval.of(own["accuracy"]).text(".3f")
                row["each"] = " ".join(f"{a:.2f}" for a in own.sort_values("seed")["accuracy"])
                classes = task_named(str(keys[0])).classes
                for kind in classes if own[list(classes)].notna().all(axis=None) else ():
                    row[kind] = f"{own[kind].mean():.2f}"
            rows.append(row)
        texts.append(f"## {name}\n\n{to_markdown(pd.DataFrame(rows))}")
    return texts


if __name__ == "__main__":
    main(tyro.cli(Options))
