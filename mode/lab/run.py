"""One arm for a stated number of steps: the command `mode-lab train`, and what reads its folder."""

import dataclasses
import math
import shlex
from pathlib import Path
from typing import Annotated, Any

import equinox as eqx
import jax
import tyro
from jax.sharding import Mesh
from rich.console import Console

import mode

from .arms import NAMES, Arm, Size, arms_named
from .checkpoint import Checkpoints
from .data import Corpus, held_out_batches, read_corpus
from .devices import Devices, by_lead, laid_out, leads, on
from .evaluate import Evaluation, evaluate
from .files import claim, read_settings, write_json
from .progress import progress
from .step import Recipe, TrainState, begin
from .train import Progress, Saving, Trained, train


@dataclasses.dataclass(frozen=True)
class Training:
    """Train one arm on bytes of real text, with checkpoints to generate from.

    A run that was interrupted at any moment goes on where it stood: the same command, and the same
    losses as without the interruption.
    """

    out: Path = Path("runs/train")
    """Folder of the run. One of another configuration is refused."""
    arm: Annotated[
        str, tyro.conf.arg(help=f"What to train: {', '.join(NAMES)}; see `mode-lab ablate -h`.")
    ] = "mod"
    steps: int = 1000
    """Optimizer steps; the learning rate ends with the last."""
    data: str | None = None
    """Files to train on, a quoted glob such as "texts/**/*.txt". By default the source of the
    Python standard library."""
    seed: int = 0
    """Of parameters, data order and random routing."""
    held_out: int = 512
    """Sequences to evaluate on at the end, at most."""
    save_every: int = 100
    """Steps between two checkpoints; there is one of the last step as well."""
    keep: int = 3
    """How many checkpoints to keep, the newest."""
    devices: Devices = dataclasses.field(default_factory=Devices)
    size: Size = dataclasses.field(default_factory=Size)
    recipe: Recipe = dataclasses.field(default_factory=Recipe)

    def settings(self) -> dict[str, Any]:
        """What decides how the run goes."""
        settings = dataclasses.asdict(self)
        aside = ("out", "held_out", "save_every", "keep", "devices")
        return {name: settings[name] for name in settings if name not in aside}


def run_training(training: Training, console: Console) -> None:
    """Train from where the run stands to its last step, and evaluate.

    **Raises:** `ValueError` for bad settings, `FloatingPointError` for a loss that is not finite.
    """
    if training.arm not in NAMES:
        raise ValueError(f"`arm` must be one of {', '.join(NAMES)}, got {training.arm!r}.")
    (arm,) = arms_named([training.arm])
    for name, least in (("steps", 2), ("held_out", 1), ("save_every", 1), ("keep", 1)):
        if getattr(training, name) < least:
            raise ValueError(f"`{name}` must be at least {least}, got {getattr(training, name)}.")
    corpus = read_corpus(training.data, length=training.size.length)
    with on(training.devices, batch=training.size.batch) as mesh:
        console.quiet = not leads()
        _run(arm, training, corpus, mesh, console)


def _run(arm: Arm, training: Training, corpus: Corpus, mesh: Mesh | None, console: Console) -> None:
    like = _like(arm, training, mesh)  # before anything is written: it finds sizes that do not fit
    by_lead(lambda: claim(training.out, {**training.settings(), "corpus": corpus.fingerprint}))
    checkpoints = Checkpoints(training.out / "checkpoints", training.keep)
    stood = _restored(like, checkpoints, console, set_aside=True)
    if stood is not None:
        console.print(f"{arm.name}: goes on from step {len(stood.losses)}.", highlight=False)

    def save(now: Progress) -> None:
        step = len(now.losses)
        checkpoints.save(step, now.state, {"stream": now.stream, "losses": now.losses})
        console.print(
            f"step {step} of {training.steps}, {now.losses[-1]:.3f} bits per byte, saved",
            highlight=False,
        )

    with (
        progress(console, 1) as bars,
        bars.arm(arm.name, training.steps) as watch,
    ):
        try:
            trained = train(
                arm,
                training.size,
                training.recipe,
                corpus.train,
                steps=training.steps,
                seed=training.seed,
                watch=watch,
                progress=stood,
                saving=Saving(training.save_every, save),
                mesh=mesh,
            )
        except FloatingPointError as error:
            last = f"of step {checkpoints.steps[-1]}" if checkpoints.steps else "not there yet"
            raise FloatingPointError(f"{error} The last checkpoint is {last}.") from None
    found = _evaluated(arm, training, corpus, trained.model, mesh)
    by_lead(lambda: _report(arm, training, found, trained, console))


