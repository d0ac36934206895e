"""One arm for a stated number of steps: the command `mode-lab train`, and what reads its folder."""

import dataclasses
import shlex
from functools import partial
from pathlib import Path
from typing import NamedTuple

import equinox as eqx
import jax
from jax.sharding import Mesh
from rich.console import Console

import mode
from mode.routing import count_parameters

from . import interrupts
from .arms import Arm, arm_named
from .checkpoint import Checkpoints, Notes, TrainSettings
from .commands import Training as Training
from .console import Watch, progress, say, say_progress
from .data import Corpus, held_out_batches, read_corpus
from .devices import by_lead, device_names, is_lead, on, with_shardings
from .evaluate import Evaluation, evaluate
from .files import FloatOrNaN, Record, read_record, write_record
from .folder import check_claim, check_out, check_same, claim, read_settings
from .options import absolute_glob
from .step import TrainState, begin
from .train import Progress, Saving, train


# Options that do not decide how a run goes. Which text it is, the fingerprint says.
_BESIDES = ("out", "data", "held_out", "save_every", "keep", "log_every", "devices")


class TrainResult(Record):
    """`result.json`: the held-out results, and losses and times as `Trained` has them."""

    format = "mode-lab train result"
    version = 3

    settings: TrainSettings
    evaluation: Evaluation
    losses: tuple[FloatOrNaN, ...]
    step_seconds: float
    seconds: float

    @property
    def arm(self) -> Arm:
        """The arm that was trained."""
        return arm_named(self.settings.options.arm)

    @property
    def held_out(self) -> str:
        """The held-out results in words."""
        bits, causal = self.evaluation.bits_top_k, self.evaluation.bits_causal
        text = f"held out {bits:.3f} bits per byte, causal {causal:.3f}"
        # Not at equal compute, the second number says little.
        far = [
            f"{router.compute_causal:.3f} slots per token, under top-k {router.compute_top_k:.3f}"
            for router in self.evaluation.routers
            if not 0.9 <= router.compute_causal / router.compute_top_k <= 1.1
        ]
        return f"{text} (causally its routers fill {', '.join(far)})" if far else text


class LoadedRun(NamedTuple):
    """A run of `mode-lab train` as its newest checkpoint has it."""

    settings: TrainSettings
    arm: Arm
    steps: int
    model: mode.Transformer


def run_training(training: Training, console: Console) -> None:
    """Trains from where the run stands to its last step, and evaluates.

    **Raises:** `ValueError` for bad settings, `FloatingPointError` for a loss that is not finite.
    """
    arm = arm_named(training.arm)
    check_out(training.out)
    corpus = read_corpus(training.data, length=training.size.length)
    with on(training.devices, batch=training.size.batch) as mesh:
        console.quiet = not is_lead()
        parameters = count_parameters(arm.shapes(training.size))
        say_progress(console, f"{device_names()}; {parameters:,} parameters; {corpus}.")
        tokens, every = training.size.batch * training.size.length, training.log_every
        with (
            progress(console, 1) as bars,
            bars.arm(arm.name, training.steps, tokens=tokens, log_every=every) as watch,
        ):
            result = train_arm(training, corpus, console, watch, mesh=mesh)
        say(console, f"{arm.name}: {result.held_out}, after {training.steps} steps.")
        if arm.samples:
            command = shlex.join(["mode-lab", "generate", "--checkpoint", str(training.out)])
            say_progress(console, f"To sample from it:\n    {command}")


def train_arm(
    training: Training, corpus: Corpus, console: Console, watch: Watch, *, mesh: Mesh | None = None
) -> TrainResult:
    """Trains in the folder of the options, from where the run stands, and saves its result."""
    arm, size, out = arm_named(training.arm), training.size, training.out
    like = _like(training, mesh)  # before anything is written: it finds sizes that do not fit
    options = dataclasses.replace(training, data=absolute_glob(training.data))
    settings = TrainSettings(options=options, corpus=corpus.fingerprint)
    check_claim(out, settings, besides=_BESIDES)
    checkpoints = Checkpoints(out / "checkpoints", training.keep)
    restored = checkpoints.newest(like, partial(say, console))
    start = None
    if restored is not None:  # of this run, even where its settings are missing
        step, state, notes = restored
        check_same(out, notes.settings, settings, besides=_BESIDES)
        start = Progress(state, notes.stream, list(notes.losses))
        say_progress(console, f"{arm.name}: goes on from step {step}.")
    by_lead(lambda: claim(out, settings, besides=_BESIDES))

    def save(now: Progress) -> None:
        step = len(now.losses)
        notes = Notes(settings=settings, stream=now.stream, losses=tuple(now.losses))
        checkpoints.save(step, now.state, notes)
        if training.save_every < training.steps:
            bits = f"{now.losses[-1]:.3f} bits per byte"
            say_progress(console, f"step {step} of {training.steps}, {bits}, saved")

    try:
        with interrupts.deferred():
            trained = train(
                arm,
                size,
                training.recipe,
                corpus.train,
                steps=training.steps,
                seed=training.seed,
                watch=watch,
                look=min(10, training.log_every),
                progress=start,
                saving=Saving(training.save_every, save, interrupts.received),
                mesh=mesh,
            )
    except FloatingPointError as error:
        last = f"of step {checkpoints.steps[-1]}" if checkpoints.steps else "not there yet"
        raise FloatingPointError(f"{error} The last checkpoint is {last}.") from None
    samples = held_out_batches(
        corpus.held_out, length=size.length, batch=size.batch, sequences=training.held_out
    )
    key = jax.random.fold_in(jax.random.key(training.seed), 1)
    evaluation = evaluate(arm, trained.model, samples, key=key, mesh=mesh)
    result = TrainResult(
        settings=settings,
        evaluation=evaluation,
        losses=tuple(trained.losses),
        step_seconds=trained.step_seconds,
        seconds=trained.seconds,
    )
    by_lead(lambda: write_record(out / "result.json", result))
    return result


def load_result(out: Path, settings: TrainSettings) -> TrainResult | None:
    """The result of a run with these settings; `None` where it is not finished.

    **Raises:** `ValueError` where it is damaged or of a run with other settings.
    """
    path = out / "result.json"
    if not path.exists():
        return None
    result = read_record(path, TrainResult)
    check_same(path, result.settings, settings, besides=_BESIDES)
    return result


def _like(training: Training, mesh: Mesh | None) -> TrainState:
    """The shapes of the run's state, and their shardings."""
    settings = (arm_named(training.arm), training.size, training.recipe)
    return with_shardings(eqx.filter_eval_shape(begin, *settings, seed=training.seed), mesh)


def load_run(folder: Path, console: Console) -> LoadedRun:
    """Loads a run of `mode-lab train`, or an arm of an ablation, from its newest checkpoint.

    **Raises:** `ValueError` where `folder` is not that of a run, or holds no checkpoint.
    """
    settings = read_settings(folder, TrainSettings)
    checkpoints, like = Checkpoints(folder / "checkpoints", keep=1), _like(settings.options, None)
    restored = checkpoints.newest(like, partial(say, console))
    if restored is None:
        raise ValueError(
            f"`checkpoint` must hold a checkpoint, got {folder}, where none was saved yet. "
            "`mode-lab train` saves one every `--save-every` steps."
        )
    step, state, notes = restored
    check_same(folder, notes.settings, settings, besides=_BESIDES)
    return LoadedRun(settings, arm_named(settings.options.arm), step, state.model)
