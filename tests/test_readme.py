"""The examples of each page run, in order, in one namespace, as a reader would paste them.

So do the files among the examples that assert something: compiled as a reader compiles them.
"""

import re
from pathlib import Path

import jax
import pytest

import mode
from mode.lab.parse import COMMANDS
from tests.examples import CLAIMS, run_example


README = Path(__file__).parents[1] / "README.md"
DOCS = README.parent / "docs"
PAGES = [README, *sorted(DOCS.glob("**/*.md"))]
TUTORIALS = sorted(DOCS.glob("tutorials/*.md"))
WITH_EXAMPLES = [
    page for page in PAGES if "```python\n" in page.read_text() and page not in TUTORIALS
]


def code_of(page: Path) -> list[str]:
    """The Python examples of a page."""
    return re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)


def test_the_pages_that_have_examples() -> None:
    """Those on which nothing runs are the ones of commands and of words."""
    assert README in WITH_EXAMPLES
    without = {page.name for page in set(PAGES) - set(WITH_EXAMPLES) if page.parent == DOCS}
    assert without == {
        *("ahead-of-time.md", "choose.md", "faq.md", "glossary.md", "lab.md", "peers.md"),
        "processes.md",
    }


def test_every_public_name_is_on_a_page() -> None:
    """Once, and every name on a page is public."""
    text = "\n".join(page.read_text() for page in (DOCS / "api").glob("*.md"))
    names = re.findall(r"^::: (\S+)$", text, flags=re.MULTILINE)
    packages = {"aot": mode.aot, "pretrained": mode.pretrained, "testing": mode.testing}
    public = [f"mode.{name}" for name in dir(mode) if name[0] != "_" and name not in packages]
    for name, package in packages.items():
        source = Path(package.__file__ or "").read_text()
        found = re.findall(r"\b(\w+) as \1\b", source)
        public += [f"mode.{name}.{one}" for one in found]
    assert sorted(names) == sorted(public)


def test_every_page_is_in_the_menu() -> None:
    menu = (DOCS / "zensical.toml").read_text()
    pages = [str(page.relative_to(README.parent)) for page in PAGES if page != README]
    assert [page for page in pages if f'"{page}"' not in menu] == []


def test_every_command_has_a_page_in_the_menu() -> None:
    menu = (DOCS / "zensical.toml").read_text()
    assert [name for name in COMMANDS if f'"docs/commands/{name}.md"' not in menu] == []


@pytest.mark.parametrize("page", WITH_EXAMPLES, ids=lambda page: page.name)
def test_the_examples_run(page: Path):
    blocks = code_of(page)
    assert blocks
    namespace: dict[str, object] = {}
    # A reader has JAX's defaults, and optax itself needs the standard promotion.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for block in blocks:
            exec(compile(block, str(page), "exec"), namespace)


def test_tutorials_show_the_code_that_is_run() -> None:
    """`docs/tutorials/run.py` runs the cells and writes the pages; CI runs it at a small size."""
    assert len(TUTORIALS) == 5
    for page in TUTORIALS:
        cells = re.split(r"^# %%", page.with_suffix(".py").read_text(), flags=re.MULTILINE)[1:]
        code = [cell.strip() for cell in cells if not cell.startswith(" [markdown]")]
        assert [block.strip() for block in code_of(page)] == code, page.name


@pytest.mark.parametrize("path", CLAIMS, ids=lambda path: path.stem)
def test_examples_that_assert(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_example(path, capsys)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_files_lead_somewhere(page: Path):
    prose = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", prose)
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_tests_that_show_a_claim_are_there():
    """Those in the last column of the table of peers."""
    lines = (DOCS / "peers.md").read_text().splitlines()
    rows = [line.split("|") for line in lines if line.count("|") == 10]
    named = [name for row in rows for name in re.findall(r"`([\w/]+\.py)`", row[-2])]
    assert len(named) > 10
    assert [name for name in named if not (Path(__file__).parent / name).exists()] == []


def test_ci_runs_the_test_command_of_the_readme():
    command = re.search(r"^pip install uv && (uv run .*? pytest)", README.read_text(), flags=re.M)
    assert command is not None
    script = (README.parent / ".ci" / "run").read_text()
    assert f"pip install uv && {command.group(1)}" in script
