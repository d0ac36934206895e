"""The examples, and how a reader runs them."""

import runpy
from pathlib import Path

import jax
import pytest


EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))
# Those that assert something of a layer or a model, such as that it is causal.
CLAIMS = [path for path in EXAMPLES if "mode.testing" in path.read_text()]


def run_example(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Runs an example, which prints something."""
    with (
        pytest.MonkeyPatch.context() as patch,
        # A reader has JAX's defaults, and optax itself needs the standard promotion.
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        patch.setattr("sys.argv", [str(path)])
        runpy.run_path(str(path), run_name="__main__")
    assert capsys.readouterr().out
