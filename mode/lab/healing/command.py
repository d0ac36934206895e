"""The commands `mode-lab convert` and `mode-lab heal`."""

import dataclasses
from functools import partial
from pathlib import Path

import jax
import pandas as pd
from matplotlib.figure import Figure
from rich.console import Console

import mode
from mode.pretrained._convert import check_layers
from mode.pretrained._receipt import logit_difference

from ..console import say, say_progress
from ..corpus import Corpus, read_corpus
from ..data import Batch, batches, held_out_batches
from ..evaluate import held_out_loss
from ..figures import BLUE, GREY, PAGE, save_figure
from ..files import write_record, write_text
from ..folder import check_out, claim
from ..options import absolute_glob, command_line
from ..tables import to_console, to_markdown, write_tables
from .arm import BESIDES, heal_arm, make_source
from .choose import LayerWorth, measure_layers, propose_layers
from .documents import start_token, tokenize
from .options import ARM_TEXTS, Converting, Healing
from .records import HealResult, HealSettings, LayersRecord


def run_converting(options: Converting, console: Console) -> None:
    """Measures layers, proposes some, and says what routing them changes.

    **Raises:** `ValueError` where neither layers nor `--choose` are given, and for bad input.
    """
    if not (options.layers or options.choose):
        raise ValueError(
            "`layers` must name at least one layer, or be chosen by `--choose`, got neither."
        )
    check_out(options.out)
    shapes = mode.pretrained.load_shapes(options.model)
    if options.layers:
        check_layers(options.layers, shapes.depth)
    corpus = _corpus(options.model, options.data, options.length)
    model = mode.pretrained.load(options.model)
    sizes = {"length": options.length, "batch": options.sequences, "sequences": options.sequences}
    (sample,) = held_out_batches(corpus.held_out, **sizes)[:1]
    # Layers are chosen on text to train on: what is held out judges the choice.
    seen = Batch.of(
        next(batches(corpus.train, length=options.length, batch=options.sequences, seed=0))
    )
    worths: list[LayerWorth] = []
    whole_loss = 0.0
    layers = list(options.layers)
    if options.choose:
        say_progress(console, f"{shapes.depth} layers, each left out in turn...")
        whole_loss, worths = measure_layers(model, seen)
        if not layers:
            layers = propose_layers(
                model, worths, capacity=options.capacity, form=options.form, save=options.save
            )
        table = _worth_table(worths, whole_loss, layers)
        console.print(to_console(table, {"cosine": ".3f", "nats lost without it": "+.3f"}))
    dense, *_ = held_out_loss(model, [sample], jax.random.key(0))
    settings = {
        "capacity": options.capacity,
        "form": options.form,
        "key": jax.random.key(options.seed),
    }
    routed = mode.pretrained.convert(model, layers, **settings)
    whole = mode.pretrained.convert(model, layers, **{**settings, "capacity": 1})
    same = float(logit_difference(model, whole, seen.inputs[:1]))
    receipt = mode.pretrained.compare(model, routed, seen.inputs[:1])
    converted, *_ = held_out_loss(routed, [sample], jax.random.key(0))
    say(console, f"At capacity 1, {same:.1e} of the logits' norm changes. At {options.capacity:g}:")
    say(console, str(receipt))
    say(console, f"Held out: {dense:.3f} nats per token before, {converted:.3f} after, untrained.")
    options.out.mkdir(parents=True, exist_ok=True)
    record = LayersRecord(
        options=dataclasses.replace(options, data=absolute_glob(options.data)),
        corpus=corpus.fingerprint,
        dense=dense,
        converted=converted,
        layers=tuple(layers),
        cosines=tuple(worth.cosine for worth in worths) or None,
        losses_without=tuple(worth.loss_without for worth in worths) or None,
    )
    write_record(options.out / "layers.json", record)
    if worths:
        save_figure(partial(_draw, worths, whole_loss, layers), options.out / "layers.png")
    heal = Healing(
        options.model,
        tuple(layers),
        data=options.data,
        form=options.form,
        capacity=options.capacity,
    )
    usual = Healing(Path(), ())
    say_progress(console, f"To train it:\n    {command_line('heal', heal, defaults=usual)}")


