"""The ablation: every arm in turn, at equal training FLOPs, and a report of those that finished."""

import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import tyro
from rich.console import Console

from .arms import NAMES, Arm, Size, arms_help, arms_named
from .budget import (
    flops_per_step,
    forward_flops_per_token,
    parameter_count,
    steps_for,
    training_budget,
)
from .data import Corpus, Sample, held_out_batches, read_corpus
from .evaluate import evaluate, routing_sample
from .files import claim, read_settings
from .progress import progress
from .report import write_report
from .step import Recipe
from .store import ArmResult, load_result, save_arm
from .train import Watch, train


@dataclasses.dataclass(frozen=True)
class Ablation:
    """Train routing arms on bytes of real text at equal training FLOPs, and compare them.

    A run that was interrupted goes on where it stood: the same command skips finished arms.
    """

    out: Path = Path("runs/ablation")
    """Folder for results. One of another configuration is refused."""
    data: str | None = None
    """Files to train on, a quoted glob such as "texts/**/*.txt". By default the source of the
    Python standard library."""
    budget: float = 1.0
    """Training FLOPs of every arm, as a multiple of the default, which takes all eight arms of the
    default size 6 to 10 minutes on two cores. Time grows with it in proportion."""
    arms: Annotated[tuple[str, ...], tyro.conf.arg(help=arms_help(), metavar="ARM ...")] = NAMES
    seed: int = 0
    """Of parameters, data order and random routing."""
    held_out: int = 512
    """Sequences to evaluate on, at most."""
    size: Size = dataclasses.field(default_factory=Size)
    recipe: Recipe = dataclasses.field(default_factory=Recipe)

    def settings(self) -> dict[str, Any]:
        """What must be equal for two arms to be compared: all but the folder and the choice."""
        settings = dataclasses.asdict(self)
        return {name: settings[name] for name in settings if name not in ("out", "arms")}


@dataclasses.dataclass(frozen=True)
class Rereport:
    """Write the report of a finished or interrupted ablation or sweep again, without training."""

    out: Path = Path("runs/ablation")
    """The folder of the run."""


def run_ablation(ablation: Ablation, console: Console) -> None:
    """Train what is not finished, save each arm before the next begins, and report.

    **Raises:** `ValueError` for bad settings, `FloatingPointError` for a loss that is not finite.
    """
    arms = arms_named(ablation.arms)
    if ablation.held_out < 1:
        raise ValueError(f"`held_out` must be at least 1 sequence, got {ablation.held_out}.")
    budget = training_budget(ablation.budget, ablation.size)
    costs = {arm.name: flops_per_step(arm, ablation.size) for arm in arms}
    steps = {arm.name: steps_for(arm, budget, costs[arm.name]) for arm in arms}
    corpus = read_corpus(ablation.data, length=ablation.size.length)
    claim(ablation.out, {**ablation.settings(), "corpus": corpus.fingerprint})
    samples = held_out_batches(
        corpus.held_out,
        length=ablation.size.length,
        batch=ablation.size.batch,
        sequences=ablation.held_out,
    )
    console.print(
        f"{len(corpus.train.names)} files to train on ({len(corpus.train.tokens):,} bytes), "
        f"{len(corpus.held_out.names)} held out; {budget:.3g} training FLOPs for every arm.",
        highlight=False,
    )
    pending = [arm for arm in arms if load_result(ablation.out, arm.name) is None]
    for arm in arms:
        if arm not in pending:
            console.print(f"{arm.name}: finished before, kept.", highlight=False)
    with progress(console, len(pending)) as bars:
        for arm in pending:
            with bars.arm(arm.name, steps[arm.name]) as watch:
                result = _run_arm(
                    arm, ablation, corpus, samples, costs[arm.name], steps[arm.name], watch
                )
            console.print(
                f"{arm.name}: {result.steps} steps in {result.seconds:.0f} s, held out "
                f"{result.bits_top_k:.3f} bits per byte, causal {result.bits_causal:.3f}.",
                highlight=False,
            )
    report(ablation.out, console)


def _run_arm(
    arm: Arm,
    ablation: Ablation,
    corpus: Corpus,
    samples: list[Sample],
    step_flops: int,
    steps: int,
    watch: Watch,
) -> ArmResult:
    size = ablation.size
    trained = train(
        arm, size, ablation.recipe, corpus.train, steps=steps, seed=ablation.seed, watch=watch
    )
    key = jax.random.fold_in(jax.random.key(ablation.seed), 1)
    found = evaluate(arm, trained.model, samples, key=key)
    result = ArmResult(
        name=arm.name,
        description=arm.description,
        parameters=parameter_count(trained.model),
        forward_flops=forward_flops_per_token(arm, size),
        step_flops=step_flops,
        steps=steps,
        step_seconds=trained.step_seconds,
        seconds=trained.seconds,
        bits_top_k=found.bits_top_k,
        bits_causal=found.bits_causal,
        bytes=found.bytes,
        routers=found.routers,
        losses=tuple(round(loss, 5) for loss in trained.losses),
        change=arm.change(steps),
    )
    sample = routing_sample(arm, trained.model, samples, key=key)
    save_arm(ablation.out, result, trained.model, sample)
    return result


def report(out: Path, console: Console) -> None:
    """The table and the files of all arms that finished in `out`.

    **Raises:** `ValueError` where there is no run, or no arm has finished.
    """
    settings = read_settings(out)
    results = [result for name in NAMES if (result := load_result(out, name)) is not None]
    if not results:
        raise ValueError(
            f"`out` must hold at least one finished arm, got {out}. Run "
            f"`{command_of(settings, out)}` to train them."
        )
    command = command_of(settings, out, [result.name for result in results])
    write_report(out, results, settings, command, console)


def command_of(settings: dict[str, Any], out: Path, arms: Sequence[str] = NAMES) -> str:
    """The command that makes a run of these arms with these settings."""
    words = ["mode-lab", "ablate", "--out", str(out)]
    if tuple(arms) != NAMES:
        words += ["--arms", *arms]
    default = Ablation().settings()
    for name, value in settings.items():
        if isinstance(value, dict):
            for inner, setting in value.items():
                if setting == default[name].get(inner):
                    continue
                flag = inner.replace("_", "-")
                if isinstance(setting, bool):
                    words += [f"--{name}.{'' if setting else 'no-'}{flag}"]
                else:
                    words += [f"--{name}.{flag}", str(setting)]
        elif name in default and value != default[name]:
            words += [f"--{name.replace('_', '-')}", str(value)]
    return shlex.join(words)
