"""`mode-lab generate`: text from what a run leaves behind."""

import io
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest

import mode
from mode.lab import generate, run
from tests.lab.helpers import quiet, said
from tests.lab.runs import training


def generated(out: Path, **options: Any) -> tuple[bytes, str]:
    stream, console = io.BytesIO(), quiet()
    generate.run_generation(generate.Generating(out, **options), console, stream.write)
    return stream.getvalue(), said(console)


def test_text_comes_from_the_newest_checkpoint(whole: Path) -> None:
    """The text of `mode.generate` on the causal model, a report of compute, and its picture."""
    text, report = generated(whole, prompt="line ", steps=40, temperature=0.0)
    model = run.load_run(whole, quiet()).model
    prompt = jnp.array([[256, *b"line "]])
    made = mode.generate(mode.make_causal(model), prompt, steps=40, stop_token=256)
    expected = bytes(token for token in made.tokens[0].tolist() if token != 256)
    assert text == b"line " + expected
    assert f"{int(made.lengths[0])} bytes" in report
    assert "a second" in report
    assert "0.125" in report
    assert (whole / "generated.png").read_bytes().startswith(b"\x89PNG")


def test_sampling_is_keyed(whole: Path) -> None:
    one, other, again = (
        generated(whole, steps=30, temperature=1.0, seed=seed)[0] for seed in (0, 1, 0)
    )
    assert one == again != other


def test_an_arm_of_whole_sequences_has_no_text(tmp_path: Path, texts: str) -> None:
    console = quiet()
    run.run_training(training(tmp_path / "run", texts, arm="mod-random", steps=2), console)
    assert "generate" not in said(console)
    with pytest.raises(ValueError, match=r"`checkpoint` must be of an arm .*'mod-random'"):
        generated(tmp_path / "run")


@pytest.mark.parametrize("arm", ["dense", "mode-staged"])
def test_every_arm_generates(arm: str, tmp_path: Path, texts: str) -> None:
    run.run_training(training(tmp_path / "run", texts, arm=arm, steps=2), quiet())
    text, report = generated(tmp_path / "run", steps=3)
    assert text
    assert ("nothing is routed" in report) == (arm == "dense")
