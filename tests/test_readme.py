"""The README's examples run, in order, in one namespace, as a reader would paste them."""

import re
from pathlib import Path

import jax


README = Path(__file__).parents[1] / "README.md"


def test_the_examples_run():
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert len(blocks) == 9
    namespace: dict[str, object] = {}
    # A reader has JAX's defaults, and optax itself needs the standard promotion.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for block in blocks:
            exec(compile(block, str(README), "exec"), namespace)


def test_ci_runs_the_test_command_of_the_readme():
    command = re.search(r"^pip install uv && (uv run .*? pytest)", README.read_text(), flags=re.M)
    assert command is not None
    script = (README.parent / ".ci" / "run").read_text()
    assert f"pip install uv && {command.group(1)}" in script
