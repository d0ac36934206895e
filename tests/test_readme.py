"""The examples of each page run, in order, in one namespace, as a reader would paste them.

So do the files among the examples that assert something: compiled as a reader compiles them.
"""

import re
from pathlib import Path

import jax
import pytest

from tests.examples import CLAIMS, run_example


README = Path(__file__).parents[1] / "README.md"
PAGES = [README, *sorted((README.parent / "docs").glob("*.md"))]
WITH_EXAMPLES = [page for page in PAGES if page.name != "processes.md"]  # which has commands


@pytest.mark.parametrize("page", WITH_EXAMPLES, ids=lambda page: page.name)
def test_the_examples_run(page: Path):
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)
    assert blocks
    namespace: dict[str, object] = {}
    # A reader has JAX's defaults, and optax itself needs the standard promotion.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for block in blocks:
            exec(compile(block, str(page), "exec"), namespace)


@pytest.mark.parametrize("path", CLAIMS, ids=lambda path: path.stem)
def test_examples_that_assert(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_example(path, capsys)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_files_lead_somewhere(page: Path):
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_tests_that_show_a_claim_are_there():
    """Those in the last column of the table of peers."""
    rows = [line.split("|") for line in README.read_text().splitlines() if line.count("|") == 10]
    named = [name for row in rows for name in re.findall(r"`([\w/]+\.py)`", row[-2])]
    assert len(named) > 10
    assert [name for name in named if not (Path(__file__).parent / name).exists()] == []


def test_ci_runs_the_test_command_of_the_readme():
    command = re.search(r"^pip install uv && (uv run .*? pytest)", README.read_text(), flags=re.M)
    assert command is not None
    script = (README.parent / ".ci" / "run").read_text()
    assert f"pip install uv && {command.group(1)}" in script