def _report(
    arm: Arm, training: Training, found: Evaluation, trained: Trained, console: Console
) -> None:
    write_json(
        training.out / "result.json",
        {
            **dataclasses.asdict(found),
            "losses": [loss if math.isfinite(loss) else None for loss in trained.losses],
            "arm": arm.name,
        },
    )
    console.print(
        f"{arm.name}: held out {found.bits_top_k:.3f} bits per byte, causal "
        f"{found.bits_causal:.3f}, after {training.steps} steps.",
        highlight=False,
    )
    if arm.samples:
        command = shlex.join(["mode-lab", "generate", "--checkpoint", str(training.out)])
        console.print(f"To sample from it:\n    {command}", highlight=False)


def _like(arm: Arm, training: Training, mesh: Mesh | None) -> TrainState:
    """The shapes of the run's state, and where they lie."""
    like = eqx.filter_eval_shape(
        begin, arm, training.size, training.recipe, steps=training.steps, seed=training.seed
    )
    return laid_out(like, mesh)


def _restored(
    like: TrainState, checkpoints: Checkpoints, console: Console, *, set_aside: bool
) -> Progress | None:
    def warn(text: str) -> None:
        console.print(text, highlight=False)

    found = checkpoints.newest(like, warn, set_aside=set_aside)
    if found is None:
        return None
    _, state, notes = found
    return Progress(state, notes["stream"], notes["losses"])


def _evaluated(
    arm: Arm, training: Training, corpus: Corpus, model: mode.Transformer, mesh: Mesh | None
) -> Evaluation:
    samples = held_out_batches(
        corpus.held_out,
        length=training.size.length,
        batch=training.size.batch,
        sequences=training.held_out,
    )
    key = jax.random.fold_in(jax.random.key(training.seed), 1)
    return evaluate(arm, model, samples, key=key, mesh=mesh)


def load_run(folder: Path, console: Console) -> tuple[Arm, Size, int, mode.Transformer]:
    """What a run stands at: its arm and size, the steps taken, and the model.

    **Raises:** `ValueError` where `folder` is not that of a run, or holds no checkpoint.
    """
    settings = read_settings(folder)
    if "arm" not in settings:
        raise ValueError(
            f"`checkpoint` must be the folder of `mode-lab train`, got {folder}, an ablation's."
        )
    fields = {field.name for field in dataclasses.fields(Training)}
    kept = {name: value for name, value in settings.items() if name in fields}
    training = Training(
        **{**kept, "size": Size(**kept["size"]), "recipe": Recipe(**kept["recipe"])}
    )
    (arm,) = arms_named([training.arm])
    stood = None
    if (folder / "checkpoints").is_dir() and any((folder / "checkpoints").iterdir()):
        checkpoints = Checkpoints(folder / "checkpoints", training.keep)
        stood = _restored(_like(arm, training, None), checkpoints, console, set_aside=False)
    if stood is None:
        raise ValueError(
            f"`checkpoint` must hold a checkpoint, got {folder}, where none was saved yet. "
            "`mode-lab train` saves one every `--save-every` steps."
        )
    return arm, training.size, len(stood.losses), stood.state.model
