"""`mode-lab generate`: text from what a run leaves behind."""

from pathlib import Path

import jax.numpy as jnp
import pytest

import mode
from mode.lab import run
from mode.lab.files import read_record
from mode.lab.tables import Tables
from tests.lab.helpers import quiet
from tests.lab.runs import generated


pytestmark = pytest.mark.optimized


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
    table = read_record(whole / "generated.routers.json", Tables).tables["routers"]
    assert table["capacity in training"] == (0.125,)
    assert table["dropped"] == (0,)


def test_sampling_is_keyed(whole: Path) -> None:
    one, other, again = (
        generated(whole, steps=30, temperature=1.0, seed=seed)[0] for seed in (0, 1, 0)
    )
    assert one == again != other