def _worth_table(worths: list[LayerWorth], dense: float, layers: list[int]) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "layer": [str(worth.layer) for worth in worths],
            "cosine": [worth.cosine for worth in worths],
            "nats lost without it": [worth.loss_without - dense for worth in worths],
            "routed": ["yes" if worth.layer in layers else "" for worth in worths],
        }
    )


def _draw(worths: list[LayerWorth], dense: float, layers: list[int]) -> Figure:
    """Bars of what each layer is worth; those that are routed in blue."""
    figure = Figure(figsize=(PAGE, 2.4), layout="constrained")
    axes = figure.subplots(1, 2)
    numbers = [worth.layer for worth in worths]
    colours = [BLUE if number in layers else GREY for number in numbers]
    axes[0].bar(numbers, [worth.loss_without - dense for worth in worths], color=colours)
    axes[0].set(xlabel="layer", ylabel="nats lost without it", yscale="symlog")
    axes[0].set_title("Blue: routed")
    axes[1].bar(numbers, [1 - worth.cosine for worth in worths], color=colours)
    axes[1].set(xlabel="layer", ylabel="1 - cosine of input and output")
    return figure


def run_healing(options: Healing, console: Console) -> None:
    """Trains the arms in turn and prints their table.

    **Raises:** `ValueError` for bad input; `FloatingPointError` for a loss that is not finite.
    """
    unknown = sorted(set(options.arms) - set(ARM_TEXTS))
    if unknown or not options.arms:
        raise ValueError(f"`arms` must be of {', '.join(ARM_TEXTS)}, got {', '.join(unknown)}.")
    check_out(options.out)
    if not options.layers:
        raise ValueError("`layers` must name at least one layer. `mode-lab convert --choose` does.")
    check_layers(options.layers, mode.pretrained.load_shapes(options.model).depth)
    corpus = _corpus(options.model, options.data, options.length)
    settings = HealSettings(
        options=dataclasses.replace(options, data=absolute_glob(options.data)),
        corpus=corpus.fingerprint,
    )
    claim(options.out, settings, besides=BESIDES)
    dense = mode.pretrained.load(options.model)
    source = make_source(dense, corpus, settings)
    text = f"{len(corpus.train.names)} files to train on ({len(corpus.train.tokens):,} tokens)"
    loss = f"{source.dense_loss:.3f} nats per token"
    say_progress(console, f"{text}, {len(corpus.held_out.names)} held out. Dense: {loss}.")
    results = [heal_arm(source, arm, options.out / arm, console) for arm in options.arms]
    table, formats = _result_table(results)
    console.print(to_console(table, formats))
    text = f"`{command_line('heal', options, defaults=Healing(Path(), ()))}`\n\n"
    write_text(options.out / "report.md", text + to_markdown(table, formats) + "\n")
    write_tables(options.out / "report.json", {"arms": table})


def _result_table(results: list[HealResult]) -> tuple[pd.DataFrame, dict[str, str]]:
    """Held-out losses of all arms, over that of the dense model."""

    def above(name: str) -> list[float | None]:
        losses = [getattr(result, name) for result in results]
        pairs = zip(losses, results, strict=True)
        return [None if loss is None else loss - result.dense for loss, result in pairs]

    sizes = [(len(r.losses), r.settings.options) for r in results]
    rows = {
        "arm": ["dense", *(result.arm for result in results)],
        "FLOPs": [1.0, *(result.flops / result.flops_dense for result in results)],
        "converted": [0.0, *above("converted")],
        "routers alone": [None, *above("routers")],
        "healed": [0.0, *above("healed")],
        "causal": [None, *above("causal")],
        "selected causally": [None, *(result.capacity_causal for result in results)],
        "tokens": [0, *(steps * options.batch * options.length for steps, options in sizes)],
    }
    nats = dict.fromkeys(("converted", "routers alone", "healed", "causal"), "+.3f")
    return pd.DataFrame(rows), {**nats, "FLOPs": ".3f", "selected causally": ".2f", "tokens": ",d"}


def _corpus(model: Path, data: str | None, length: int) -> Corpus:
    tokenizer = mode.pretrained.load_tokenizer(model)
    corpus = tokenize(read_corpus(data, length=length), tokenizer, start_token(tokenizer))
    for side in (corpus.train, corpus.held_out):
        if len(side.tokens) <= length:
            raise ValueError(
                f"`data` must fill a sequence of length={length} on both sides, got "
                f"{len(side.tokens)} tokens on one. Give more text or a smaller `--length`."
            )
    return corpus
